"""What Slurm's words for a job mean: which states are an end, and which reasons to wait never pass by themselves."""

import math
import re
from typing import NamedTuple

# How a job has ended, and what to do then. Every other state, also one that a newer Slurm adds, may still change.
ENDS = {
    "COMPLETED": "its result is missing",
    "FAILED": "its log says why",
    "TIMEOUT": "it took longer than it may; more `minutes` in the suite",
    "OUT_OF_MEMORY": "it needs more of the host's memory; a larger `memory_gb` in the suite",
    "CANCELLED": "somebody cancelled it; start the workflow again",
    "PREEMPTED": "it had to give way to another job; start the workflow again",
    "NODE_FAIL": "its node was lost; start the workflow again",
    "BOOT_FAIL": "its node did not start; start the workflow again",
    "LAUNCH_FAILED": "its node could not start it; start the workflow again",
    "DEADLINE": "its deadline has passed",
    "REVOKED": "another cluster of the federation took it; `--clusters` in `extra` names this one",
    "UNKNOWN": "Slurm has forgotten it, and its result is missing; start the workflow again",
}
# A job that waits for nodes, or for somebody to let it go.
WAITING = ("PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT", "RESV_DEL_HOLD")

LIMIT = "it asks for more than its account or QOS may have; less of it, or another `qos` or `partition`"
LONG = "jobs have to be shorter; a smaller `group_minutes`, less `minutes`, or another `qos` or `partition`"
TOGETHER = "all that its account or QOS may have is in use; a job larger than that never starts: `sacctmgr show qos`"


class Wait(NamedTuple):
    """What becomes of a job that waits. seconds: how long it may, for ever if the wait passes; advice: what to do."""

    seconds: float
    advice: str


HELD_SECONDS = 3600.0  # for whoever has held a job on purpose to let it go
BUSY = Wait(math.inf, "the cluster is busy")
# By a pattern of the whole reason; the first that fits counts. What fits none is the wait of a busy cluster.
WAITS = {
    r"PartitionTimeLimit|(Assoc|QOS)MaxWallDurationPerJobLimit": Wait(0, LONG),
    r"PartitionNodeLimit|PartitionConfig|MaxMemPerLimit": Wait(
        0, "the partition allows less; see `scontrol show partition`"
    ),
    r"(Assoc|QOS)Max.*Per(Job|Node)(Limit)?|QOSMin.*": Wait(0, LIMIT),
    r"AccountNotAllowed|QOSNotAllowed|InvalidAccount|InvalidQOS": Wait(
        0, "the account or QOS may not be used here any more; see `sacctmgr show assoc`"
    ),
    r"BadConstraints": Wait(0, "no nodes have what it asks for; `constraint`, `gpu_type` or another `partition`"),
    r"ReservationDeleted": Wait(0, "its reservation is gone; another `reservation`, or none"),
    r"DependencyNeverSatisfied": Wait(0, "what it depends on has failed; leave `--dependency` out of `extra`"),
    r"JobHoldMaxRequeue|JobLaunchFailure|.* failed requeued held": Wait(
        0, "a node could not start it; see `sinfo -R`, then start the workflow again"
    ),
    r".*[Hh]eld.*": Wait(HELD_SECONDS, "somebody holds it; `scontrol release` lets it go"),
    r"PartitionDown|PartitionInactive": Wait(math.inf, "the partition is closed; see `sinfo`"),
    r"ReqNodeNotAvail.*|.*DOWN, DRAINED.*|NodeDown|FrontEndDown": Wait(
        math.inf, "nodes are down or reserved; see `sinfo -R` and `scontrol show reservation`"
    ),
    r"Reservation": Wait(math.inf, "its reservation has not begun, or is full"),
    r"(Assoc|QOS)(Grp|Max).*|Max.*Per(Account|User)|Association.*|QOS.*Limit|QOSUsageThreshold|AccountingPolicy": Wait(
        math.inf, TOGETHER
    ),
}


def wait_of(reason: str) -> Wait:
    """What becomes of a job that waits for a reason, as squeue or scontrol writes it."""
    plain = reason.strip("()").replace("_", " ")
    return next((wait for pattern, wait in WAITS.items() if re.fullmatch(pattern, plain)), BUSY)


def never_passes(reason: str) -> bool:
    """Will a job never start that waits for this reason?"""
    return wait_of(reason).seconds == 0
