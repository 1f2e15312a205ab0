"""From a workload to a plan. No torch, no clock, no randomness; the integer programs are SciPy's HiGHS.

Every strategy is a function of (workload, system, stages, capacity, data_parallel) that returns a checked plan, or
raises `UserError` for an input that no plan can serve; `bounds` says how few microbatches any of them may need.
"""

from inspect import signature

from pydantic import BaseModel

from lorafusion.core.config import SystemConfig, read_system, require_possible
from lorafusion.core.plan import Plan
from lorafusion.core.plugins import load
from lorafusion.core.schema import UserError, one_of
from lorafusion.core.workload import Workload, content_hash
from lorafusion.planning.buckets import planned_with_buckets
from lorafusion.planning.completion import COMPLETION
from lorafusion.planning.simulator.costs import CostModel, even_costs

__all__ = ["COMPLETION", "STRATEGIES", "plan_key", "plan_system", "plan_workload"]

STRATEGIES = {
    "fast": "lorafusion.planning.fast:plan",
    "fewest": "lorafusion.planning.fast:fewest",  # the same, for few microbatches and not for time
    "paper": "lorafusion.planning.paper:plan",  # arXiv 2510.00206
    "ffd": "lorafusion.planning.first_fit:plan",  # its order, packed first-fit-decreasing
    "mlora": "baselines.mlora.planner:plan",  # packed, without BatchLoRA
    "sequential": "lorafusion.planning.sequential:plan",  # Megatron-LM, PEFT
}


def plan_system(
    workload: Workload,
    system: str,
    *,
    stages: int,
    capacity: int,
    data_parallel: int = 1,
    costs: CostModel | None = None,
    aim: str | None = None,
    graphs: bool = False,
    **options: object,
) -> Plan:
    """A checked plan by the planner of a system of configs/systems.yaml, with its entry's options and those given.
    costs: of the stages, and aim: one of `completion.AIMS`, for a planner that takes them. graphs: with buckets, for
    stages that replay graphs.

    Raises `UserError` for an unknown system, and as its planner does."""
    entry = read_system(system)
    require_possible(system, entry, stages, data_parallel)
    if graphs:
        if entry.no_graphs:
            raise UserError(f"plan: system {system} has no graphs, {entry.no_graphs}")
        costs = (costs or even_costs(stages)).captured()
    chosen = planner_options(entry, costs, aim) | options

    def planned(by: CostModel | None) -> Plan:
        given = chosen | {"costs": by} if "costs" in chosen else chosen
        return load(entry.planner, "planner")(workload, system, stages, capacity, data_parallel, **given)

    plan = planned_with_buckets(planned, workload, costs) if graphs and costs else planned(costs)
    return plan.model_copy(update={"key": plan_key(plan, entry.planner, chosen)})


def planner_options(entry: SystemConfig, costs: CostModel | None, aim: str | None = None) -> dict[str, object]:
    """The keyword arguments of a system's planner: its entry's options, and of costs and aim those that it takes."""
    accepted, given = signature(load(entry.planner, "planner")).parameters, {"costs": costs, "aim": aim}
    return entry.options | {name: value for name, value in given.items() if name in accepted and value is not None}


def plan_workload(
    workload: Workload,
    strategy: str = "fast",
    *,
    stages: int,
    capacity: int,
    data_parallel: int = 1,
    system: str | None = None,
    costs: CostModel | None = None,
    aim: str | None = None,
) -> Plan:
    """A checked plan by the strategy of that name. system: the plan's name for it, by default the strategy's. costs: of
    the stages, and aim: one of `completion.AIMS`, which only `fast` uses. Raises `UserError` for an unknown strategy,
    for sizes below 1, and as its planner does."""
    one_of("strategy", strategy, set(STRATEGIES), "plan")
    for name, value in (("stages", stages), ("capacity", capacity), ("data_parallel", data_parallel)):
        if value < 1:
            raise UserError(f"plan: {name} must be at least 1, found {value}")
    given = {"costs": costs, "aim": aim} if strategy == "fast" else {}
    options = {name: value for name, value in given.items() if value is not None}
    planner = load(STRATEGIES[strategy], "planner")
    return planner(workload, system or strategy, stages, capacity, data_parallel, **options)


def plan_key(plan: Plan, planner: str, options: dict[str, object]) -> str:
    """Changes with anything that a plan is made from, and with the plan itself. planner: its import path; options: its
    keyword arguments."""
    plain = {name: value.model_dump(mode="json") if isinstance(value, BaseModel) else value
             for name, value in options.items()}  # fmt: skip
    return content_hash([planner, plain, plan.content_hash])
