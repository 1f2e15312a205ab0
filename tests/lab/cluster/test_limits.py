"""Whether a job is larger than all that may be in use at once, from answers as Slurm 22.05 gives them."""

from __future__ import annotations

import math

import pytest

from lorafusion.lab.cluster.limits import excess, minutes_by_accounts, read_tres
from lorafusion.lab.cluster.queue import Job
from lorafusion.lab.cluster.request import Resources
from lorafusion.lab.cluster.site import Site

JOB = (
    "JobId=7 JobName=run-1 UserId=ann(1000) GroupId=ann(1000) Priority=1 Account=lab QOS=normal JobState=PENDING "
    "Reason=QOSMaxGRESPerUser Dependency=(null) Partition=gpu NodeList= NumNodes=2 NumCPUs=16 NumTasks=2 "
    "TRES=cpu=16,mem=3000M,node=2,billing=16,gres/gpu=8 Socks/Node=*"
)


@pytest.fixture
def accounts(slurm):
    """Sets what sacctmgr answers."""
    slurm.program(
        "scontrol", f'case "$*" in *partition*) echo "PartitionName=gpu QoS=part MaxTime=1";; *) echo "{JOB}";; esac'
    )

    def answers(*lines):
        slurm.program("sacctmgr", "".join(f"echo '{line}'\n" for line in lines))

    return answers


@pytest.mark.parametrize(
    ("reason", "lines", "larger"),
    [
        ("QOSMaxGRESPerUser", ["gres/gpu=4"], "gres/gpu=8, and 4 is all"),
        ("QOSMaxGRESPerUser", ["gres/gpu=8"], ""),
        ("QOSMaxGRESPerUser", ["gres/gpu=4", "cpu=100,gres/gpu=16"], ""),  # the partition's QOS comes first
        ("QOSMaxGRESPerUser", ["cpu=1"], ""),
        ("QOSMaxGRESPerUser", [""], ""),
        ("QOSMaxCpuPerUserLimit", ["cpu=15"], "cpu=16, and 15 is all"),
        ("QOSGrpNodeLimit", ["node=1"], "node=2, and 1 is all"),
        ("QOSGrpMemLimit", ["mem=2G"], "mem=3000, and 2048 is all"),
        ("MaxGRESPerAccount", ["gres/gpu=4"], "gres/gpu=8, and 4 is all"),
        ("AssocGrpGRES", ["|gres/gpu=4", "ann|", "bob|gres/gpu=64"], "gres/gpu=8, and 4 is all"),
        ("AssocGrpGRES", ["|", "ann|gres/gpu=4"], "gres/gpu=8, and 4 is all"),
        ("AssocGrpCpuLimit", ["|cpu=16"], ""),
        ("AssocGrpCPUMinutesLimit", ["|cpu=1"], ""),
        ("QOSMaxJobsPerUserLimit", ["cpu=1"], ""),
        ("Priority", ["cpu=1"], ""),
    ],
)
def test_a_job_is_compared_with_the_limit_that_it_waits_for(accounts, reason, lines, larger):
    accounts(*lines)
    assert larger in excess(Job("7", "PENDING", "", reason, ""))
    assert bool(larger) == bool(excess(Job("7", "PENDING", "", reason, "")))


def test_the_limits_of_the_jobs_qos_and_of_its_partitions_are_asked_for(accounts, slurm):
    accounts("")
    excess(Job("7", "PENDING", "", "QOSGrpGRES", ""))
    excess(Job("7", "PENDING", "", "AssocGrpGRES", ""))
    assert slurm.calls("sacctmgr") == [
        "--noheader --parsable2 show qos where name=normal,part format=GrpTRES",
        "--noheader --parsable2 show assoc where account=lab format=User,GrpTRES",
    ]


def test_where_accounts_are_not_shown_a_job_waits(accounts, slurm):
    slurm.program("sacctmgr", "echo 'sacctmgr: error: Access denied' >&2; exit 1")
    assert excess(Job("7", "PENDING", "", "QOSGrpGRES", "")) == ""


# User, DefaultQOS, MaxWall, GrpWall, MaxTRESMins, GrpTRESMins, GrpTRESRunMins; of a QOS without the first two, and two
# of its users at the end.
FREE, FREE_QOS = "|normal|||||", "||||||"


@pytest.mark.parametrize(
    ("assoc", "qos", "minutes"),
    [
        ([FREE, "ann|normal|||||", "bob|normal|00:01:00||||"], [FREE_QOS], math.inf),
        pytest.param([FREE, "ann|normal|02:00:00||||"], [FREE_QOS], 120, id="one-of-a-user"),
        (["||1-00:00:00||||", "ann|normal|||||"], ["04:00:00||||||", FREE_QOS], 240),
        ([FREE, "ann||||||"], ["|5:00:00|||||"], 300),
        ([FREE, "ann|normal|||cpu=800||"], [FREE_QOS], 100),
        ([FREE], ["||gres/gpu=400,cpu=8000||||"], 200),
        ([FREE], ["||||mem=100G||"], 102400 / 1000),
        ([FREE], ["|||||node=60|node=50"], 50),
        (["||||||gres/gpu=100"], ["08:00:00||||||"], 50),
        ([FREE], ["||billing=1||||"], math.inf),
    ],
)
def test_the_longest_job_is_that_of_the_smallest_limit(slurm, monkeypatch, assoc, qos, minutes):
    """Of two GPUs, eight cores and 1000 MB."""
    monkeypatch.setenv("LOGNAME", "ann")
    for name, lines in (("assoc", assoc), ("qos", qos), ("user", ["lab"])):
        (slurm.folder / name).write_text("".join(f"{line}\n" for line in lines))
    slurm.program("sacctmgr", 'cat "$4"')
    slurm.program("scontrol", 'echo "PartitionName=$4 QoS=N/A MaxTime=1"')
    assert minutes_by_accounts(Site(partition="gpu"))(Resources(5, 1000, gpus=2)) == minutes


def test_the_accounts_and_qos_of_a_site_are_asked_for(slurm, monkeypatch):
    monkeypatch.setenv("LOGNAME", "ann")
    slurm.program(
        "sacctmgr", f"case $4 in user) echo lab;; assoc) echo 'ann|high|||||';; qos) echo '{FREE_QOS}';; esac"
    )
    slurm.program("scontrol", 'echo "PartitionName=$4 QoS=of-$4 MaxTime=1"')
    minutes_by_accounts(Site())
    minutes_by_accounts(Site(account="a", qos="q", partition="gpu,big"))
    asked = [
        call.partition(" format=")[0].removeprefix("--noheader --parsable2 show ") for call in slurm.calls("sacctmgr")
    ]
    assert asked == [
        "user where name=ann", "assoc where account=lab", "qos where name=high",
        "assoc where account=a", "qos where name=q,of-gpu,of-big",
    ]  # fmt: skip


def test_where_no_accounts_are_kept_a_job_is_as_long_as_it_likes(slurm):
    slurm.program(
        "sacctmgr", "echo 'sacctmgr: error: You are not running a supported accounting_storage plugin' >&2; exit 1"
    )
    assert minutes_by_accounts(Site(account="lab"))(Resources(5, 1000)) == math.inf


def test_memory_is_in_megabytes():
    assert read_tres("cpu=4,mem=1.5G,gres/gpu:h100=2") == {"cpu": 4, "mem": 1536, "gres/gpu:h100": 2}
    assert read_tres("mem=3000M") == read_tres("mem=3000") == {"mem": 3000}
    assert read_tres("") == read_tres("N/A") == {}
