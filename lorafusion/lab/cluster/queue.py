"""All that is asked of Slurm's own commands. They are given a time-out, as a controller that is down answers late or
not at all, and no answer is never taken for an empty queue."""

import math
import os
import re
import subprocess
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from lorafusion.core.schema import UserError
from lorafusion.lab.cluster.words import ENDS, WAITING

SECONDS = 60.0  # that a command of Slurm may take
# A job's fields, the comment last: it may contain what parts them. %A is the same for all of an array.
FIELDS = "%A|%T|%N|%r|%k"
NAMED = 3  # jobs in a line
CLOCK = re.compile(r"(?:(?P<days>\d+)-)?(?:(?P<hours>\d+):)?(?P<minutes>\d+):(?P<seconds>\d+)")


class Job(NamedTuple):
    """A job, for minutes after its end too. nodes: where it runs or ran; reason: why it waits, or why it ended;
    comment: what its submitter says of it."""

    id: str
    state: str
    nodes: str = ""
    reason: str = ""
    comment: str = ""

    @property
    def waits(self) -> bool:
        return self.state in WAITING

    @property
    def has_ended(self) -> bool:
        return self.state in ENDS

    @property
    def statement(self) -> str:
        """Its id, and what its submitter says of it."""
        return f"{self.id} ({self.comment})" if self.comment else self.id


def names_of(jobs: Sequence[Job]) -> str:
    """Which jobs, in a line."""
    more = f" and {len(jobs) - NAMED} more" if len(jobs) > NAMED else ""
    return ", ".join(job.statement for job in jobs[:NAMED]) + more


def jobs_named(names: Sequence[str]) -> list[Job]:
    """This user's jobs of some names that Slurm remembers: for minutes after their end, too."""
    if not names:
        return []
    # --all: in hidden partitions, too.
    words = [f"--user={os.getuid()}", f"--name={','.join(names)}", "--all", "--states=all", "--noheader"]
    return read_jobs(slurm("squeue", *words, f"--format={FIELDS}"))


def read_jobs(text: str) -> list[Job]:
    """The jobs in an answer of squeue, each once. One of which a part goes on, as of an array, has not ended."""
    jobs: dict[str, Job] = {}
    for line in text.splitlines():
        fields = line.strip().split("|", len(Job._fields) - 1)
        if len(fields) == len(Job._fields):
            job = Job(*fields)._replace(comment=fields[-1].replace("(null)", ""))
            if job.id not in jobs or not job.has_ended:
                jobs[job.id] = job
    return list(jobs.values())


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


def cancel(jobs: Sequence[Job], waiting: bool = False) -> None:
    """Have jobs end; those that have done so meanwhile are no mistake. waiting: but none that has begun meanwhile."""
    if jobs:
        slurm("scancel", "--quiet", *["--state=PENDING"] * waiting, *[job.id for job in jobs])


def job_state(job: str) -> Job:
    """How a job stands, for minutes after its end too; a job that Slurm has forgotten has ended."""
    try:
        return read_job_state(slurm("scontrol", "--oneliner", "show", "job", job))
    except UserError as error:
        if "Invalid job id" in str(error):
            return Job(job, "UNKNOWN")
        raise


def read_job_state(text: str) -> Job:
    """Of an answer of `scontrol --oneliner show job`."""
    return Job(*(field(text, name) for name in ("JobId", "JobState", "NodeList", "Reason")))


def field(text: str, name: str) -> str:
    """A field of an answer of `scontrol --oneliner show`, up to a space; empty where it has no value."""
    match = re.search(rf"(?:^|\s){name}=(\S*)", text)
    return match[1].replace("(null)", "") if match else ""


def read_minutes(text: str) -> float:
    """A time as Slurm writes it, `1-02:00:00`, `20:00` or `infinite`, in minutes."""
    match = CLOCK.fullmatch(text)
    if not match:
        return math.inf  # infinite, UNLIMITED, n/a
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    return 60 * (24 * days + hours) + minutes + seconds / 60


def slurm(*words: str, text: str = "", seconds: float = SECONDS) -> str:
    """What a command of Slurm answers; raises `UserError` where it is missing, does not answer, or refuses. text: for
    its standard input."""
    # What a user has set for the eye, such as SQUEUE_FORMAT, would change the answer.
    eye = ("SQUEUE_", "SCANCEL_", "SINFO_")
    plain = {name: value for name, value in os.environ.items() if not name.startswith(eye)}
    try:
        done = subprocess.run(
            words, input=text, capture_output=True, text=True, errors="replace", timeout=seconds, env=plain, check=False
        )
    except OSError as error:
        raise UserError(f"{words[0]}: cannot be run ({error.strerror}); expected Slurm's commands here") from None
    except subprocess.TimeoutExpired:
        raise UserError(f"{words[0]}: no answer in {seconds:.0f} s; is its controller up (`scontrol ping`)?") from None
    if done.returncode:
        reasons = re.sub(rf"^({words[0]}: )?((error|fatal): )?", "", done.stderr.strip(), flags=re.MULTILINE)
        raise UserError(f"{words[0]}: {'; '.join(reasons.splitlines()) or f'status {done.returncode}'}")
    return done.stdout
