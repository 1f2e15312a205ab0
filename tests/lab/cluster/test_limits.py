"""Whether a job is larger than all that may be in use at once, from answers as Slurm 22.05 gives them."""

from __future__ import annotations

import pytest

from lorafusion.lab.cluster.limits import excess, read_tres
from lorafusion.lab.cluster.queue import Job

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
        "--noheader --parsable2 show assoc where account=lab format=user,GrpTRES",
    ]


def test_where_accounts_are_not_shown_a_job_waits(accounts, slurm):
    slurm.program("sacctmgr", "echo 'sacctmgr: error: Access denied' >&2; exit 1")
    assert excess(Job("7", "PENDING", "", "QOSGrpGRES", "")) == ""


def test_memory_is_in_megabytes():
    assert read_tres("cpu=4,mem=1.5G,gres/gpu:h100=2") == {"cpu": 4, "mem": 1536, "gres/gpu:h100": 2}
    assert read_tres("mem=3000M") == read_tres("mem=3000") == {"mem": 3000}
    assert read_tres("") == read_tres("N/A") == {}
