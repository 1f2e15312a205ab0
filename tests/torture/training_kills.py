"""Trainings whose processes get signals at random moments, and whose disk gets full: the same command, at once after
each fault, ends with the same bits and the same rows, and leaves nothing behind.

`python -m tests.torture.training_kills COUNT SEED FOLDER` prints what went wrong.
"""

from __future__ import annotations

import os
import random
import select
import shutil
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil

from lorafusion.launch.pulse import BEAT_SECONDS
from tests.torture.toy_training import (
    MOST_SECONDS,
    SHAPES,
    Command,
    adopting,
    is_pulse,
    jobs_file,
    left_behind,
    reap,
    results,
)

DONE, STOPPED = 0, 75
FAULTS_OF_A_TRAINING = 4
FAULTS = ("kill launcher", "kill launcher", "kill launcher", "kill worker", "kill worker", "kill all", "term launcher",
          "int group", "int twice", "hup launcher", "term worker", "hup worker", "stop launcher", "stop worker",
          "stop all", "full disk", "full disk", "close terminal")  # fmt: skip


class FailureError(Exception):
    """What was expected and not so."""


class Torture:
    """One training and what is done to it."""

    def __init__(
        self, folder: Path, shape: tuple[int, int], seed: str, whole: Path, seconds: float, real: bool
    ) -> None:
        self.path, self.whole, self.real = jobs_file(folder, shape), whole, real
        self.random = random.Random(seed)
        self.seconds = seconds  # that it takes when nothing is done to it
        self.largest = sorted({path.stat().st_size for path in (whole / "out").rglob("*") if path.is_file()})
        self.history: list[str] = []

    def run(self, faults: int) -> None:
        """Raise `FailureError` unless the training ends as if nothing had been done to it."""
        for _ in range(faults):
            self._suffer(self.random.choice(FAULTS))
        command = self._start()
        code = command.wait(MOST_SECONDS)
        if code != DONE:
            raise FailureError(f"the last command ended with {code}: {command.output[-400:]}")
        self._compare()

    def _start(self, **options) -> Command:
        return Command(self.path, real=self.real, **options)

    def _suffer(self, fault: str) -> None:
        most_bytes = self.random.choice(self.largest) - 1 if fault == "full disk" else None
        moment = self.random.uniform(0, self.seconds)
        if fault == "close terminal":
            return self._close_terminal(moment)
        self.history.append(f"{fault} {most_bytes or f'{moment:.2f}'}")
        command, begin = self._start(most_bytes=most_bytes), time.monotonic()
        if fault == "full disk":
            code = command.wait(MOST_SECONDS)
            lines = command.output.splitlines()
            if code not in (0, 1, 2) or code and not lines[-1].startswith("error: "):
                raise FailureError(f"full disk: {code}, {command.output[-400:]}")
            if code and "free" not in lines[-1] and "Store" not in lines[-1]:  # torch's own file says less
                raise FailureError(f"full disk: nothing of what is free in {lines[-1]!r}")
            return
        if command.wait(max(0, begin + moment - time.monotonic())) is not None:
            return self._wait(command, DONE)  # it had ended
        what, whom = fault.split()
        if what == "kill" and whom == "launcher":
            self._send([command.process], signal.SIGKILL)
            command.wait(MOST_SECONDS)  # until its parent knows; its workers may be at work
            return
        processes = self._victims(command, whom)
        getattr(self, f"_{what}")(command, processes)

    def _victims(self, command: Command, whom: str) -> list[psutil.Process]:
        workers = command.workers()
        if whom == "worker":
            return self.random.sample(workers, min(1, len(workers)))
        return [command.process, *workers] if whom == "all" else [command.process]

    def _send(self, processes: list[psutil.Process], number: signal.Signals) -> None:
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                process.send_signal(number)

    def _wait(self, command: Command, *codes: int) -> None:
        code = command.wait(MOST_SECONDS)
        if code is None:
            raise FailureError(f"still at work after {MOST_SECONDS} s")
        if code not in codes:
            raise FailureError(f"ended with {code}, not one of {codes}: {command.output[-400:]}")

    def _kill(self, command: Command, processes: list[psutil.Process]) -> None:
        self._send(processes, signal.SIGKILL)
        self._wait(command, 0, 1, -signal.SIGKILL)

    def _term(self, command: Command, processes: list[psutil.Process]) -> None:
        self._send(processes, signal.SIGTERM)
        self._wait(command, DONE, STOPPED, 1)

    def _int(self, command: Command, _: list[psutil.Process]) -> None:
        """As Ctrl-C does; it is answered at once."""
        with suppress(ProcessLookupError):
            os.killpg(command.process.pid, signal.SIGINT)
            if "twice" in self.history[-1]:
                time.sleep(0.05)
                os.killpg(command.process.pid, signal.SIGINT)
        self._wait(command, DONE, STOPPED, 130)
        if command.code == STOPPED and "SIGINT: saving a checkpoint" not in command.output:
            raise FailureError(f"Ctrl-C was not answered: {command.output[-400:]}")

    def _hup(self, command: Command, processes: list[psutil.Process]) -> None:
        self._send(processes, signal.SIGHUP)
        self._wait(command, DONE, 1, STOPPED)

    def _close_terminal(self, moment: float) -> None:
        """The command, whose session it is the terminal of, gets SIGHUP and goes on."""
        outer, inner = os.openpty()
        command = self._start(terminal=os.ttyname(inner))
        os.close(inner)
        end = time.monotonic() + moment
        while time.monotonic() < end and command.code is None:
            if select.select([outer], [], [], 0.01)[0]:
                with suppress(OSError):  # it has ended
                    os.read(outer, 4096)
            command.wait(0)
        self.history.append(f"close terminal {moment:.2f}")
        os.close(outer)
        self._wait(command, DONE)

    def _stop(self, command: Command, processes: list[psutil.Process]) -> None:
        self._send(processes, signal.SIGSTOP)
        time.sleep(0.3)
        self._send(processes, signal.SIGCONT)
        self._wait(command, DONE)

    def _compare(self) -> None:
        ours, theirs = results(self.path.parent), results(self.whole)
        different = sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))
        if different:
            raise FailureError(f"not as without faults: {different}")
        psutil.wait_procs([child for child in psutil.Process().children() if is_pulse(child)], 5 * BEAT_SECONDS)
        reap()
        running = [child for child in psutil.Process().children(recursive=True) if "resource_tracker" not in str(child)]
        if running:
            raise FailureError(f"still running: {running}")
        left = left_behind(self.path.parent)
        if left:
            raise FailureError(f"left behind: {left}")


