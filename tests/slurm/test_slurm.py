"""The slurm profile on a real, if toy, Slurm of two nodes on this machine: `make slurm-test`."""

import csv
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[1]
CLUSTER = HERE / "cluster.sh"
SUITE = "$(touch PWNED).yaml"

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(1200)]


def missing() -> str | None:
    """Why no cluster can be had on this machine, or None."""
    if not sys.platform.startswith("linux"):
        return "Slurm needs Linux"
    if os.geteuid() != 0:
        return "starting Slurm's daemons needs root"
    if not shutil.which("slurmctld") and not shutil.which("apt-get"):
        return "Slurm is not installed, and there is no apt-get to install it with"
    return None


@pytest.fixture(scope="session")
def cluster():
    """Two toy nodes. A cluster that cannot be had skips; one that does not come up fails."""
    if reason := missing():
        pytest.skip(reason)
    environment = os.environ | {"NODES": "2", "GPUS": "0"}
    started = subprocess.run([CLUSTER, "start"], env=environment, text=True, capture_output=True)
    if "left alone" in started.stderr:
        pytest.skip(started.stderr.strip())
    assert started.returncode == 0, started.stdout + started.stderr
    yield
    subprocess.run([CLUSTER, "stop"], env=environment, check=True)


def jobs() -> dict[str, tuple[str, str]]:
    """State and comment (rule and wildcards, where Snakemake submitted it) of every job, also of those that ended."""
    lines = subprocess.run(
        ["squeue", "--states=all", "--noheader", "--format=%i|%T|%k"], check=True, text=True, capture_output=True
    ).stdout.splitlines()
    return {job: (state, comment) for job, state, comment in (line.split("|") for line in lines)}


@pytest.fixture
def checkout(tmp_path):
    """A copy of what git would commit, with no results and no .snakemake. Its name and that of its suite have what a
    shell takes apart."""
    names = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=REPOSITORY,
        check=True,
        text=True,
        capture_output=True,
    ).stdout.split("\0")
    copy = tmp_path / "check out"
    for name in filter(None, names):
        if (REPOSITORY / name).is_file():  # a file that was deleted, but not yet in the index, is listed too
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(REPOSITORY / name, copy / name)
    (copy / "tests/slurm/suite.yaml").rename(copy / SUITE)
    return copy


def test_a_job_of_two_processes_runs_on_two_nodes(cluster, tmp_path):
    output = tmp_path / "out.txt"
    submitted = subprocess.run(
        ["sbatch", "--account=lab", "--parsable", "--wait", "--nodes=2", "--ntasks=2", f"--output={output}"],
        input="#!/bin/sh\nsrun --label sh -c 'echo rank $SLURM_PROCID of $SLURM_NTASKS on $SLURMD_NODENAME'\n",
        cwd=tmp_path,
        check=True,
        text=True,
        capture_output=True,
        timeout=60,
    )
    while (state := jobs()[submitted.stdout.strip()][0]) == "COMPLETING":  # its end is known before its nodes are free
        time.sleep(0.1)
    assert state == "COMPLETED"
    assert sorted(output.read_text().splitlines()) == [
        "0: rank 0 of 2 on toy1",
        "1: rank 1 of 2 on toy2",
    ]


def test_the_workflow_runs_through_the_slurm_profile(cluster, checkout):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment |= {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "LORAFUSION_SLURM_ACCOUNT": "lab",
        "LORAFUSION_SLURM_PARTITION": "long",
        "LORAFUSION_SLURM_POLL": "5",
    }
    before = jobs()
    command = ["snakemake", "--cores", "all", "--profile", "slurm", "--config", f"suite={SUITE}"]
    run = subprocess.run(command, cwd=checkout, env=environment, text=True, capture_output=True, timeout=1100)
    assert run.returncode == 0, (run.stdout + run.stderr)[-8000:]

    submitted = {job: state for job, (state, _) in jobs().items() if job not in before}
    assert submitted, "no job went through Slurm"
    assert set(submitted.values()) == {"COMPLETED"}

    tables = checkout.glob("results/*/measurements.csv")
    (table,) = [path for path in tables if path.parent.name not in ("paper", "reference")]
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows, f"{table} is empty"
    assert {row["status"] for row in rows} == {"ok"}, [row for row in rows if row["status"] != "ok"]
    assert any(float(row["gpus"] or 0) == 2 for row in rows), "no cell ran with two processes"
    assert any(float(row["gpus"] or 0) == 4 for row in rows), "no cell ran on two nodes"
    assert (table.parent / "report.html").stat().st_size > 0
    assert not list(checkout.rglob("PWNED"))
