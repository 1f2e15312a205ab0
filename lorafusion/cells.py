"""Run one cell of a suite, once: from its settings to its result file."""

from __future__ import annotations

import importlib.util
import os
import shlex
import shutil
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

from lorafusion.config import Cell, Suite, SystemConfig, cells, read_model, read_suite, read_systems
from lorafusion.errors import UserError
from lorafusion.measure.environment import has_gpu, provenance
from lorafusion.plan import Plan, check
from lorafusion.runtime.launch import Outcome, launch
from lorafusion.runtime.result import result_of, write_result
from lorafusion.runtime.spec import RunSpec
from lorafusion.workload import Workload, content_hash


def run_cell(
    suite_path: Path,
    name: str,
    workload_path: Path,
    plan_path: Path | None,
    out: Path,
    repeat: int,
    nodes: int,
    log: Path | None,
    launch: Callable[..., Outcome] = launch,
) -> str:
    """Run a cell and write its result; returns the status. Raises `UserError` for input that no run can use.

    A cell that cannot be run by what is built (`unavailable`) needs no plan and has the status `skipped`.
    """
    suite = read_suite(suite_path)
    cell = find_cell(suite, name, suite_path)
    system = read_systems()[cell.system]
    workload = Workload.read(workload_path)
    reason = unavailable(system)
    plan = None if reason else read_plan(plan_path, workload)
    require_device(suite, suite_path)
    require_the_cells_own(cell, workload, workload_path, plan, plan_path)
    origin = provenance(suite.device) | {
        "config_hash": config_hash(suite, cell, system),
        "workload_hash": workload.content_hash,
        "plan_hash": plan.content_hash if plan else None,
        "seed": suite.seed,
        "started_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "log": str(log) if log else None,
        "command": shlex.join(["lorafusion", *sys.argv[1:]]),
    }
    if plan is None:
        outcome = Outcome("skipped", reason)
    else:
        spec = spec_of(cell, suite, workload_path).model_copy(update={"plan": str(plan_path)})
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
        checkpointing=cell.grid.checkpointing,
    )


def unavailable(system: SystemConfig) -> str:
    """Why nothing installed here can run a system; empty if it can be run."""
    if not system.requires:
        return ""
    try:
        found = importlib.util.find_spec(system.requires)
    except ModuleNotFoundError:  # the package that it is a part of
        found = None
    return "" if found else f"the package {system.requires} is not installed"


def read_plan(path: Path | None, workload: Workload) -> Plan:
    """The plan of a run, checked against its workload."""
    if path is None:
        raise UserError("--plan: missing; make one with `lorafusion plan`")
    plan = Plan.read(path)
    check(plan, workload, source=path)
    return plan


def require_device(suite: Suite, source: Path) -> None:
    """Raise where a suite is for GPUs and there is none."""
    if suite.device == "cuda" and not has_gpu():
        raise UserError(f"{source}: a suite for GPUs, but nvidia-smi finds none; try configs/suites/smoke.yaml")


def require_the_cells_own(
    cell: Cell, workload: Workload, workload_path: Path, plan: Plan | None, plan_path: Path | None
) -> None:
    """Raise where a workload or a plan was made for another cell: its numbers would bear this cell's name."""
    pairs = [(workload_path, "workload", workload.name, cell.workload)]
    if plan:
        pairs += [
            (plan_path, "system", plan.system, cell.system),
            (plan_path, "stages", plan.stages, cell.stages),
            (plan_path, "data_parallel", plan.data_parallel, cell.grid.data_parallel),
        ]
        if not cell.grid.tuned:
            pairs.append((plan_path, "capacity", plan.capacity, cell.grid.capacity_of(cell.workload)))
    for path, what, found, expected in pairs:
        if found != expected:
            raise UserError(f"{path}: {what} {found!r}, but cell {cell.name} has {expected!r}")


def describe(result: dict) -> str:
    return f"{result['status']} ({result['note']})" if result["note"] else result["status"]


def find_cell(suite: Suite, name: str, source: Path) -> Cell:
    for cell in cells(suite, source):
        if cell.name == name:
            return cell
    raise UserError(f"{source}: no cell {name!r}; `lorafusion cells --suite {source}` lists them")


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


def config_hash(suite: Suite, cell: Cell, system: SystemConfig) -> str:
    """Changes with anything in the configuration that a run of the cell depends on."""
    settings = suite.model_dump(mode="json", include={"device", "dtype", "adapter_dtype", "seed"})
    parts_of_it = {"samples", "global_batch", "length_scale", "checkpointing", "data_parallel", "merged_qkv", "tuned"}
    grid = cell.grid.model_dump(mode="json", include=parts_of_it)
    parts = system.model_dump(mode="json", exclude={"description"})
    model = read_model(cell.model).model_dump(mode="json")
    return content_hash([cell.name, settings, grid, cell.grid.capacity_of(cell.workload), parts, model])
