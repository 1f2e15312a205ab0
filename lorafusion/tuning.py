"""How many tokens a microbatch may hold in a cell, by one rule for all systems: the most that fits, then the fastest.

The most that is tried is the suite's. It is made smaller (`sizes`) until the plan's largest microbatches fit in memory,
and further until a size is clearly slower than the fastest (`trials.SLOWER`). A trial is one run of the first global
batch of each adapter (of as many as there are stages), planned as the whole workload is. Systems that fix the number of
samples of a microbatch take as many as fit in those tokens (`scheduler.common.largest_microbatch`), so that the same
rule tunes them.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pandas as pd
from pydantic import BaseModel, ConfigDict, Field

from lorafusion.cells import (
    find_cell,
    read_plan,
    require_device,
    require_the_cells_own,
    spec_of,
    unavailable,
)
from lorafusion.config import Cell, Suite, read_suite, read_systems
from lorafusion.errors import UserError, validated
from lorafusion.files import write
from lorafusion.measure.environment import provenance
from lorafusion.plan import Plan
from lorafusion.runtime.launch import Outcome, launch
from lorafusion.runtime.spec import RunSpec, Trial
from lorafusion.scheduler import plan_system
from lorafusion.seals import seal
from lorafusion.workload import Workload, read_versioned

VERSION = 2
MOST_TRIALS = 10
PROFILE_COLUMNS = ("suite", "cell", "workload", "qkv", "system", "gpu_name", "git_sha", "class", "milliseconds",
                   "kernels", "share")  # fmt: skip


class Tried(BaseModel):
    """A capacity that was tried: tokens a second of the first global batches, or why there is no such number."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    capacity: int = Field(ge=1)
    throughput: float | None = None
    status: str = "ok"
    note: str = ""

    def __str__(self) -> str:
        return f"{self.capacity}: {self.status if self.throughput is None else f'{self.throughput:,.0f} tok/s'}"


class Tuned(BaseModel):
    """The outcome for a cell."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: int = VERSION
    suite: str
    cell: str
    system: str
    stages: int
    data_parallel: int
    workload_hash: str
    gpu_name: str | None
    git_sha: str | None
    git_dirty: bool | None
    trials: tuple[Tried, ...] = Field(min_length=1)

    @property
    def capacity(self) -> int:
        """The fastest, of equal ones the largest; where none was run to its end the smallest tried, for which the run
        itself will say what is wrong."""
        done = [one for one in self.trials if one.throughput is not None]
        if not done:
            return min(one.capacity for one in self.trials)
        return max(done, key=lambda one: (one.throughput, one.capacity)).capacity

    @classmethod
    def read(cls, path: str | Path) -> Tuned:
        return validated(cls, read_versioned(path, VERSION, "tuning"), path)

    def require(self, source: Path, workload: Workload, system: str, stages: int, data_parallel: int) -> None:
        """Raise where this is the tuning of another workload, system or arrangement."""
        for what, found, expected in (
            ("workload", self.workload_hash, workload.content_hash),
            ("system", self.system, system),
            ("stages", self.stages, stages),
            ("data_parallel", self.data_parallel, data_parallel),
        ):
            if found != expected:
                raise UserError(f"{source}: tuned for {what} {found}, but this plan is for {expected}")


def tune_cell(
    suite_path: Path, name: str, workload_path: Path, out: Path, launch: Callable[..., Outcome] = launch
) -> Tuned:
    """Tune a cell of a suite and write the outcome, also where nothing fits."""
    suite, cell, workload = _read(suite_path, name, workload_path)
    with tempfile.TemporaryDirectory(prefix="lorafusion-") as scratch:
        spec = trials_of(cell, suite, workload, workload_path, candidates(workload, cell), Path(scratch))
        tried = _try_all(spec, partial(launch, processes=cell.gpus), 60 * cell.grid.minutes)
    origin = provenance(suite.device)
    tuned = Tuned(suite=suite.name, cell=name, system=cell.system, stages=cell.stages,
                  data_parallel=cell.grid.data_parallel, workload_hash=workload.content_hash, trials=tuple(tried),
                  **{key: origin[key] for key in ("gpu_name", "git_sha", "git_dirty")})  # fmt: skip
    write(out, json.dumps(tuned.model_dump(mode="json"), indent=1) + "\n")
    return tuned


def _read(suite_path: Path, name: str, workload_path: Path) -> tuple[Suite, Cell, Workload]:
    """A cell of a suite that can be run here, and its workload."""
    suite = read_suite(suite_path)
    require_device(suite, suite_path)
    cell, workload = find_cell(suite, name, suite_path), Workload.read(workload_path)
    reason = unavailable(read_systems()[cell.system])
    if reason:
        raise UserError(f"cell {name}: {reason}")
    require_the_cells_own(cell, workload, workload_path, None, None)
    return suite, cell, workload


def trials_of(
    cell: Cell, suite: Suite, workload: Workload, workload_path: Path, plans: list[Plan], folder: Path
) -> RunSpec:
    """The run that tries a cell's plans in turn; they and those of the beginning are written to a folder."""
    part = beginning(workload, cell.stages)
    (folder / "part.json").write_text(part.to_json())
    trials = []
    for plan in plans:
        paths = [folder / f"{kind}-{plan.capacity}.json" for kind in ("whole", "part")]
        paths[0].write_text(plan.to_json())
        paths[1].write_text(plan_cell(part, cell, plan.capacity).to_json())
        trials.append(Trial(plan=str(paths[0]), part=str(paths[1]), capacity=plan.capacity))
    update = {"trials": trials, "part": str(folder / "part.json"), "throughputs": str(folder / "throughputs.jsonl")}
    return spec_of(cell, suite, workload_path).model_copy(update=update)


