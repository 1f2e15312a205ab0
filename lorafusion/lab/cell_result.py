"""The result of a cell's run: what it is of, what was measured, and beside it what the simulator says of its plan."""

from dataclasses import replace
from typing import Any

from lorafusion.core.config import SystemConfig
from lorafusion.core.plan import Plan
from lorafusion.core.workload import Workload
from lorafusion.lab.keys import CellFiles
from lorafusion.lab.table.result import result_of, row
from lorafusion.launch.outcome import Outcome
from lorafusion.planning.simulator import costs_of, simulate
from lorafusion.planning.simulator.choice import costs_for

BY_FLOP = "costs: by the model's FLOP, as no profile is of it and this machine; see lorafusion lab profile-costs"


def result_of_cell(
    files: CellFiles, outcome: Outcome, workload: Workload, plan: Plan | None, repeat: int, provenance: dict[str, Any]
) -> dict[str, Any]:
    """The content of the result file of a cell's run, however it ended; with a predicted time if it ended well."""
    cell = description(files, workload, plan, repeat)
    result = result_of(outcome, workload, plan, cell, provenance, schedule_of(files.system))
    if plan and result["status"] == "ok":
        result["metrics"].append(predicted_row(files, plan, workload, provenance.get("gpu_name")))
    return result


def description(files: CellFiles, workload: Workload, plan: Plan | None, repeat: int) -> dict:
    """The identity and the parameters of a run, as columns of the measurement table. plan: None where there is none."""
    suite, cell = files.suite, files.cell
    ranks, dropouts = {job.rank for job in workload.jobs}, {job.dropout for job in workload.jobs}
    return {
        "suite": suite.name,
        "kind": "measured",
        "cell": cell.name,
        "system": cell.system,
        "model": cell.model,
        "workload": cell.workload,
        "gpus": cell.gpus,
        "repeat": repeat,
        "implementation": files.system.lora.rpartition(":")[2],
        "adapters": len(workload.jobs),
        # Mixed ranks or dropouts have no one number; the workload file has them all.
        "rank": ranks.pop() if len(ranks) == 1 else None,
        "dropout": dropouts.pop() if len(dropouts) == 1 else None,
        "dtype": suite.dtype,
        "stages": cell.stages,
        "global_batch": cell.grid.global_batch,
        "capacity": plan.capacity if plan else None,
        "merged_qkv": cell.grid.merged_qkv,
        "samples": cell.grid.samples,
        "seed": suite.seed,
    }


def schedule_of(system: SystemConfig) -> str | None:
    """The simulator's schedule of a system's executor; None where the plan says it."""
    return "sharded" if system.shard else None


def predicted_row(files: CellFiles, plan: Plan, workload: Workload, gpu_name: str | None = None) -> dict[str, Any]:
    """The row of a run's predicted time: by the profile of the suite's machine or of the GPU, if configs/machines has
    one, else by the model's FLOP."""
    costs = costs_for(replace(files.question, gpu_name=gpu_name))
    by_flop = costs == costs_for(replace(files.question, machine=None))
    note = BY_FLOP if by_flop else f"costs: profile of {files.suite.machine or gpu_name}"
    seconds = simulate(plan, costs_of(plan, workload, costs), schedule_of(files.system)).makespan
    return row("time", seconds, "whole", {"kind": "simulated"}, note=note)
