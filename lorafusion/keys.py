"""What each file of a cell is made from, and whether a file is that: content is compared, never existence.

A file carries the hashes of all that it depends on: a tuning those of configuration and workload, a plan that of its
planner and of itself, a result those of configuration, workload and plan. A workload is compared with the one that the
suite's settings make. Snakemake's rules, `lorafusion sweep` and the commands of single steps ask here and nowhere else.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from pydantic import BaseModel

from lorafusion.config import CONFIGS, Cell, Suite, SystemConfig, read_model, read_systems
from lorafusion.data.lengths import make_workload
from lorafusion.errors import UserError
from lorafusion.plan import Plan, check
from lorafusion.seals import require_seal
from lorafusion.tuned import Tuned
from lorafusion.workload import Workload, content_hash, read_versioned

RESULT_VERSION = 1


class OutOfDateError(UserError):
    """A file that was made from something else than it would be made from now."""

    def __init__(self, path: str | Path, what: str, found: object, expected: object) -> None:
        self.reason = f"{what}: found {found}, expected {expected}"
        super().__init__(f"{path}: {self.reason}; it was made for other settings, make it again")


def require(path: str | Path, pairs: list[tuple[str, object, object]]) -> None:
    """Raise `OutOfDateError` for the first of some (what, found, expected) that differ."""
    for what, found, expected in pairs:
        if found != expected:
            raise OutOfDateError(path, what, found, expected)


def configuration_hash(suite: Suite, cell: Cell, system: SystemConfig) -> str:
    """Changes with anything in the configuration that a run of the cell depends on."""
    settings = suite.model_dump(mode="json", include={"device", "dtype", "adapter_dtype", "seed"})
    parts_of_it = {"samples", "global_batch", "length_scale", "checkpointing", "data_parallel", "merged_qkv", "tuned"}
    grid = cell.grid.model_dump(mode="json", include=parts_of_it)
    parts = system.model_dump(mode="json", exclude={"description"})
    model = read_model(cell.model).model_dump(mode="json")
    return content_hash([cell.name, settings, grid, cell.grid.capacity_of(cell.workload), parts, model])


def cell_workload(suite: Suite, cell: Cell) -> Workload:
    """The workload that a cell trains, made from its configuration file, the table of lengths and the suite."""
    grid = cell.grid
    return make_workload(CONFIGS / "workloads" / f"{cell.workload}.yaml", samples=grid.samples,
                         global_batch=grid.global_batch, scale=grid.length_scale, seed=suite.seed,
                         merged_qkv=grid.merged_qkv)  # fmt: skip


def plan_key(plan: Plan, planner: str, options: dict[str, object]) -> str:
    """Changes with anything that a plan is made from, and with the plan itself. planner: its import path; options: its
    keyword arguments."""
    plain = {name: value.model_dump(mode="json") if isinstance(value, BaseModel) else value
             for name, value in options.items()}  # fmt: skip
    return content_hash([planner, plain, plan.content_hash])


@dataclass(frozen=True)
class CellFiles:
    """The files of a cell of a suite. Each is read only if it is made from what the suite says now; if not,
    `OutOfDateError` says what differs, or another `UserError` what is wrong with the file."""

    suite: Suite
    cell: Cell

    @cached_property
    def system(self) -> SystemConfig:
        return read_systems()[self.cell.system]

    @cached_property
    def configuration(self) -> str:
        return configuration_hash(self.suite, self.cell, self.system)

    @cached_property
    def expected_workload(self) -> Workload:
        return cell_workload(self.suite, self.cell)

    def workload(self, path: Path) -> Workload:
        found, expected = Workload.read(path), self.expected_workload
        if found.content_hash != expected.content_hash:
            what, *values = first_difference(found.model_dump(mode="json"), expected.model_dump(mode="json"))
            raise OutOfDateError(path, what, *values)
        return found

    def tuned(self, path: Path | None) -> Tuned | None:
        """The tuning of the cell; None for a cell whose capacity the suite says."""
        if not self.cell.grid.tuned:
            if path is not None:
                raise UserError(f"--tuned: {path}: cell {self.cell.name} is not tuned, the suite says its capacity")
            return None
        if path is None:
            raise UserError(f"--tuned: missing; cell {self.cell.name} is tuned: give the file of `lorafusion tune`")
        found = Tuned.read(path)
        require(path, [
            ("cell", found.cell, self.cell.name),
            ("config_hash", found.config_hash, self.configuration),
            ("workload_hash", found.workload_hash, self.expected_workload.content_hash),
        ])  # fmt: skip
        return found

    def capacity(self, tuned: Tuned | None) -> int:
        """Tokens that a microbatch of the cell may hold: those that its tuning found, or those that the suite says."""
        return tuned.capacity if tuned else self.cell.grid.capacity_of(self.cell.workload)

    def plan(self, path: Path | None, tuned: Tuned | None) -> Plan:
        """The plan of the cell, checked against its workload."""
        if path is None:
            raise UserError("--plan: missing; make one with `lorafusion plan`")
        found, cell = Plan.read(path), self.cell
        require(path, [
            ("workload_hash", found.workload_hash, self.expected_workload.content_hash),
            ("system", found.system, cell.system),
            ("stages", found.stages, cell.stages),
            ("data_parallel", found.data_parallel, cell.grid.data_parallel),
            ("capacity", found.capacity, self.capacity(tuned)),
            ("key", found.key, plan_key(found, self.system.planner, self.system.options)),
        ])  # fmt: skip
        check(found, self.expected_workload, source=path)
        return found

    def result(self, path: Path, plan: Plan | None, repeat: int) -> dict:
        """The result file of one repeat. plan: None for a cell that nothing installed here can run."""
        found = read_versioned(path, RESULT_VERSION, "result")
        cell, origin = _part(found, "cell", path), _part(found, "provenance", path)
        require(path, [
            ("suite", cell.get("suite"), self.suite.name),
            ("cell", cell.get("cell"), self.cell.name),
            ("repeat", cell.get("repeat"), repeat),
            ("config_hash", origin.get("config_hash"), self.configuration),
            ("workload_hash", origin.get("workload_hash"), self.expected_workload.content_hash),
            ("plan_hash", origin.get("plan_hash"), plan.content_hash if plan else None),
        ])  # fmt: skip
        return found

    def profile(self, path: Path, plan: Plan) -> list[dict[str, str]]:
        """The rows of the CSV of `lorafusion profile`, which its seal says are all of them."""
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


def _part(result: dict, key: str, path: Path) -> dict:
    part = result.get(key)
    if not isinstance(part, dict):
        raise UserError(f"{path}: {key}: expected a JSON object, found {type(part).__name__}")
    return part


def first_difference(found: object, expected: object, where: str = "") -> tuple[str, object, object]:
    """The first place where two different JSON values differ, and what is there in each."""
    below = f"{where}." if where else ""
    if isinstance(found, dict) and isinstance(expected, dict):
        for key in dict.fromkeys([*expected, *found]):
            if key not in found or key not in expected or found[key] != expected[key]:
                return first_difference(found.get(key), expected.get(key), f"{below}{key}")
    if isinstance(found, list) and isinstance(expected, list):
        if len(found) != len(expected):
            return where, f"{len(found)} entries", len(expected)
        for index, (one, other) in enumerate(zip(found, expected, strict=True)):
            if one != other:
                return first_difference(one, other, f"{below}{index}")
    return where, found, expected
