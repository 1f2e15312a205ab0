"""What each file of a cell is made from, and whether a file is that: content is compared, never existence.

A file carries the hashes of all that it depends on: a tuning those of configuration and workload, a plan that of its
planner and of itself, a result those of configuration, workload and plan. A workload is compared with the one that the
suite's settings make. The steps of a suite (`lorafusion.lab.dag`) ask here and nowhere else.
"""

import csv
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from lorafusion.core.config import CONFIGS, SystemConfig, no_graphs, read_model, read_systems, uses_graphs
from lorafusion.core.plan import Plan, check
from lorafusion.core.schema import UserError
from lorafusion.core.seals import require_own_seal, require_seal
from lorafusion.core.workload import Workload, content_hash, read_versioned
from lorafusion.data.lengths import make_workload
from lorafusion.lab.suite import Cell, Suite, cells, read_suite
from lorafusion.lab.tuned import Tuned
from lorafusion.planning import plan_key, planner_options
from lorafusion.planning.simulator import CostModel, Question, costs_for

RESULT_VERSION = 1


class OutOfDateError(UserError):
    """A file that was made from something else than it would be made from now."""

    def __init__(self, path: str | Path, what: str, value: object, expected: object) -> None:
        self.reason = f"{what}: found {value}, expected {expected}"
        super().__init__(f"{path}: {self.reason}; it was made for other settings, make it again")


def require(path: str | Path, pairs: list[tuple[str, object, object]]) -> None:
    """Raise `OutOfDateError` for the first of some (what, value, expected) that differ."""
    for what, value, expected in pairs:
        if value != expected:
            raise OutOfDateError(path, what, value, expected)


def configuration_hash(suite: Suite, cell: Cell, system: SystemConfig) -> str:
    """Changes with anything in the configuration that a run of the cell depends on."""
    settings = suite.model_dump(mode="json", include={"device", "dtype", "adapter_dtype", "seed"})
    grid_keys = {
        "samples",
        "global_batch",
        "length_scale",
        "checkpointing",
        "data_parallel",
        "graphs",
        "attention",
        "merged_qkv",
        "tuned",
    }
    grid = cell.grid.model_dump(mode="json", include=grid_keys)
    system_settings = system.model_dump(mode="json", exclude={"description", "no_graphs"})
    model = read_model(cell.model).model_dump(mode="json")
    return content_hash([cell.name, settings, grid, cell.grid.capacity_of(cell.workload), system_settings, model])


def cell_workload(suite: Suite, cell: Cell) -> Workload:
    """The workload that a cell trains, made from its configuration file, the table of lengths and the suite."""
    grid = cell.grid
    return make_workload(CONFIGS / "workloads" / f"{cell.workload}.yaml", samples=grid.samples,
                         global_batch=grid.global_batch, scale=grid.length_scale, seed=suite.seed,
                         merged_qkv=grid.merged_qkv)  # fmt: skip


