"""Runs of tests that ask what is computed, and not how processes are started: forked ones, of one thread, that wait
where a test wants to do something to them."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from unittest.mock import patch

from lorafusion.runtime import forked

# pytest: it is the main module of these processes, too.
forked.preload("pytest")


def work(*arguments) -> None:
    """The worker, that waits after it has saved a checkpoint for as long as `once_saved` wants it to."""
    from lorafusion.runtime.checkpoint import Checkpoints

    save = Checkpoints.save

    def save_and_wait(self, run, slot: int) -> None:
        save(self, run, slot)
        while _wait_file(self.folder, slot).exists():
            time.sleep(0.01)

    with patch.object(Checkpoints, "save", save_and_wait):
        forked.work(*arguments)


def once_saved(checkpoints: Path, slot: int, what: Callable[[], None]) -> Callable[[], None]:
    """A launcher's `look` that calls `what` once, when a checkpoint after so many slots appears. The processes wait for
    it after they have saved theirs: a toy run would be over before a busy machine's launcher looks again."""
    wait_file = _wait_file(checkpoints, slot)
    checkpoints.mkdir(parents=True, exist_ok=True)
    wait_file.touch()

    def look() -> None:
        if wait_file.exists() and (checkpoints / f"slot-{slot:09}").exists():
            what()
            wait_file.unlink()

    return look


def _wait_file(checkpoints: Path, slot: int) -> Path:
    return checkpoints / f"wait-{slot}"


class Forked(forked.Forked):
    """Sums do not depend on how many threads there were."""

    work = staticmethod(work)

    def __init__(self, *arguments) -> None:
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        super().__init__(*arguments)


launch = partial(forked.launch_any, start=Forked)
place_of = forked.place_of