def run(count: int, seed: int, folder: Path) -> list[str]:
    """Do `count` faults to trainings of each shape in turn; what went wrong, a line each. Of one training in ten the
    processes are started as a user's."""
    failures: list[str] = []
    with adopting():
        seconds: dict[tuple[int, int], float] = {}
        for index, begun in enumerate(range(0, count, FAULTS_OF_A_TRAINING)):
            shape = list(SHAPES)[index % len(SHAPES)]
            whole = folder / f"whole-{shape[0]}x{shape[1]}"
            if shape not in seconds:
                begin = time.monotonic()
                if Command(jobs_file(whole, shape)).wait(MOST_SECONDS) != DONE:
                    raise RuntimeError(f"{whole}: a training without faults failed")
                seconds[shape] = time.monotonic() - begin
            place = folder / f"training-{index}"
            torture = Torture(place, shape, f"{seed}/{index}", whole, seconds[shape], real=False)
            try:
                torture.run(min(FAULTS_OF_A_TRAINING, count - begun))
                shutil.rmtree(place)
            except FailureError as failure:
                failures.append(f"{place.name} {shape}: {', '.join(torture.history)}: {' '.join(str(failure).split())}")
    return failures


if __name__ == "__main__":
    begin = time.monotonic()
    print(*run(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])), sep="\n\n")
    print(f"{time.monotonic() - begin:.0f} s")
