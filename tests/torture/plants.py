"""Errors to be put into the program, each of which the harness has to find. All of them are met by `plan show`."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

from lorafusion.core.plan import Plan
from lorafusion.core.schema import UserError


def _instead(do: Callable[[Path], None]) -> None:
    """Do something, and then refuse, in place of reading a plan."""

    def read(path: Path) -> Plan:
        do(Path(path))
        raise UserError(f"{path}: refused")

    Plan.read = read


def traceback() -> None:
    _instead(lambda path: path.stat().st_nothing)


def long_line() -> None:
    _instead(lambda path: print("x" * 301))


def control_character() -> None:
    _instead(lambda path: print("\x1b[31m"))


def file_written() -> None:
    _instead(lambda path: Path("written").touch())


def file_changed() -> None:
    _instead(lambda path: path.write_text("changed"))


def file_written_outside() -> None:
    def write(path: Path) -> None:
        place = path.absolute().parents[2] / "outside"
        place.touch()
        place.unlink()

    _instead(write)


def hang() -> None:
    _instead(lambda path: time.sleep(60))


def loop() -> None:
    def work(path: Path) -> None:
        end = time.process_time() + 2.5
        while time.process_time() < end:
            pass

    _instead(work)


def memory() -> None:
    _instead(lambda path: bytearray(3 * 2**29).count(1))


def torch_imported() -> None:
    def load(path: Path) -> None:
        import torch

        torch.zeros(1)

    _instead(load)


def process_left() -> None:
    _instead(lambda path: os.spawnlp(os.P_NOWAIT, "sleep", "sleep", "60"))


def other_status() -> None:
    _instead(lambda path: os._exit(1))


def nothing_said() -> None:
    _instead(lambda path: os._exit(2))
