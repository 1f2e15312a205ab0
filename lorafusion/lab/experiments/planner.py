"""The experiment `planner`: plans of every strategy over a grid of workloads, their sizes and simulated times.

configs/planner.yaml has an entry for each suite. A *bench* is one process: a workload and a number of stages, over
all global batches, adapters and strategies.
"""

import time
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import NamedTuple

from pydantic import Field

from lorafusion.core.config import CONFIGS, names_in
from lorafusion.core.machine import largest_resident_set
from lorafusion.core.plugins import load
from lorafusion.core.schema import MOST_TOKENS, Config, one_of
from lorafusion.core.workload import Workload
from lorafusion.data.lengths import make_workload
from lorafusion.lab.experiments.bench import BenchEntry, BenchExperiment, Count
from lorafusion.lab.experiments.experiment import Point
from lorafusion.lab.table.result import row
from lorafusion.planning import STRATEGIES, bounds, plan_workload
from lorafusion.planning.simulator import CostModel, chosen_costs, costs_of, simulate

# mLoRA's own executor chooses as it goes, and needs no no-ops; the one that trains its plans here keeps their order.
SCHEDULES = {"mlora": "greedy"}


class PlannerGrid(Config):
    """Points of the suite: the product of all lists."""

    workloads: list[str] = Field(min_length=1)
    stages: list[Count] = Field(min_length=1)
    global_batch: list[Count] = Field(min_length=1, description="samples of one optimizer step of an adapter")
    adapters: list[Count] = Field(min_length=1, description="the workload's adapters are repeated to as many")
    samples: Count = Field(description="samples an adapter")
    strategies: list[str] = Field(min_length=1)


class PlannerSuite(BenchEntry):
    """An entry of configs/planner.yaml."""

    model: str | None = Field(
        default=None, description="a file of configs/models, whose costs are simulated; else stages are equal"
    )
    capacity: int = Field(ge=1, le=MOST_TOKENS, description="tokens a microbatch may hold")
    grids: list[PlannerGrid] = Field(min_length=1)

    @property
    def device(self) -> str:
        return "cpu"


class PlannerSubject(NamedTuple):
    """A grid, one of its workloads and one of its numbers of stages."""

    grid: PlannerGrid
    workload: str
    stages: int


class Planner(BenchExperiment):
    """Plans of every strategy over a grid of workloads."""

    name = "planner"
    config = CONFIGS / "planner.yaml"
    entry = PlannerSuite
    memory_mb = 4000

    def subjects(self, entry: PlannerSuite, source: str) -> Iterator[tuple[str, PlannerSubject]]:
        if entry.model:
            one_of("model", entry.model, names_in("models"), f"{source}.model")
        for index, grid in enumerate(entry.grids):
            where = f"{source}.grids.{index}"
            for workload in grid.workloads:
                one_of("workload", workload, names_in("workloads"), where)
            for strategy in grid.strategies:
                one_of("strategy", strategy, set(STRATEGIES), where)
            for workload, stages in product(grid.workloads, grid.stages):
                name = f"workload~{workload}/stages~{stages}/samples~{grid.samples}"
                yield name, PlannerSubject(grid, workload, stages)

    def depends_on(self, point: Point) -> dict:
        settings = point.settings.model_dump(mode="json", exclude={"grids", "minutes", "repeats"})
        return settings | point.subject.grid.model_dump()

    def columns(self, point: Point) -> dict:
        grid, workload, stages = point.subject
        entry = point.settings
        return {"kind": "simulated", "cell": point.name, "model": entry.model, "workload": workload, "gpus": stages,
                "stages": stages, "capacity": entry.capacity, "samples": grid.samples}  # fmt: skip

    def measure(self, point: Point, repeat: int, out: Path) -> Iterator[list[dict]]:
        grid, workload_name, stages = point.subject
        costs = chosen_costs(stages, point.settings.model)
        rows: list[dict] = []
        for global_batch, adapters in product(grid.global_batch, grid.adapters):
            workload = repeated_workload(workload_name, grid.samples, global_batch, adapters, point.settings.seed)
            for strategy in grid.strategies:
                rows += plan_rows(point, workload, strategy, global_batch, costs)
            print(f"{point.name}: global batch {global_batch}, {adapters} adapters", flush=True)
        yield [*rows, row("peak_memory", largest_resident_set(), "whole", {"cell": point.name, "kind": "measured"})]


def repeated_workload(name: str, samples: int, global_batch: int, adapters: int, seed: int) -> Workload:
    """A workload of configs/workloads whose adapters are repeated, or cut, to a number, each with its own samples."""
    path, jobs = CONFIGS / "workloads" / f"{name}.yaml", []
    while len(jobs) < adapters:
        workload = make_workload(path, samples=samples, global_batch=global_batch, seed=seed + len(jobs))
        jobs += [
            job.model_copy(update={"name": f"adapter-{len(jobs) + index}"}) for index, job in enumerate(workload.jobs)
        ]
    return Workload(name=name, jobs=tuple(jobs[:adapters]))


def plan_rows(point: Point, workload: Workload, strategy: str, global_batch: int, costs: CostModel) -> Iterator[dict]:
    """The rows of one plan: how long it took, how many microbatches it has, and what the simulator makes of them."""
    stages, capacity = point.subject.stages, point.settings.capacity
    load(STRATEGIES[strategy], "planner")  # what it imports is not its time
    begun = time.perf_counter()
    plan = plan_workload(workload, strategy, stages=stages, capacity=capacity, costs=costs)
    solve_time = time.perf_counter() - begun
    table = costs_of(plan, workload, costs)
    begun = time.perf_counter()
    timeline = simulate(plan, table, SCHEDULES.get(strategy), workload)
    simulation_time = time.perf_counter() - begun
    # A pipeline that drains needs no slots between an adapter's global batches.
    least = bounds.lower_bound(workload, 1 if plan.flush else stages, capacity)
    cell = {"system": strategy, "adapters": len(workload.jobs), "global_batch": global_batch}
    cell["cell"] = f"{point.name}/batch~{global_batch}/adapters~{len(workload.jobs)}/strategy~{strategy}"
    note = f"{len(plan.microbatches)} microbatches, {plan.statistics.noops} of them no-ops; "
    note += f"at most {max(microbatch.tokens for microbatch in plan.microbatches)} tokens"
    yield row("microbatch_ratio", len(plan.microbatches) / least, "whole", cell, note=note)
    yield row("fill", plan.statistics.fill, "whole", cell, note="")
    for window in ("whole", "steady"):
        yield row("bubble", timeline.bubble(window).mean(), window, cell, note="")
        if point.settings.model:  # else times are not in seconds
            yield row("throughput", timeline.throughput(window), window, cell, note="")
    of_machine = cell | {"kind": "measured"}
    yield row("solve_time", solve_time, "whole", of_machine)
    yield row("time", simulation_time, "whole", of_machine | {"implementation": "simulator"})
