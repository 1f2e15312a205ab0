"""From a plan and a cost model to a timeline: when each stage computes what, and how long it waits.

`costs` says what an operation costs, `schedules` in which order a stage does them, `timeline` when that happens and
what follows from it, `trace` writes it for Perfetto. Pure Python and NumPy: no torch, no clock, no randomness.
"""

from __future__ import annotations

from pathlib import Path

from lorafusion.core.config import read_model
from lorafusion.core.plan import Plan
from lorafusion.core.schema import UserError
from lorafusion.core.workload import Workload
from lorafusion.planning.simulator.costs import CostModel, Costs, costs_of, even_costs, model_costs, read_cost_model
from lorafusion.planning.simulator.schedules import SCHEDULES, simulate
from lorafusion.planning.simulator.timeline import Timeline

__all__ = ["SCHEDULES", "CostModel", "Costs", "Timeline", "chosen_costs", "costs_of", "even_costs", "model_costs",
           "read_cost_model", "simulate", "simulate_plan"]  # fmt: skip


def chosen_costs(stages: int, model: str | None = None, costs: str | Path | None = None) -> CostModel:
    """The costs of a model of configs/models, or of a file with a cost model, else of stages of equal size."""
    if model and costs:
        raise UserError("either a model or a file with costs, found both")
    if model:
        return model_costs(read_model(model), stages)
    if not costs:
        return even_costs(stages)
    read = read_cost_model(costs)
    if read.stages != stages:
        raise UserError(f"{costs}: {read.stages} stages, expected {stages}")
    return read


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
    chosen = chosen_costs(plan.stages, model, costs)
    if (model or costs) and workload is None:
        raise UserError("the costs of a model need the plan's workload, for the lengths of its samples")
    return simulate(plan, costs_of(plan, workload, chosen), schedule, workload), "s" if model or costs else "units"