@dataclass(frozen=True)
class CellFiles:
    """The files of a cell of a suite. Each is read only if it is made from what the suite says now; if not,
    `OutOfDateError` says what differs, or another `UserError` what is wrong with the file."""

    suite: Suite
    cell: Cell

    @cached_property
    def system(self) -> SystemConfig:
        return read_systems()[self.cell.system]

    @property
    def repeats(self) -> int:
        return self.suite.repeats_of(self.cell.grid)

    @cached_property
    def configuration(self) -> str:
        return configuration_hash(self.suite, self.cell, self.system)

    @cached_property
    def graphs(self) -> bool:
        """Do its stages replay graphs?"""
        return uses_graphs(self.cell.grid.graphs, self._no_graphs, f"cell {self.cell.name}: graphs")

    @property
    def graphs_note(self) -> str:
        """Why they do not, where that is not asked for."""
        return f"; without graphs: {self._no_graphs}" * (self.cell.grid.graphs == "auto" and not self.graphs)

    @property
    def _no_graphs(self) -> str:
        return no_graphs(self.cell.system, self.system, self.suite.device, read_model(self.cell.model))

    @cached_property
    def costs(self) -> CostModel:
        """Those of the cell's stages on the suite's device, which it is planned by. No machine is asked: a plan is the
        same wherever it is made, also where there is no GPU."""
        costs = costs_for(self.question)
        return costs.captured() if self.graphs else costs

    @cached_property
    def question(self) -> Question:
        """What the costs of the cell are of."""
        cell, suite, replicas = self.cell, self.suite, self.cell.grid.data_parallel
        return Question(
            cell.stages, read_model(cell.model), machine=suite.machine, device=suite.device,
            implementation=self.system.implementation, checkpointing=cell.grid.checkpointing,
            data_parallel=replicas, jobs=self.expected_workload.jobs if replicas > 1 else (),
        )  # fmt: skip

    @cached_property
    def expected_workload(self) -> Workload:
        return cell_workload(self.suite, self.cell)

    def workload(self, path: Path) -> Workload:
        workload, expected = Workload.read(path), self.expected_workload
        if workload.content_hash != expected.content_hash:
            what, *values = first_difference(workload.model_dump(mode="json"), expected.model_dump(mode="json"))
            raise OutOfDateError(path, what, *values)
        return workload

    def tuned(self, path: Path | None) -> Tuned | None:
        """The tuning of the cell; None for a cell whose capacity the suite says."""
        if not self.cell.grid.tuned:
            if path is not None:
                raise UserError(f"{path}: cell {self.cell.name} is not tuned, the suite says its capacity")
            return None
        if path is None:
            raise UserError(f"cell {self.cell.name}: found no tuning, expected the file that its step makes")
        tuning = Tuned.read(path)
        require(path, [
            ("cell", tuning.cell, self.cell.name),
            ("config_hash", tuning.config_hash, self.configuration),
            ("workload_hash", tuning.workload_hash, self.expected_workload.content_hash),
        ])  # fmt: skip
        return tuning

    def capacity(self, tuned: Tuned | None) -> int:
        """Tokens that a microbatch of the cell may hold: those that its tuning found, or those that the suite says."""
        return tuned.capacity if tuned else self.cell.grid.capacity_of(self.cell.workload)

    def plan(self, path: Path | None, tuned: Tuned | None) -> Plan:
        """The plan of the cell, checked against its workload."""
        if path is None:
            raise UserError(f"cell {self.cell.name}: found no plan, expected the file that its step makes")
        plan, cell = Plan.read(path), self.cell
        require(path, [
            ("workload_hash", plan.workload_hash, self.expected_workload.content_hash),
            ("system", plan.system, cell.system),
            ("stages", plan.stages, cell.stages),
            ("data_parallel", plan.data_parallel, cell.grid.data_parallel),
            ("capacity", plan.capacity, self.capacity(tuned)),
            ("key", plan.key, plan_key(plan, self.system.planner, planner_options(self.system, self.costs))),
        ])  # fmt: skip
        check(plan, self.expected_workload, source=path)
        return plan

    def result(self, path: Path, plan: Plan | None, repeat: int) -> dict:
        """The result file of one repeat. plan: None for a cell that nothing installed here can run."""
        result = _read_result(path)
        self.require_result(path, result)
        require(path, [
            ("repeat", result["cell"].get("repeat"), repeat),
            ("plan_hash", result["provenance"].get("plan_hash"), plan.content_hash if plan else None),
        ])  # fmt: skip
        return result

    def require_result(self, path: str | Path, result: dict) -> None:
        """Raise unless the content of a result file is of this cell as the suite has it now."""
        cell, origin = part_of(result, "cell", path), part_of(result, "provenance", path)
        require(path, [
            ("suite", cell.get("suite"), self.suite.name),
            ("cell", cell.get("cell"), self.cell.name),
            ("config_hash", origin.get("config_hash"), self.configuration),
            ("workload_hash", origin.get("workload_hash"), self.expected_workload.content_hash),
        ])  # fmt: skip

    def profile(self, path: Path, plan: Plan) -> list[dict[str, str]]:
        """The rows of the CSV of `profile_cell`, which its seal says are all of them."""
        require_seal(path)
        with open(path, newline="") as file:
            rows = list(csv.DictReader(file))
        for row in rows or [{}]:
            require(path, [
                ("cell", row.get("cell"), self.cell.name),
                ("config_hash", row.get("config_hash"), self.configuration),
                ("plan_hash", row.get("plan_hash"), plan.content_hash),
            ])  # fmt: skip
        return rows


def suite_files(suite_path: Path) -> dict[str, CellFiles]:
    """The files of all cells of a suite, by the cells' names."""
    suite = read_suite(suite_path)
    return {cell.name: CellFiles(suite, cell) for cell in cells(suite, suite_path)}


def require_one_workload(trained: Iterable[tuple[str | Path, str, str, str | None]]) -> None:
    """Raise `OutOfDateError` unless all systems that are compared trained the same workload. trained: a file, the suite
    and the cell that it is of, and the hash of the workload that it was made with."""
    first: dict[tuple[str, str], tuple[str | None, str | Path]] = {}
    for path, suite, cell, workload_hash in trained:
        expected, other = first.setdefault((suite, cell.rpartition("/system~")[0]), (workload_hash, path))
        if workload_hash != expected:
            raise OutOfDateError(path, "workload_hash", workload_hash, f"{expected} as in {other}")


def _read_result(path: Path) -> dict:
    result = read_versioned(path, RESULT_VERSION, "result")
    require_own_seal(result, path)
    return result


def part_of(result: dict, key: str, path: str | Path) -> dict:
    """An object in a result file; `UserError` where it is something else."""
    part = result.get(key)
    if not isinstance(part, dict):
        raise UserError(f"{path}: {key}: expected a JSON object, found {type(part).__name__}")
    return part


def first_difference(value: object, expected: object, where: str = "") -> tuple[str, object, object]:
    """The first place where two different JSON values differ, and what is there in each."""
    below = f"{where}." if where else ""
    if isinstance(value, dict) and isinstance(expected, dict):
        for key in dict.fromkeys([*expected, *value]):
            if key not in value or key not in expected or value[key] != expected[key]:
                return first_difference(value.get(key), expected.get(key), f"{below}{key}")
    if isinstance(value, list) and isinstance(expected, list):
        if len(value) != len(expected):
            return where, f"{len(value)} entries", len(expected)
        for index, (entry, other) in enumerate(zip(value, expected, strict=True)):
            if entry != other:
                return first_difference(entry, other, f"{below}{index}")
    return where, value, expected


def require_result_of(path: Path, config_hash: str, repeat: int) -> dict:
    """The result file of a repeat of a point of an experiment; raises unless its settings are those of now."""
    result = _read_result(path)
    require(path, [("config_hash", part_of(result, "provenance", path).get("config_hash"), config_hash),
                   ("repeat", part_of(result, "cell", path).get("repeat"), repeat)])  # fmt: skip
    return result
