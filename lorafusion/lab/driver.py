"""Who makes the steps of a results folder: one driver at a time, such as Snakemake, and all that it has started.

Shares of one suite (`--share 0/2`) work side by side, each with a lock of its own. A step that Slurm starts on another
machine looks whether its driver still has the folder, or another one by now. Such steps are ended through Slurm: by the
driver itself, or by the next one of the folder if it was killed (`lorafusion.lab.cluster.left_jobs`).
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lorafusion.lab.cluster.left_jobs import end_left_jobs, record_run
from lorafusion.lab.runner import Share
from lorafusion.launch.lock import LOCK, VARIABLE, end_others, inherited, join, launcher_of, locked


@contextmanager
def driving(folder: Path, what: str, share: Share | None = None, slurm_run: str = "") -> Iterator[bool]:
    """Within it nobody else makes steps in a suite's folder, and nothing that an earlier driver started is left. Raises
    `UserError` where another driver is at work. A process that a driver started takes part in its work.

    what: this driver is, for those whom it keeps out. slurm_run: the name of the Slurm jobs that it submits. Gives
    whether jobs of an earlier driver had to end first: what was seen of the folder's files may not hold any more.
    """
    if is_driven():
        join_driver()
        yield False
        return
    side_by_side = share is not None and share.count > 1
    name = f"{LOCK}-{share.index}-of-{share.count}" if side_by_side else LOCK
    with locked(folder, name, what) as lock:
        for other in folder.glob(f"{LOCK}*"):
            if other.name != name and not (side_by_side and other.name.endswith(f"-of-{share.count}")):
                with locked(folder, other.name, what):  # nobody has it, or this driver must not work
                    pass
        changed = end_left_jobs(folder, patient=True)
        if slurm_run:
            record_run(folder, slurm_run)
        os.environ[VARIABLE] = lock.model_dump_json()
        try:
            yield changed
        finally:
            del os.environ[VARIABLE]
            end_others(lock)
            end_left_jobs(folder)


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
