"""The toy cluster of cluster.sh, and the workflow on it, for the tests here."""

from __future__ import annotations

import csv
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import ClassVar, NamedTuple

import pytest
import yaml

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[1]
SUITE = "$(touch PWNED).yaml"  # what a shell takes apart


def require_possible() -> None:
    """Skip the test where no cluster can be had on this machine."""
    if not sys.platform.startswith("linux"):
        pytest.skip("Slurm needs Linux")
    if os.geteuid() != 0:
        pytest.skip("starting Slurm's daemons needs root")
    if not shutil.which("slurmctld") and not shutil.which("apt-get"):
        pytest.skip("Slurm is not installed, and there is no apt-get to install it with")


def cluster(*words: str, **shape: int | str) -> None:
    """Call cluster.sh. A cluster that cannot be had skips; one that does not come up fails."""
    environment = os.environ | {name: str(value) for name, value in shape.items()}
    done = subprocess.run([HERE / "cluster.sh", *words], env=environment, text=True, capture_output=True)
    if "left alone" in done.stderr:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stdout + done.stderr


class Job(NamedTuple):
    """A life of a job, as sacct has it: a job that was put back into the queue has several. what: it makes, where
    Snakemake submitted it."""

    id: str
    state: str
    partition: str
    start: str
    end: str
    seconds: str
    what: str


def answer(*words: str, **options: str) -> str:
    """What a command answers."""
    done = subprocess.run(words, text=True, capture_output=True, timeout=60, **options)
    assert done.returncode == 0, (words, done.stderr)
    return done.stdout


def lives() -> list[Job]:
    """Every life of every job, also of those that ended, in the order in which they began."""
    fields = "JobIDRaw,State,Partition,Start,End,ElapsedRaw,Comment"
    lines = answer("sacct", "-X", "--duplicates", "--noheader", "--parsable2", f"--format={fields}").splitlines()
    return sorted((Job(*line.split("|", 6)) for line in lines), key=lambda job: job.start)


def queue() -> dict[str, str]:
    """The states of the jobs that have not ended, by their ids."""
    lines = answer("squeue", "--noheader", "--format=%A %T").splitlines()
    return dict(line.split() for line in lines)


def wait_until(true: Callable[[], object], seconds: float, what: str) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, f"not in {seconds:.0f} s: {what}\n{answer('squeue')}"
        time.sleep(0.5)


class Snakemake:
    """A Snakemake that runs. output: the file to which all goes that it says."""

    started: ClassVar[list[Snakemake]] = []

    def __init__(self, command: list[str], output: Path, **options: object) -> None:
        self.output = output
        with output.open("w") as file:
            self.process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, **options)
        self.started.append(self)

    def end(self, seconds: float) -> tuple[int, str]:
        """Wait for its end; returns its status and what it said."""
        return self.process.wait(seconds), self.output.read_text()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


def end_all() -> None:
    """End what a test that failed has left."""
    for snakemake in Snakemake.started:
        snakemake.kill()
    if queue():
        answer("scancel", "--user=root")
        wait_until(lambda: not queue(), 60, "the jobs of a test that failed have ended")


class Workflow:
    """The workflow in a copy of what git would commit, with no results and no .snakemake."""

    def __init__(self, folder: Path, suite: str) -> None:
        self.checkout = folder / "check out"
        listed = answer("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=REPOSITORY)
        for name in filter(None, listed.split("\0")):
            if (REPOSITORY / name).is_file():  # one that was deleted, but not yet in the index, is listed too
                (self.checkout / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(REPOSITORY / name, self.checkout / name)
        (self.checkout / f"tests/slurm/{suite}.yaml").rename(self.checkout / SUITE)
        self.results = self.checkout / "results" / yaml.safe_load((self.checkout / SUITE).read_text())["name"]
        plain = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
        self.environment = plain | {
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "LORAFUSION_SLURM_ACCOUNT": "lab",
            "LORAFUSION_SLURM_PARTITION": "long",
            "LORAFUSION_SLURM_POLL": "5",
        }

    def start(self, *targets: str, settings: Sequence[str] = (), **changes: str) -> Snakemake:
        """Start it as a user does; settings: others for --config; changes: of its environment."""
        return Snakemake(
            ["snakemake", *targets, "--cores", "all", "--profile", "slurm", "--config", f"suite={SUITE}", *settings],
            Path(tempfile.mkstemp(dir=self.checkout.parent, suffix=".log")[1]),
            cwd=self.checkout,
            env=self.environment | changes,
        )

    def rows(self) -> list[dict[str, str]]:
        """The rows of the table of measurements."""
        with (self.results / "measurements.csv").open(newline="") as file:
            return list(csv.DictReader(file))
