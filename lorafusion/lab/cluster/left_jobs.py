"""The Slurm jobs that a driver of a results folder has left: a killed Snakemake's jobs run on.

A driver that submits jobs first writes into the folder what they are called. The next driver looks for jobs of that
name and has them end before it makes anything. A copy of a folder has another inode: the original's jobs go on.
"""

import time
from collections.abc import Sequence
from pathlib import Path

from lorafusion.core.files import read_json, write
from lorafusion.core.schema import Config, UserError, validated
from lorafusion.lab.cluster.queue import Job, cancel, jobs_named, names_of
from lorafusion.lab.cluster.site import read_site

RECORD = ".slurm-jobs"
END_SECONDS = 300.0  # that a cancelled job may take: Slurm's KillWait and an epilog
LOOK_SECONDS = 1.0


class Record(Config):
    """inode: of the folder. run: what the jobs are called that its last driver has submitted."""

    inode: int
    run: str


def record_run(folder: Path, run: str) -> None:
    """Write down that jobs of this name may come. Those of earlier runs have ended."""
    write(folder / RECORD, Record(inode=folder.stat().st_ino, run=run).model_dump_json())


def end_left_jobs(folder: Path, patient: bool = False) -> bool:
    """End the jobs that a folder's last driver has left, wait until they have ended, and say which; returns whether
    there were any, as files may have changed then. Raises `UserError` where that cannot be had, as without Slurm's
    commands. patient: those that run already go on to their end, where the site says `left_jobs: wait`."""
    left = _left(folder)
    waits = patient and bool(left) and read_site().left_jobs == "wait"
    kept = [job for job in left if waits and not job.waits]
    cancelled = [job for job in left if job not in kept]
    begin = time.monotonic()
    cancel(cancelled)
    if kept:
        _say("waited for", kept)
        _wait(folder)
    elif cancelled:
        _wait(folder, END_SECONDS)
    if cancelled:
        _say(f"cancelled in {time.monotonic() - begin:.0f} s", cancelled)
    (folder / RECORD).unlink(missing_ok=True)
    return bool(left)


def _left(folder: Path) -> list[Job]:
    path = folder / RECORD
    if not path.exists():
        return []
    record = validated(Record, read_json(path, "record of Slurm jobs"), str(path))
    if record.inode != folder.stat().st_ino:
        return []
    try:
        return [job for job in jobs_named([record.run]) if not job.has_ended]
    except UserError as error:
        reason = f"cannot tell whether an earlier workflow's jobs still run: {error}"
        raise UserError(f"{path}: {reason}; if none does, delete this file") from None


def _wait(folder: Path, seconds: float = float("inf")) -> None:
    """Until none is left."""
    end, pause = time.monotonic() + seconds, LOOK_SECONDS
    while left := _left(folder):
        if time.monotonic() > end:
            job = left[0]
            still = f"Slurm job {job.id} on {job.nodes or 'no node'} is {job.state}, {seconds:.0f} s after scancel"
            raise UserError(f"{folder}: {still}; start again once `squeue --jobs={job.id}` shows none")
        time.sleep(pause)
        pause = min(1.5 * pause, 30.0)  # a controller has others to serve


def _say(what: str, jobs: Sequence[Job]) -> None:
    print(f"{len(jobs)} Slurm jobs of an earlier workflow here, {what}: {names_of(jobs)}", flush=True)
