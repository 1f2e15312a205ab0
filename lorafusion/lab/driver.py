"""Who makes the steps of a results folder: one driver at a time, such as Snakemake, and all that it has started.

Shares of one suite (`--share 0/2`) work side by side, each with a lock of its own. Where Slurm starts a step on another
machine, Slurm ends it; the step only sees whether its driver still has the folder.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lorafusion.lab.runner import Share
from lorafusion.launch.lock import LOCK, VARIABLE, end_others, inherited, join, launcher_of, locked


@contextmanager
def driving(folder: Path, what: str, share: Share | None = None) -> Iterator[None]:
    """Within it nobody else makes steps in a suite's folder, and nothing that an earlier driver started is left. Raises
    `UserError` where another driver is at work. A process that a driver started takes part in its work.

    what: this driver is, for those whom it keeps out.
    """
    if is_driven():
        join_driver()
        yield
        return
    side_by_side = share is not None and share.count > 1
    name = f"{LOCK}-{share.index}-of-{share.count}" if side_by_side else LOCK
    with locked(folder, name, what) as lock:
        for other in folder.glob(f"{LOCK}*"):
            if other.name != name and not (side_by_side and other.name.endswith(f"-of-{share.count}")):
                with locked(folder, other.name, what):  # nobody has it, or this driver must not work
                    pass
        os.environ[VARIABLE] = lock.model_dump_json()
        try:
            yield
        finally:
            del os.environ[VARIABLE]
            end_others(lock)


def is_driven() -> bool:
    """Was this process started by a driver?"""
    return VARIABLE in os.environ


def join_driver() -> None:
    """Take part in the work of the driver that started this process. Raises `UserError` where that has ended."""
    lock = inherited()
    if lock is not None and launcher_of(lock).is_near:
        join(lock)
    else:
        os.environ[VARIABLE] = ""
