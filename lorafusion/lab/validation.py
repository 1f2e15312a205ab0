"""How well the simulator predicts the runs of a table that has no predictions yet.

Each run is predicted by the others: by what the same LoRA operation took on all other workloads.
"""

from __future__ import annotations

import gzip
import io
import json
import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.optimize import least_squares

from lorafusion.core.config import read_model
from lorafusion.core.files import MOST_JSON, read_bytes
from lorafusion.core.plan import Plan
from lorafusion.core.schema import UserError
from lorafusion.lab.cell_result import schedule_of
from lorafusion.lab.keys import CellFiles, require
from lorafusion.lab.report.registry import FIGURES
from lorafusion.lab.table.table import MeasurementError, read, summarise
from lorafusion.planning.simulator import CostModel, model_costs, simulate
from lorafusion.planning.simulator.choice import with_reduction
from lorafusion.planning.simulator.costs import contents_of
from lorafusion.planning.simulator.profile import read_profile, stage_costs

FITTED = "costs: by runs of the other workloads"
# The costs that are fitted, and where that begins, as multiples of the model's. One launch of `fused` does all
# adapters, so its host's time does not grow with them, and what they cost the device is known from the kernels.
SCALES = {"token": 1.0, "adapter": 1.0, "host": 1.0, "host_adapter": 30.0}
SCALES_OF = {"fused": {"token": 1.0, "host": 1.0}}
FIXED_OF = {"fused": {"host_adapter": 0.0}}


def read_plans(path: Path) -> dict[str, Plan]:
    """The plans of a file of them (.plans.jsonl.gz), or of a suite's folder `plans`, by the cells' names."""
    if path.is_dir():
        return {str(file.relative_to(path).with_suffix("")): Plan.read(file) for file in path.rglob("*.json")}
    try:
        with gzip.open(io.BytesIO(read_bytes(path, "plans"))) as file:
            lines = [json.loads(line) for line in file.read(MOST_JSON).decode().splitlines()]
        if not lines:
            raise ValueError("nothing in it")
        return {line["cell"]: Plan.model_validate(line["plan"]) for line in lines}
    except (OSError, EOFError, zlib.error, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: expected a cell and its plan in each line, compressed ({str(error)[:100]})") from None


@dataclass(frozen=True)
class _Cell:
    """A cell that was run. rows: its measured times, one a repeat."""

    files: CellFiles
    plan: Plan
    rows: pd.DataFrame

    @property
    def kind(self) -> tuple[str, bool]:
        """Its LoRA operation, and whether it may have Liger's kernels: what its costs depend on."""
        return self.files.system.implementation, self.files.system.liger

    @property
    def seconds(self) -> float:
        return float(self.rows["value"].median())

    @cached_property
    def costs(self) -> CostModel:
        """Of its model, whatever the LoRA operation."""
        cell = self.files.cell
        return model_costs(read_model(cell.model), self.plan.stages, checkpointing=cell.grid.checkpointing)

    @cached_property
    def contents(self) -> list[np.ndarray]:
        return contents_of(self.plan, self.files.expected_workload)

    def predicted(self, scales: Mapping[str, float]) -> float:
        """Seconds where parts of the costs are multiplied."""
        parts = {name: scale * getattr(self.costs, name) for name, scale in scales.items()}
        return self.seconds_by(self.costs.model_copy(update=parts))

    def seconds_by(self, costs: CostModel) -> float:
        costs = costs.captured() if self.plan.buckets else costs
        return simulate(self.plan, costs.costs(*self.contents), schedule_of(self.files.system)).makespan


def with_predictions(
    table: pd.DataFrame, files: Mapping[str, CellFiles], plans: Mapping[str, Plan], profile: Path | None = None
) -> pd.DataFrame:
    """The measured times of a table's runs and a predicted one beside each: by a cost profile, or without one by the
    costs that fit what the same LoRA operation took on all other workloads; none where there are no such costs. files:
    of the suite's cells, by name. Raises `UserError` where a plan is missing or not the one that was run."""
    times = table[(table["metric"] == "time") & (table["window"] == "whole") & (table["statistic"] == "single")]
    times = times[(times["kind"] == "measured") & (times["status"] == "ok")]
    cells = [_cell(files, plans, name, rows) for name, rows in times.groupby("cell")]
    note = f"costs: {profile.name}" if profile else FITTED
    predicted = _by_profile(cells, profile) if profile else _by_others(cells)
    added = [cell.rows.assign(kind="simulated", value=seconds, note=note) for cell, seconds in predicted]
    return summarise(pd.concat([times, *added], ignore_index=True))


def _by_profile(cells: Sequence[_Cell], path: Path) -> Iterator[tuple[_Cell, float]]:
    """The cells whose costs a profile has, and their predicted seconds."""
    profile = read_profile(path)
    for cell in cells:
        model = read_model(cell.files.cell.model)
        fit = profile.fit(model, cell.files.system.implementation, cell.files.cell.system)
        if fit and cell.files.system.liger:  # as in all that profiles measure
            costs = stage_costs(fit, model, cell.plan.stages, cell.files.cell.grid.checkpointing)
            if not cell.files.system.shard:  # which sums gradients in its passes, as the profile has them
                costs = with_reduction(costs, cell.files.question)
            yield cell, cell.seconds_by(costs)


def _by_others(cells: Sequence[_Cell]) -> Iterator[tuple[_Cell, float]]:
    """The cells of LoRA operations that ran on other workloads too, and their seconds as those predict them."""
    for cell in cells:
        others = [other for other in cells if other.kind == cell.kind
                  and other.files.cell.workload != cell.files.cell.workload]  # fmt: skip
        if others:
            yield cell, cell.predicted(_fitted(cell.files.system.implementation, others))


def _cell(files: Mapping[str, CellFiles], plans: Mapping[str, Plan], name: str, rows: pd.DataFrame) -> _Cell:
    if name not in files or name not in plans:
        raise MeasurementError(f"{name}: found no such cell in the suite, or no plan of it")
    pairs = [("plan_hash", plans[name].content_hash), ("workload_hash", files[name].expected_workload.content_hash)]
    require(name, [(column, value, rows[column].iloc[0]) for column, value in pairs])
    return _Cell(files[name], plans[name], rows)


def _fitted(implementation: str, cells: Sequence[_Cell]) -> dict[str, float]:
    """By how much the parts of the model's costs are multiplied where they fit some cells best, by relative errors."""
    start, fixed = SCALES_OF.get(implementation, SCALES), FIXED_OF.get(implementation, {})

    def chosen(scales: np.ndarray) -> dict[str, float]:
        return fixed | dict(zip(start, scales.tolist(), strict=True))

    def errors(scales: np.ndarray) -> list[float]:
        return [math.log(cell.predicted(chosen(scales)) / cell.seconds) for cell in cells]

    return chosen(least_squares(errors, list(start.values()), bounds=(0, np.inf)).x)


def validate_table(files: Mapping[str, CellFiles], table: Path, plans: Path, stem: Path, profile: Path | None) -> str:
    """Draw the figure of a table's runs and their predictions (`with_predictions`); returns a line about it."""
    FIGURES["validation"].draw(with_predictions(read(table), files, read_plans(plans), profile), stem)
    return f"{stem}.png, .pdf, .csv"
