"""What Slurm's words for a job mean: every reason to wait that Slurm 22.05 has, as its library lists them."""

from __future__ import annotations

import math

import pytest

from lorafusion.lab.cluster.words import BUSY, ENDS, HELD_SECONDS, TOGETHER, WAITING, wait_of

PASS = """
None Priority Resources BeginTime Licenses Dependency SchedDefer Cleaning Prolog FedJobLock JobArrayTaskLimit
BurstBufferResources BurstBufferStageIn BurstBufferOperation
"""
ARE_SHARED = """
AssocGrpCpuLimit AssocGrpCPUMinutesLimit AssocGrpJobsLimit AssocGrpGRES AssocGrpMemRunMinutes AssocGrpWallLimit
AssocGrpBillingMinutes AssocMaxJobsLimit AssocMaxSubmitJobLimit AssociationJobLimit AssociationResourceLimit
AssociationTimeLimit QOSGrpCpuLimit QOSGrpGRES QOSGrpMemoryMinutes QOSGrpNodeLimit QOSGrpWallLimit QOSJobLimit
QOSResourceLimit QOSTimeLimit QOSUsageThreshold QOSMaxCpuPerUserLimit QOSMaxGRESPerUser QOSMaxJobsPerUserLimit
QOSMaxMemoryPerUser QOSMaxNodePerUserLimit QOSMaxSubmitJobPerUserLimit MaxCpuPerAccount MaxGRESPerAccount
MaxJobsPerAccount MaxNodePerAccount MaxSubmitJobsPerAccount AccountingPolicy
"""
PASS_WITH_HELP = """
PartitionDown PartitionInactive ReqNodeNotAvail NodeDown FrontEndDown Reservation
"""
NEVER_PASS = """
PartitionTimeLimit PartitionNodeLimit PartitionConfig MaxMemPerLimit BadConstraints ReservationDeleted
DependencyNeverSatisfied JobHoldMaxRequeue JobLaunchFailure AccountNotAllowed QOSNotAllowed InvalidAccount InvalidQOS
AssocMaxWallDurationPerJobLimit AssocMaxCpuPerJobLimit AssocMaxCpuMinutesPerJobLimit AssocMaxCpuPerNode
AssocMaxGRESPerJob AssocMaxGRESPerNode AssocMaxGRESMinutesPerJob AssocMaxMemPerJob AssocMaxMemPerNode
AssocMaxNodePerJobLimit AssocMaxNodeMinutesPerJob AssocMaxBillingPerJob QOSMaxWallDurationPerJobLimit
QOSMaxCpuPerJobLimit QOSMaxCpuMinutesPerJobLimit QOSMaxCpuPerNode QOSMaxGRESPerJob QOSMaxGRESPerNode
QOSMaxGRESMinutesPerJob QOSMaxMemoryPerJob QOSMaxMemoryPerNode QOSMaxNodePerJobLimit QOSMinCpuNotSatisfied QOSMinGRES
QOSMinMemory QOSMinNode
"""


@pytest.mark.parametrize("reason", PASS.split())
def test_a_busy_cluster_is_waited_for(reason):
    assert wait_of(reason) == BUSY


@pytest.mark.parametrize("reason", ARE_SHARED.split())
def test_a_limit_on_jobs_together_passes_as_others_end(reason):
    assert wait_of(reason) == (math.inf, TOGETHER)


@pytest.mark.parametrize("reason", [*PASS_WITH_HELP.split(), "ReqNodeNotAvail, UnavailableNodes:toy[1-2]",
    "Nodes required for job are DOWN, DRAINED or reserved for jobs in higher priority partitions",
    "Nodes_required_for_job_are_DOWN,_DRAINED_or_reserved_for_jobs_in_higher_priority_partitions"])  # fmt: skip
def test_what_administrators_have_to_do_is_waited_for_with_advice(reason):
    wait = wait_of(reason)
    assert math.isinf(wait.seconds)
    assert "see" in wait.advice or "reservation" in wait.advice


@pytest.mark.parametrize("reason", [*NEVER_PASS.split(), "launch failed requeued held", "launch_failed_requeued_held",
                                    "(PartitionTimeLimit)"])  # fmt: skip
def test_what_never_passes_is_not_waited_for(reason):
    wait = wait_of(reason)
    assert wait.seconds == 0
    assert wait.advice


@pytest.mark.parametrize("reason", ["JobHeldUser", "JobHeldAdmin", "job requeued in held state"])
def test_who_holds_a_job_has_time_to_let_it_go(reason):
    assert wait_of(reason).seconds == HELD_SECONDS
    assert "scontrol release" in wait_of(reason).advice


def test_a_reason_of_a_newer_slurm_is_waited_for():
    assert wait_of("WaitingForTheMoon") == BUSY


def test_a_state_that_is_not_known_is_no_end():
    running = ["RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "SIGNALING", "STAGE_OUT", "RESIZING", "EXPEDITING"]
    assert not {*running, *WAITING, "CANCELLED by 1000"} & set(ENDS)