def beginning(workload: Workload, stages: int) -> Workload:
    """The first global batch of each job, or as many as there are stages, for a pipeline that is not empty mostly."""
    jobs = tuple(job.model_copy(update={"steps": min(len(job.batches), job.start + stages)}) for job in workload.jobs)
    return workload.model_copy(update={"jobs": jobs})


def sizes(most: int) -> Iterator[int]:
    """A capacity, three quarters of it, half of it, and so on. By halves alone a system that takes a power of two of
    samples can miss one: with 32,768 tokens four of WikiSum from each adapter, with 16,384 one, in between two."""
    while most:
        yield most
        if most > 1:
            yield most * 3 // 4
        most //= 2


def candidates(workload: Workload, cell: Cell) -> list[Plan]:
    """The plans of a cell at its capacity and at smaller ones, without those that only say the same again; as far down
    as its planner can. Raises the planner's `UserError` where it cannot even at the first."""
    first, *smaller = sizes(cell.grid.capacity_of(cell.workload))
    plans = [plan_cell(workload, cell, first)]
    for capacity in smaller:
        if len(plans) == MOST_TRIALS:
            break
        try:
            plan = plan_cell(workload, cell, capacity)
        except UserError:
            break
        if plan.microbatches == plans[-1].microbatches:
            plans.pop()  # the smaller capacity says better what is in the plan
        plans.append(plan)
    return plans


def plan_cell(workload: Workload, cell: Cell, capacity: int) -> Plan:
    """The plan of a workload as a cell runs it."""
    return plan_system(
        workload, cell.system, stages=cell.stages, capacity=capacity, data_parallel=cell.grid.data_parallel
    )


def _try_all(spec: RunSpec, run: Callable[..., Outcome], seconds: float) -> list[Tried]:
    """What each capacity gave, in `seconds` for all. Memory that does not suffice ends the processes, and new ones go
    on with the next; whatever else ends them ends it all."""
    tried: list[Tried] = []
    trials, end = list(spec.trials), time.monotonic() + seconds
    while trials:
        finished = Path(spec.throughputs)
        finished.unlink(missing_ok=True)
        outcome = run(spec.model_copy(update={"trials": trials}), timeout=max(1.0, end - time.monotonic()))
        rates = [json.loads(line) for line in finished.read_text().splitlines()] if finished.exists() else []
        tried += [Tried(capacity=one.capacity, throughput=rate) for one, rate in zip(trials, rates, strict=False)]
        if outcome.status == "ok":
            break
        failed = trials[len(rates)]
        tried.append(Tried(capacity=failed.capacity, status=outcome.status, note=outcome.note))
        if outcome.status != "oom" or rates:  # a smaller capacity that does not fit where a larger one did
            break
        trials = trials[1:]
    return tried


def profile_cell(
    suite_path: Path,
    name: str,
    workload_path: Path,
    plan_path: Path,
    out: Path,
    launch: Callable[..., Outcome] = launch,
) -> pd.DataFrame:
    """Where the GPU's time goes in the first global batches of a cell, planned with the capacity of its plan; written
    as CSV."""
    suite, cell, workload = _read(suite_path, name, workload_path)
    if suite.device == "cpu":
        raise UserError(f"{suite_path}: a suite for a CPU; only a GPU's kernels can be told apart")
    plan = read_plan(plan_path, workload)
    require_the_cells_own(cell, workload, workload_path, plan, plan_path)
    with tempfile.TemporaryDirectory(prefix="lorafusion-") as scratch:
        spec = trials_of(cell, suite, workload, workload_path, [plan], Path(scratch))
        outcome = launch(spec.model_copy(update={"profile": True}), cell.gpus, 60 * cell.grid.minutes)
    if outcome.status != "ok":
        raise UserError(f"profile: the run of {name} ended as {outcome.status}: {outcome.note}")
    origin = provenance(suite.device)
    whose = {
        "suite": suite.name,
        "cell": name,
        "workload": cell.workload,
        "qkv": "merged" if cell.grid.merged_qkv else "separate",
        "system": cell.system,
        "gpu_name": origin["gpu_name"],
        "git_sha": origin["git_sha"],
    }
    frame = pd.DataFrame([whose | row for row in outcome.report["profile"]], columns=PROFILE_COLUMNS)
    write(out, frame.to_csv(index=False))
    seal(out)
    return frame
