"""All that is asked of Slurm's own commands. They are given a time-out, as a controller that is down answers late or
not at all, and no answer is never taken for an empty queue."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from lorafusion.core.schema import UserError

SECONDS = 60.0  # that a command of Slurm may take
# A job's fields, the comment last: it may contain what parts them. %A is the same for all of an array.
FIELDS = "%A|%T|%N|%r|%k"
# A job that is none of these has ended, on all its nodes.
ACTIVE = "PENDING,CONFIGURING,RUNNING,SUSPENDED,STOPPED,REQUEUED,RESIZING,SIGNALING,STAGE_OUT,COMPLETING"


class Job(NamedTuple):
    """A job that has not ended. nodes: where it runs; reason: why it waits; comment: what its submitter says of it."""

    id: str
    state: str
    nodes: str
    reason: str
    comment: str

    @property
    def waits(self) -> bool:
        return self.state == "PENDING"

    @property
    def statement(self) -> str:
        """Its id and, of a step of Snakemake, which one it makes."""
        step = self.comment.removeprefix("rule_").replace("_wildcards_", " ")
        return f"{self.id} ({step})" if step else self.id


def jobs_named(names: Sequence[str]) -> list[Job]:
    """This user's jobs of some names that have not ended."""
    if not names:
        return []
    return read_jobs(
        slurm(
            "squeue",
            f"--user={os.getuid()}",
            f"--name={','.join(names)}",
            "--noheader",
            f"--format={FIELDS}",
            f"--states={ACTIVE}",
        )  # fmt: skip
    )


def read_jobs(text: str) -> list[Job]:
    """The jobs in an answer of squeue, each once."""
    lines = (line.strip().split("|", len(Job._fields) - 1) for line in text.splitlines())
    jobs = (Job(*fields) for fields in lines if len(fields) == len(Job._fields))
    return list({job.id: job._replace(comment=job.comment.replace("(null)", "")) for job in jobs}.values())


def jobs_here(environment: Mapping[str, str] = os.environ) -> str | None:
    """The jobs of others, and others of this user's, that run on this job's nodes now; None outside of a job, or where
    Slurm does not answer."""
    # Snakemake's plugin drops the list of nodes from a job's environment; srun, on several nodes, sets it again.
    nodes = environment.get("SLURM_JOB_NODELIST") or environment.get("SLURMD_NODENAME")
    job = environment.get("SLURM_JOB_ID")
    if not job or not nodes:
        return None
    form = "--format=%A of %u: %C CPUs, %b"
    try:
        answer = slurm("squeue", "--noheader", "--states=RUNNING", f"--nodelist={nodes}", form)
    except UserError:
        return None
    lines = [line.strip() for line in answer.splitlines() if line.strip()]
    return "; ".join(line for line in lines if line.split()[0] != job)


def cancel(jobs: Sequence[Job]) -> None:
    """Have jobs end; those that have done so meanwhile are no mistake."""
    if jobs:
        slurm("scancel", "--quiet", *[job.id for job in jobs])


class JobState(NamedTuple):
    """How a job stands. reason: why it waits, or why it ended; nodes: of which it runs or ran."""

    id: str
    state: str
    reason: str
    nodes: str

    @property
    def waits(self) -> bool:
        return self.state in ("PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD")

    @property
    def has_ended(self) -> bool:
        return not self.waits and self.state not in ACTIVE.split(",")


def job_state(job: str) -> JobState:
    """How a job stands, for minutes after its end too; a job that Slurm has forgotten has ended."""
    try:
        return read_job_state(slurm("scontrol", "--oneliner", "show", "job", job))
    except UserError as error:
        if "Invalid job id" in str(error):
            return JobState(job, "UNKNOWN", "", "")
        raise


def read_job_state(text: str) -> JobState:
    """Of an answer of `scontrol --oneliner show job`."""
    names = {"JobId": "", "JobState": "UNKNOWN", "Reason": "", "NodeList": ""}
    for name in names:
        match = re.search(rf"(?:^|\s){name}=(\S*)", text)
        names[name] = match[1].replace("(null)", "") if match else names[name]
    return JobState(*names.values())


def slurm(*words: str, text: str = "", seconds: float = SECONDS) -> str:
    """What a command of Slurm answers; raises `UserError` where it is missing, does not answer, or refuses. text: for
    its standard input."""
    # What a user has set for the eye, such as SQUEUE_FORMAT, would change the answer.
    eye = ("SQUEUE_", "SCANCEL_", "SINFO_")
    plain = {name: value for name, value in os.environ.items() if not name.startswith(eye)}
    try:
        done = subprocess.run(
            words, input=text, capture_output=True, text=True, timeout=seconds, env=plain, check=False
        )
    except OSError as error:
        raise UserError(f"{words[0]}: cannot be run ({error.strerror}); expected Slurm's commands here") from None
    except subprocess.TimeoutExpired:
        raise UserError(f"{words[0]}: no answer in {seconds:.0f} s; is its controller up (`scontrol ping`)?") from None
    if done.returncode:
        reasons = re.sub(rf"^({words[0]}: )?((error|fatal): )?", "", done.stderr.strip(), flags=re.MULTILINE)
        raise UserError(f"{words[0]}: {'; '.join(reasons.splitlines()) or f'status {done.returncode}'}")
    return done.stdout
