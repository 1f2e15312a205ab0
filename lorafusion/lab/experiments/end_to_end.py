"""Run one cell of a suite, once: from its settings to its result file."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

from lorafusion.core.config import SystemConfig, names_in
from lorafusion.core.machine import provenance
from lorafusion.core.plan import Plan
from lorafusion.core.schema import UserError
from lorafusion.core.workload import Workload
from lorafusion.lab.experiments.experiment import (
    MARGIN,
    NO_INPUTS,
    Experiment,
    Inputs,
    Point,
    Resources,
    is_path,
    require_device,
)
from lorafusion.lab.keys import CellFiles, suite_files
from lorafusion.lab.suite import Cell, Suite, step_command, suite_path
from lorafusion.lab.table.result import result_of, write_result
from lorafusion.launch.launch import launch
from lorafusion.launch.outcome import Outcome
from lorafusion.launch.spec import RunSpec

TRAIN_WITH_COST = "lorafusion.lab.cost:train_with_cost"


class EndToEnd(Experiment):
    """Whole trainings of every system of a suite, by its grid of cells."""

    name = "end_to_end"
    folder = ""

    def points(self, suite: str) -> list[Point]:
        if not is_path(suite) and suite not in names_in("suites"):
            return []
        path = suite_path(suite)
        return [
            Point(files.suite.name, str(path), name, files.suite.repeats, files.suite, files)
            for name, files in suite_files(path).items()
        ]

    def key(self, point: Point) -> str:
        return point.subject.configuration

    def resources(self, point: Point) -> Resources:
        cell, suite = point.subject.cell, point.settings
        here = min(cell.gpus, suite.gpus_per_node)
        return Resources(
            minutes=cell.grid.minutes + MARGIN,
            memory_mb=1000 * cell.grid.memory_gb,
            cpus=here,
            gpus=here if suite.device == "cuda" else 0,
            nodes=-(-cell.gpus // suite.gpus_per_node),
        )

    def run(self, point: Point, repeat: int, out: Path, log: Path | None, inputs: Inputs = NO_INPUTS) -> str:
        return run_cell(Path(point.source), point.name, inputs.workload, inputs.plan, out, repeat, inputs.nodes, log,
                        inputs.tuned, inputs.launch or launch)  # fmt: skip


def run_cell(
    suite_path: Path,
    name: str,
    workload_path: Path,
    plan_path: Path | None,
    out: Path,
    repeat: int,
    nodes: int,
    log: Path | None,
    tuned_path: Path | None = None,
    launch: Callable[..., Outcome] = launch,
) -> str:
    """Run a cell and write its result; returns the status. Raises `UserError` for input that no run can use, or that
    was not made for this cell.

    A cell that cannot be run by what is built (`unavailable`) needs no plan and has the status `skipped`.
    """
    files = cell_files(suite_path, name)
    suite, cell, system = files.suite, files.cell, files.system
    require_device(suite, suite_path)
    workload, reason = files.workload(workload_path), unavailable(system)
    plan = None if reason else files.plan(plan_path, files.tuned(tuned_path))
    origin = provenance(suite.device) | {
        "config_hash": files.configuration,
        "workload_hash": workload.content_hash,
        "plan_hash": plan.content_hash if plan else None,
        "seed": suite.seed,
        "started_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "log": str(log) if log else None,
        "command": step_command(suite_path, out),
    }
    if plan is None:
        outcome = Outcome("skipped", reason)
    else:
        spec = spec_of(cell, suite, workload_path).model_copy(update={"plan": str(plan_path)})
        spec = spec.model_copy(update={"task": TRAIN_WITH_COST}) if suite.cost else spec
        # Named by the job, so that reports of a killed attempt are not taken for this one's.
        job = os.environ.get("SLURM_JOB_ID", "local")
        shared = out.with_name(f"{out.name}.reports-{job}") if nodes > 1 else None
        outcome = launch(spec, cell.gpus, 60 * cell.grid.minutes, nodes, shared)
        if int(os.environ.get("SLURM_NODEID", 0)) > 0:
            return f"{outcome.status}; the first node writes the result"
        if shared:
            shutil.rmtree(shared)
    result = result_of(outcome, workload, plan, description(suite, cell, workload, system, plan, repeat), origin)
    write_result(out, result)
    return describe(result)


def spec_of(cell: Cell, suite: Suite, workload_path: Path) -> RunSpec:
    """What a worker is told for a cell, but for the plan."""
    return RunSpec(
        system=cell.system,
        model=cell.model,
        workload=str(workload_path),
        device=suite.device,
        dtype=suite.dtype,
        adapter_dtype=suite.adapter_dtype,
        seed=suite.seed,
        checkpointing=float(cell.grid.checkpointing),
    )


def unavailable(system: SystemConfig) -> str:
    """Why nothing installed here can run a system; empty if it can be run."""
    if not system.requires:
        return ""
    try:
        spec = importlib.util.find_spec(system.requires)
    except ModuleNotFoundError:  # the package that it is a part of
        spec = None
    return "" if spec else f"the package {system.requires} is not installed"


def describe(result: dict) -> str:
    return f"{result['status']} ({result['note']})" if result["note"] else result["status"]


def cell_files(suite_path: Path, name: str) -> CellFiles:
    """The files of a cell of a suite, by its name."""
    every = suite_files(suite_path)
    if name in every:
        return every[name]
    raise UserError(f"{suite_path}: no cell {name!r}; `lorafusion lab list {suite_path} run` lists them")


def description(
    suite: Suite, cell: Cell, workload: Workload, system: SystemConfig, plan: Plan | None, repeat: int
) -> dict:
    """The identity and the parameters of a run, as columns of the measurement table. plan: None where there is none."""
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
        "implementation": system.lora.rpartition(":")[2],
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
