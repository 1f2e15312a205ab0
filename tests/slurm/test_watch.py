"""What Slurm says of jobs that end badly or wait in vain, as Snakemake is told of it."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from lorafusion.lab.cluster.words import wait_of
from tests.lab.cluster.test_watch import Workflow
from tests.slurm.toy import answer, wait_until

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(300), pytest.mark.usefixtures("two_nodes")]

CONFIGURATION = Path("/etc/slurm/slurm.conf")  # the toy cluster's


def submit(script, *options):
    """Submit a script as the workflow submits jobs; returns the job's id."""
    words = ["--parsable", "--account=lab", "--partition=long", "--requeue", "--job-name=run-1", "--output=/dev/null"]
    return answer("sbatch", *words, "--comment=run a", *options, f"--wrap={script}").strip()


@pytest.fixture
def workflow(tmp_path, monkeypatch):
    """Its jobs are named as they are submitted here."""
    return Workflow(tmp_path / "results", monkeypatch)


@pytest.fixture
def short_limit():
    """Jobs of an account may take a minute."""
    of_account = ["sacctmgr", "--immediate", "modify", "account", "lab", "set"]
    answer(*of_account, "MaxWall=1")
    yield
    answer(*of_account, "MaxWall=-1")


def looked(workflow, jobs, seconds):
    """What Snakemake has been told of all of these jobs, looking every second."""
    workflow.active, said, end = [workflow.job(job) for job in jobs], {}, time.time() + seconds
    while workflow.active:
        said |= workflow.look()
        assert time.time() < end, (said, answer("squeue"))
        time.sleep(1)
    return said


def test_each_end_is_seen(workflow):
    jobs = [submit("true"), submit("exit 3"), submit("sleep 60"), submit("sleep 60", "--hold")]
    answer("scancel", *jobs[2:])
    said = looked(workflow, jobs, 60)
    done, failed, running, held = [said[job] for job in jobs]
    assert done == "success"
    assert "(run a): FAILED: its log says why" in failed
    assert "(run a): CANCELLED: somebody cancelled it" in running
    assert "(run a): CANCELLED: somebody cancelled it" in held


def test_a_job_that_waits_in_vain_is_ended_and_the_others_go_on(workflow, short_limit, capsys):
    long, other, held = submit("true", "--time=5"), submit("sleep 5", "--time=1"), submit("true", "--time=1", "--hold")
    workflow.active = [workflow.job(held)]
    workflow.look(1.0)
    assert "JobHeldUser; somebody holds it" in capsys.readouterr().out
    answer("scontrol", "release", held)
    said = looked(workflow, [long, other, held], 60)
    assert "cancelled, as AssocMaxWallDurationPerJobLimit does not pass" in said[long]
    assert (said[other], said[held]) == ("success", "success")


def test_what_the_partition_allows_no_more_is_not_waited_for(workflow):
    job = submit("true", "--begin=now+2", "--time=60")
    answer("scontrol", "update", "partitionname=long", "maxtime=10")
    try:
        said = looked(workflow, [job], 60)
    finally:
        answer("scontrol", "update", "partitionname=long", "maxtime=1-00:00:00")
    assert "cancelled, as PartitionTimeLimit does not pass" in said[job]


@pytest.fixture
def forgetful():
    """A cluster that forgets a job two seconds after its end."""
    usual, short = CONFIGURATION.read_text(), "MinJobAge=2\n"
    CONFIGURATION.write_text(usual.replace("MinJobAge=300\n", short))
    answer("scontrol", "reconfigure")
    yield
    CONFIGURATION.write_text(usual)
    answer("scontrol", "reconfigure")


@pytest.mark.usefixtures("forgetful")
def test_a_job_that_slurm_has_forgotten_ended_as_its_files_say(workflow):
    job, gone = submit("true"), submit("true")
    wait_until(lambda: not answer("squeue", "--noheader", "--states=all", "--name=run-1"), 60, "they are forgotten")
    (workflow.folder / f"{job}.key").write_text(f"key-{job}\n")
    said = looked(workflow, [job, gone], 30)
    assert said[job] == "success"
    assert "UNKNOWN: Slurm has forgotten it" in said[gone]


def test_nodes_that_are_down_are_waited_for(workflow):
    """Or drained, which they stay: a node that is said to be down is taken back when it tells of itself."""
    answer("scontrol", "update", "nodename=toy2", "state=drain", "reason=broken")
    try:
        job = submit("true", "--nodes=2")
        wait_until(lambda: "None" not in answer("squeue", "--noheader", "--format=%r", f"--jobs={job}"), 30, "a reason")
        reason = answer("squeue", "--noheader", "--format=%r", f"--jobs={job}").strip()
    finally:
        answer("scontrol", "update", "nodename=toy2", "state=resume")
    assert wait_of(reason).advice.startswith("nodes are down"), reason
    assert looked(workflow, [job], 60) == {job: "success"}


@pytest.mark.parametrize(
    ("table", "limit"), [(["account", "lab"], "GrpTRES=cpu={}"), (["qos", "normal"], "MaxTRESPerUser=cpu={}")]
)
def test_a_job_larger_than_all_that_may_be_in_use_at_once_is_ended(workflow, table, limit):
    """A smaller one waits until the limit lets it start."""
    words = ["sacctmgr", "--immediate", "modify", *table, "set"]
    answer(*words, limit.format(1))
    try:
        small, large = submit("sleep 2"), submit("true", "--cpus-per-task=2")
        said = looked(workflow, [small, large], 60)
    finally:
        answer(*words, limit.format(-1))
    assert said[small] == "success"
    assert "is all that may be in use at once; another `qos` or `partition`" in said[large]
