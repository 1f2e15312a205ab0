"""The experiment `end_to_end`: whole trainings of every system of a suite."""

import importlib.util
import platform
from pathlib import Path
from typing import Any

from lorafusion.core.config import SystemConfig, names_in
from lorafusion.core.machine import neighbours
from lorafusion.core.schema import UserError
from lorafusion.lab.cell_result import result_of_cell
from lorafusion.lab.cluster.request import Resources, nodes_for
from lorafusion.lab.experiments.experiment import (
    MARGIN,
    NO_INPUTS,
    Experiment,
    Inputs,
    Point,
    is_path,
    require_device,
)
from lorafusion.lab.keys import CellFiles, suite_files
from lorafusion.lab.suite import Cell, Suite, suite_path
from lorafusion.lab.table.result import write_result
from lorafusion.launch.attempt import attempt_at, other_node
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
            Point(files.suite.name, str(path), name, files.repeats, files.suite, files, files.cell.grid.priority)
            for name, files in suite_files(path).items()
        ]

    def key(self, point: Point) -> str:
        return point.subject.configuration

    def resources(self, point: Point) -> Resources:
        cell, suite = point.subject.cell, point.settings
        nodes = nodes_for(cell.gpus, suite.gpus_per_node)
        here = cell.gpus // nodes
        return Resources(
            minutes=cell.grid.minutes + MARGIN,
            memory_mb=-(-1000 * cell.grid.memory_gb // nodes),
            cpus=here,
            gpus=here if suite.device == "cuda" else 0,
            nodes=nodes,
            whole_nodes=suite.device == "cuda" and here == suite.gpus_per_node,
        )

    def run(self, point: Point, repeat: int, out: Path, log: Path | None, inputs: Inputs = NO_INPUTS) -> str:
        """Returns the status. A cell that cannot be run by what is built (`unavailable`) needs no plan and has the
        status `skipped`. Raises `UserError` for input that no run can use, or that was not made for this cell."""
        files, suite = point.subject, point.settings
        require_device(suite, point.source)
        workload, reason = files.workload(inputs.workload), unavailable(files.system)
        plan = None if reason else files.plan(inputs.plan, files.tuned(inputs.tuned))
        origin = self.origin(point, out, log)
        origin |= {"workload_hash": workload.content_hash, "plan_hash": plan.content_hash if plan else None}
        outcome, origin["other_nodes"] = launched(files, inputs, out) if plan else (Outcome("skipped", reason), [])
        if other_node():
            return other_node()
        result = result_of_cell(files, outcome, workload, plan, repeat, origin)
        write_result(out, result)
        return f"{result['status']} ({result['note']})" if result["note"] else result["status"]


def launched(files: CellFiles, inputs: Inputs, out: Path) -> tuple[Outcome, list[dict[str, Any]]]:
    """Train a cell by its plan, on as many nodes as there are; returns also what else ran on those after the first."""
    suite, cell = files.suite, files.cell
    task = {"task": TRAIN_WITH_COST} if suite.cost else {}
    spec = spec_of(cell, suite, inputs.workload).model_copy(update={"plan": str(inputs.plan)} | task)
    with attempt_at(out, inputs.nodes, inputs.launch) as attempt:
        if other_node():
            attempt.put({"hostname": platform.node()} | neighbours())
        return attempt.launch(spec, cell.gpus, 60 * cell.grid.minutes), attempt.values()


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
        attention=cell.grid.attention,
        needs_graphs=cell.grid.graphs == "on",
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


def cell_files(suite_path: Path, name: str) -> CellFiles:
    """The files of a cell of a suite, by its name."""
    every = suite_files(suite_path)
    if name in every:
        return every[name]
    raise UserError(f"{suite_path}: no cell {name!r}; `lorafusion lab list {suite_path} run` lists them")
