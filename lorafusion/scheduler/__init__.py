"""From a workload to a plan. Pure Python and NumPy: no torch, no clock, no randomness.

Every strategy is a function `plan(workload, system, stages, capacity, data_parallel)` that returns a checked plan, or
raises `UserError` for an input that no plan can serve; `bounds` says how few microbatches any of them may need.
"""

from __future__ import annotations

from lorafusion.errors import one_of
from lorafusion.imports import load
from lorafusion.plan import Plan
from lorafusion.workload import Workload

STRATEGIES = {
    "fast": "lorafusion.scheduler.fast:plan",  # the default
    "fewest": "lorafusion.scheduler.fast:fewest",  # the same, for few microbatches and not for time
    "paper": "lorafusion.scheduler.paper:plan",  # arXiv 2510.00206
    "ffd": "lorafusion.scheduler.first_fit:plan",  # its order, packed first-fit-decreasing
    "mlora": "lorafusion.scheduler.round_robin:plan",
    "sequential": "lorafusion.scheduler.sequential:plan",  # Megatron-LM, PEFT
}


def plan_workload(
    workload: Workload,
    strategy: str = "fast",
    *,
    stages: int,
    capacity: int,
    data_parallel: int = 1,
    system: str | None = None,
) -> Plan:
    """A checked plan by the strategy of that name; system: the plan's name for it, by default the strategy's."""
    one_of("strategy", strategy, set(STRATEGIES), "plan")
    return load(STRATEGIES[strategy], "planner")(workload, system or strategy, stages, capacity, data_parallel)
