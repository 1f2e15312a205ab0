"""How the jobs of a workflow stand, in the place of what Snakemake's Slurm plugin makes of it.

The plugin (2.8) waits for ever for a job that somebody cancels, where it asks sacct, or that squeue has forgotten; and
it does not say what a job waits for. Here one squeue tells all, on clusters that keep accounts and on those that do
not. Of a job that Slurm has forgotten its files say how it ended. No answer is never taken for an end.
"""

import asyncio
import math
import re
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from lorafusion.core.schema import UserError
from lorafusion.lab.cluster.left_jobs import RECORD
from lorafusion.lab.cluster.limits import excess
from lorafusion.lab.cluster.queue import Job, cancel, jobs_named, names_of
from lorafusion.lab.cluster.submit import Submitter
from lorafusion.lab.cluster.words import ENDS, TOGETHER, Wait, wait_of

LONGEST_PAUSE = 60.0  # between two looks
TELL_SECONDS = 300.0  # after which a job that waits is told
OF_MEMORY = re.compile("oom.kill|exceeded (job |step )?memory limit", re.IGNORECASE)  # as slurmstepd writes it
SHOW_SECONDS = 60.0  # that a file may take to be seen here, as through NFS


def watch(executor: Any, folder: Path) -> None:
    """Have Snakemake's executor submit its jobs by our means, and learn from here how they stand. folder: of the
    results, in which the driver has written down that jobs may come."""
    begin = (folder / RECORD).stat().st_mtime
    executor.check_active_jobs = Watch(executor, Submitter(executor), begin).check_active_jobs
    executor.report_job_error = partial(_report_job_error, executor.report_job_error)


def _report_job_error(report: Callable[..., None], info: Any, msg: str | None = None, **more: Any) -> None:
    """Report that a job has failed, also one that could not be submitted. Snakemake leaves out what is said of a job
    that steps share."""
    if msg and info.job.is_group():
        print(msg, flush=True)
    report(info, msg=msg, **more)


class Watch:
    """The jobs of an executor. submitter: who submits them; begin: when the first may have come, by the clock of the
    results' files."""

    def __init__(self, executor: Any, submitter: Submitter, begin: float) -> None:
        self.executor = executor
        self.submitter = submitter
        self.begin = begin
        self._jobs: dict[str, Job] = {}  # at the last look
        self._waits: dict[str, tuple[Wait, float]] = {}  # since when
        self._missed: dict[str, float] = {}  # jobs that squeue does not know, since when
        self._causes: dict[str, str] = {}  # why jobs were cancelled here
        self._excess: dict[tuple[str, str], str] = {}  # what is too large of a job that waits for a reason
        self._told: set[str] = set()

    async def check_active_jobs(self, active: Sequence[Any]) -> AsyncIterator[Any]:
        """Tell Snakemake which jobs have ended; gives those that have not."""
        settings, before = self.executor.workflow.executor_settings, self._jobs
        ended = await asyncio.to_thread(self.look, [info.external_jobid for info in active])
        first = pause = settings.init_seconds_before_status_checks
        if active and self._jobs == before:
            pause = min(1.5 * self.executor.next_seconds_between_status_checks, max(LONGEST_PAUSE, first))
        self.executor.next_seconds_between_status_checks = pause
        for info in active:
            job, log = ended.get(info.external_jobid), info.aux["slurm_logfile"]
            if job is None:
                yield info
            elif job.state == "COMPLETED" or is_made(info.job, self.begin):
                self.executor.report_job_success(info)
                if not settings.keep_successful_logs:
                    log.unlink(missing_ok=True)
            elif job.state == "UNKNOWN" and time.monotonic() - self._missed[job.id] < SHOW_SECONDS:
                yield info
            else:
                line = f"Slurm job {job.statement}: {self._causes.get(job.id) or cause_of(job.state, log)}. "
                self.executor.report_job_error(info, msg=line, aux_logs=[str(log)])

    def look(self, ids: Sequence[str]) -> dict[str, Job]:
        """Those of some jobs that have ended, by their ids. Those that would wait for ever are cancelled."""
        try:
            jobs = {job.id: job for job in jobs_named([self.executor.run_uuid] if ids else [])}
        except UserError as error:
            self._tell("squeue", f"Slurm does not say how jobs stand, and is asked again: {error}")
            return {}
        with suppress(UserError):  # they are still there at the next look
            cancel(self.submitter.twins(list(jobs.values())))
        now = time.monotonic()
        for id in ids:
            if id in jobs:
                self._missed.pop(id, None)
            else:
                self._missed.setdefault(id, now)
                jobs[id] = self._jobs.get(id, Job(id, ""))._replace(state="UNKNOWN")
        self._jobs = {id: jobs[id] for id in ids}
        self._look_at_waiting([job for job in self._jobs.values() if job.waits], now)
        return {id: job for id, job in self._jobs.items() if job.has_ended}

    def _look_at_waiting(self, jobs: Sequence[Job], now: float) -> None:
        """Cancel those that wait in vain, as two looks have shown; tell what others wait for, each reason once."""
        before, self._waits = self._waits, {}
        vain, long = [], defaultdict(list)
        for job in jobs:
            wait, (seen, since) = self._wait_of(job), before.get(job.id, (None, now))
            self._waits[job.id] = wait, since if wait == seen else now
            waited = now - self._waits[job.id][1]
            if waited > 0 and waited >= wait.seconds:
                vain.append(job)
                self._causes[job.id] = f"cancelled, as {job.reason} does not pass: {wait.advice}"
            elif waited >= TELL_SECONDS or 0 < wait.seconds < math.inf:
                long[wait.advice].append(job)
        for advice, others in long.items():
            self._tell(advice, f"Slurm jobs {names_of(others)} wait, as Slurm says: {others[0].reason}; {advice}")
        with suppress(UserError):  # they are still there at the next look
            cancel(vain, waiting=True)

    def _wait_of(self, job: Job) -> Wait:
        wait, key = wait_of(job.reason), (job.id, job.reason)
        if wait.advice == TOGETHER:
            if key not in self._excess:
                self._excess[key] = excess(job)
            if self._excess[key]:
                return Wait(0, f"{self._excess[key]}; another `qos` or `partition`")
        return wait

    def _tell(self, what: str, line: str) -> None:
        if what not in self._told:
            self._told.add(what)
            print(line, flush=True)


def cause_of(state: str, log: Path) -> str:
    """Why a job ended badly, and what to do. log: of the job, which says of memory what a step's end does not."""
    if state == "FAILED" and not log.exists():
        return f"FAILED: it has written no log; can its node write to {log.parent}?"
    if state == "FAILED" and OF_MEMORY.search(log.read_text(errors="replace")):
        state = "OUT_OF_MEMORY"
    return f"{state}: {ENDS[state]}"


def is_made(job: Any, begin: float) -> bool:
    """Have all files of a job of Snakemake come since a time? A step's key is written last."""
    keys = [(Path(step.output.key), step.params.key) for step in (job if job.is_group() else [job])]
    with suppress(FileNotFoundError):
        return all(path.stat().st_mtime >= begin and path.read_text().strip() == key for path, key in keys)
    return False
