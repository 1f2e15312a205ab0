"""Runs of tests that ask what is computed, and not how processes are started: forked ones, of one thread, that wait
where a test wants to do something to them."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from lorafusion.engine import fork_server
from lorafusion.lab.forked import MODULES

# pytest: it is the main module of these processes, too.
fork_server.preload(*MODULES, "pytest")


def work(*arguments) -> None:
    """The worker, that waits before the forward pass of a slot for as long as `once_before` wants it to."""
    from lorafusion.engine import saving
    from lorafusion.engine.saving import Checkpoints

    saving.PATIENCE_SECONDS = 60  # of this process alone: none is delayed
    stop_after = Checkpoints.stop_after

    def wait_and_ask(self, slot: int, hold: int) -> int | None:
        wanted = _wanted(self.folder, slot)
        if wanted.exists():
            _arrived(self.folder, slot, self.rank).touch()
            while wanted.exists():
                time.sleep(0.01)
        return stop_after(self, slot, hold)

    Checkpoints.stop_after = wait_and_ask
    fork_server.work(*arguments)


def work_on(*arguments) -> None:
    """The worker that outlives its launcher, as one in a slow microbatch does, and has none of its files open."""
    from lorafusion.engine import worker

    os.closerange(3, 1000)
    worker.end_with_parent = lambda *_: None  # of this process alone
    work(*arguments)


def once_before(slot: int, checkpoints: Path, processes: int, what: Callable[[], None]) -> Callable[[], None]:
    """A launcher's `look` that calls `what` once, when all processes of a run with checkpoints are before a slot's
    forward pass. They wait for it there: a toy run would be over before a busy machine's launcher looks again."""
    wanted, arrived = _wanted(checkpoints, slot), [_arrived(checkpoints, slot, rank) for rank in range(processes)]
    checkpoints.mkdir(parents=True, exist_ok=True)
    wanted.touch()

    def look() -> None:
        if wanted.exists() and all(one.exists() for one in arrived):
            what()
            wanted.unlink()

    return look


def _wanted(checkpoints: Path, slot: int) -> Path:
    return checkpoints / f"wait-{slot}"


def _arrived(checkpoints: Path, slot: int, rank: int) -> Path:
    return checkpoints / f"wait-{slot}-{rank}"


class Forked(fork_server.Forked):
    """Sums do not depend on how many threads there were."""

    work = staticmethod(work)

    def __init__(self, *arguments) -> None:
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        super().__init__(*arguments)


class Outliving(Forked):
    work = staticmethod(work_on)


launch = partial(fork_server.launch_any, start=Forked)
place_of = fork_server.place_of
