"""How jobs are submitted, in the place of what Snakemake's Slurm plugin does.

The plugin (2.8) gives a step up whose sbatch fails. Here a controller that is busy is asked again. It may have taken a
job without saying so: that job is looked for by its name and comment first, so that no step runs twice.
"""

import re
import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from threading import Event
from types import SimpleNamespace
from typing import Any

from lorafusion.core.schema import UserError
from lorafusion.lab.cluster.queue import Job, jobs_named, slurm

PAUSE = 5.0  # seconds to the second try; later ones come less often
LONGEST_PAUSE = 120.0  # shorter than Slurm remembers a job that has ended (MinJobAge)
BUSY_SECONDS = 900.0  # that a controller may be busy, as while it starts again
# What a controller that is busy, or the way to it, makes of a call that may be all right.
BUSY = re.compile(
    "timed out|[Uu]nable to contact|no answer in|try again|temporarily un|standby mode|not responding|"
    "Zero Bytes|onnection (refused|reset|failure)|message (send|receive) failure|not connected|Munge encode failed"
)
LATE = "A job that it takes later is held, and never runs: `squeue --me --states=PENDING`"
Request = Mapping[str, Any]


class _Asked(dict):
    """Resources as the plugin reads them: by key and as attributes."""

    __getattr__ = dict.get


def sbatch_words(request: Request, settings: object = None, **names: object) -> list[str]:
    """The call that submits a job. request: what it asks for, by Snakemake's names; settings: those of the plugin;
    names: run_uuid, comment_str, slurm_logfile and workdir, as the plugin calls them."""
    from snakemake_executor_plugin_slurm.submit_string import get_submit_command
    from snakemake_executor_plugin_slurm.utils import set_gres_string
    from snakemake_executor_plugin_slurm.validation import validate_slurm_extra

    asked = _Asked({key: value for key, value in request.items() if value is not None})
    job = SimpleNamespace(resources=asked, threads=1)
    validate_slurm_extra(job)
    account, partition = asked.slurm_account, asked.slurm_partition
    usual = {"run_uuid": "lorafusion", "comment_str": "", "slurm_logfile": "/dev/null", "workdir": ""}
    usual["account"] = f"-A {shlex.quote(str(account))}" if account else ""
    usual["partition"] = f"-p {shlex.quote(str(partition))}" if partition else ""
    excluded = getattr(settings, "exclude_failed_nodes", None)
    failed = {node.strip() for node in excluded.split(",") if node.strip()} if excluded else set()
    return shlex.split(get_submit_command(job, usual | names, settings, failed) + set_gres_string(job))


def submit(words: Sequence[str], script: str, name: str, comment: str, stopped: Event | None = None) -> str:
    """Submit a job; returns its id. A busy controller is asked again for a quarter of an hour. Raises `UserError` where
    Slurm refuses the job, or is busy for longer.

    A job is held until its id is known: what a busy controller takes much later never runs beside what was submitted
    in its place. name, comment: of the job; no other one has both. stopped: nothing is tried again once it is set.
    """

    def take(again: bool) -> str:
        taken = [job for job in (jobs_named([name]) if again else []) if job.comment == comment]
        return taken[-1].id if taken else _id_of(slurm(*words, "--hold", text=script))

    def release(again: bool) -> str:
        try:
            return slurm("scontrol", "release", id)
        except UserError as error:
            if again and not BUSY.search(str(error)):
                return ""  # it was released, and runs
            raise

    stopped = stopped or Event()
    id = _answer(take, stopped)
    _answer(release, stopped)
    return id


def _answer(ask: Callable[[bool], str], stopped: Event) -> str:
    """What Slurm answers once it is not busy. ask: asks it; told whether it was asked before."""
    pause, end = PAUSE, 0.0
    while True:
        try:
            return ask(end > 0)
        except UserError as error:
            if not BUSY.search(str(error)):
                raise
            if not end:
                print(f"Slurm is busy, and is asked again for {BUSY_SECONDS / 60:.0f} minutes: {error}", flush=True)
                end = time.monotonic() + BUSY_SECONDS
            if time.monotonic() >= end or stopped.wait(pause):
                raise UserError(f"{error}; Slurm is still busy; start the workflow again. {LATE}") from None
        pause = min(2 * pause, LONGEST_PAUSE)


def _id_of(answer: str) -> str:
    """The id of a job in what sbatch says, to which a cluster may have added lines of its own."""
    ids = re.findall(r"^(?:Submitted batch job )?(\d+)(?:;.*| on cluster .*)?$", answer, re.MULTILINE)
    if not ids:
        raise UserError(f"sbatch: expected the id of a job, found {answer.strip()!r}")
    return ids[-1]


def comment_of(job: Any) -> str:
    """What a job of Snakemake makes, for people who read squeue. No other job of the workflow has the same comment."""
    if job.is_group():
        steps = sorted(job.jobs, key=lambda step: (-step.priority, step.output.main))  # as they run
        what = f"{job.groupid}: {len(steps)} steps, {' '.join(steps[0].wildcards)} to {' '.join(steps[-1].wildcards)}"
    else:
        what = " ".join([job.name, *job.wildcards])
    return f"{what}, try {job.attempt}" if job.attempt > 1 else what  # as by --retries


class Submitter:
    """Submits the jobs of Snakemake's executor."""

    def __init__(self, executor: Any) -> None:
        self.executor = executor
        self.stopped = Event()
        self._ids: dict[str, str] = {}  # by comments; empty of a job that was given up
        executor.run_job = self.run_job
        executor.shutdown = partial(self._shut_down, executor.shutdown)

    def run_job(self, job: Any) -> None:
        """Submit a job, and tell Snakemake what became of it. Called from threads of the plugin, which nobody watches:
        whatever happens, Snakemake must be told."""
        from snakemake_interface_common.exceptions import WorkflowError
        from snakemake_interface_executor_plugins.executors.base import SubmittedJobInfo

        executor, comment, id, reason = self.executor, job.name, "", "see above"
        if self.stopped.is_set():
            return
        try:
            comment = comment_of(job)
            folder = executor.slurm_logdir / (
                job.groupid if job.is_group() else comment.replace("/", "_").replace(" ", "/", 1)
            )
            folder.mkdir(parents=True, exist_ok=True)
            names = {"run_uuid": executor.run_uuid, "comment_str": comment, "slurm_logfile": folder / "%j.log"}
            names["workdir"] = executor.workflow.workdir_init
            words = sbatch_words(job.resources, executor.workflow.executor_settings, **names)
            script = f"#!/bin/sh\n{executor.format_job_exec(job)}"
            id = submit(words, script, executor.run_uuid, comment, self.stopped)
        except (UserError, WorkflowError, OSError) as error:
            reason = str(error)
        finally:
            self._ids[comment] = id
            if not id:
                line = f"Slurm did not take {comment}: {reason}. "
                executor._report_job_error_threadsafe(SubmittedJobInfo(job), line)
        if id:
            log = folder / f"{id}.log"
            executor.logger.info(f"Job {job.jobid} has been submitted with SLURM jobid {id} (log: {log}).")
            info = SubmittedJobInfo(job, external_jobid=id, aux={"slurm_logfile": log})
            executor._report_job_submission_threadsafe(info)

    def _shut_down(self, shut_down: Any) -> None:
        """Snakemake waits for what is being submitted."""
        self.stopped.set()
        shut_down()

    def twins(self, jobs: Sequence[Job]) -> list[Job]:
        """Those of the workflow's jobs that a busy controller took after all, when the same had been submitted again or
        given up."""
        return [job for job in jobs if not job.has_ended and self._ids.get(job.comment, job.id) != job.id]
