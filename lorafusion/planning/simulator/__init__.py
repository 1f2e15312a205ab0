"""From a plan and a cost model to a timeline: when each stage computes what, and how long it waits.

`costs` says what an operation costs, `profile` what was measured of that, and `choice` which costs a plan uses.
`schedules` says in which order a stage does them, `timeline` when that happens and what follows from it. `trace` writes
it for Perfetto. Pure Python and NumPy: no torch, no clock, no randomness.
"""

from pathlib import Path

from lorafusion.core.plan import Plan
from lorafusion.core.schema import UserError
from lorafusion.core.workload import Workload
from lorafusion.planning.simulator.choice import Question, chosen_costs, costs_for
from lorafusion.planning.simulator.costs import CostModel, Costs, costs_of, even_costs, model_costs, read_cost_model
from lorafusion.planning.simulator.schedules import SCHEDULES, simulate
from lorafusion.planning.simulator.timeline import Timeline

__all__ = ["SCHEDULES", "CostModel", "Costs", "Question", "Timeline", "chosen_costs", "costs_for", "costs_of",
           "even_costs", "model_costs", "read_cost_model", "simulate", "simulate_plan"]  # fmt: skip


def simulate_plan(
    plan: Plan,
    workload: Workload | None,
    model: str | None = None,
    costs: str | Path | None = None,
    schedule: str | None = None,
) -> tuple[Timeline, str]:
    """A plan's timeline, and the unit of its times: seconds by the costs of a model of configs/models or of a file with
    a cost model; else units of a token's forward on a stage, all stages equal, and without attention where there is no
    workload to tell the samples' lengths."""
    jobs = workload.jobs if workload else ()
    chosen = chosen_costs(plan.stages, model, costs, plan.data_parallel, jobs)
    if (model or costs) and workload is None:
        raise UserError("the costs of a model need the plan's workload, for the lengths of its samples")
    return simulate(plan, costs_of(plan, workload, chosen), schedule, workload), "s" if model or costs else "units"
