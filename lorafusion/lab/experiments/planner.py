"""The scheduler suite: plans of every strategy over a grid of workloads, their sizes counted, their times simulated.

configs/scheduler.yaml has an entry for each suite. A *bench* is one process: a workload and a number of stages, over
all global batches, adapters and strategies.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from datetime import UTC, datetime
from itertools import product
from pathlib import Path
from typing import Annotated

from pydantic import Field

from lorafusion.core.config import CONFIGS, names_in, read_entries
from lorafusion.core.machine import largest_resident_set, provenance
from lorafusion.core.plan import Plan
from lorafusion.core.plugins import load
from lorafusion.core.schema import (
    MOST_MINUTES,
    MOST_REPEATS,
    MOST_SAMPLES,
    MOST_SEED,
    MOST_TOKENS,
    Config,
    UserError,
    one_of,
)
from lorafusion.core.workload import Workload, content_hash
from lorafusion.data.lengths import make_workload
from lorafusion.lab.experiments.experiment import MARGIN, NO_INPUTS, Experiment, Inputs, Point, Resources, suite_name
from lorafusion.lab.experiments.rows import row, write_bench
from lorafusion.planning import STRATEGIES, bounds, plan_workload
from lorafusion.planning.simulator import CostModel, chosen_costs, costs_of, simulate

SUITES = CONFIGS / "scheduler.yaml"
# mLoRA's own executor chooses as it goes, and needs no no-ops; the one that trains its plans here keeps their order.
Count = Annotated[int, Field(ge=1, le=MOST_SAMPLES)]
SCHEDULES = {"mlora": "greedy"}


class Planner(Experiment):
    """Plans of every strategy, judged by the simulator."""

    name = "planner"
    folder = "scheduler"

    def points(self, suite: str) -> list[Point]:
        name = suite_name(suite)
        entry = read_scheduler_suites().get(name)
        return [Point(name, name, bench, entry.repeats, entry, bench) for bench in benches(entry)] if entry else []

    def key(self, point: Point) -> str:
        return bench_hash(point.settings, point.name)

    def resources(self, point: Point) -> Resources:
        return Resources(minutes=point.settings.minutes + MARGIN, memory_mb=4000)

    def run(self, point: Point, repeat: int, out: Path, log: Path | None, inputs: Inputs = NO_INPUTS) -> str:
        return run_bench(point.source, point.name, repeat, out, log)


class Grid(Config):
    """Points of the suite: the product of all lists."""

    workloads: list[str] = Field(min_length=1)
    stages: list[Count] = Field(min_length=1)
    global_batch: list[Count] = Field(min_length=1, description="samples of one optimizer step of an adapter")
    adapters: list[Count] = Field(min_length=1, description="the workload's adapters are repeated to as many")
    samples: Count = Field(description="samples an adapter")
    strategies: list[str] = Field(min_length=1)


class SchedulerSuite(Config):
    """An entry of configs/scheduler.yaml."""

    model: str | None = Field(
        default=None, description="a file of configs/models, whose costs are simulated; else stages are equal"
    )
    capacity: int = Field(ge=1, le=MOST_TOKENS, description="tokens a microbatch may hold")
    repeats: int = Field(default=1, ge=1, le=MOST_REPEATS, description="fresh processes a bench")
    seed: int = Field(default=1, ge=0, le=MOST_SEED)
    minutes: int = Field(default=10, ge=1, le=MOST_MINUTES, description="time limit of a process")
    grids: list[Grid] = Field(min_length=1)


def read_scheduler_suites() -> dict[str, SchedulerSuite]:
    """All entries; `UserError` names the key that is wrong, or a workload, strategy or model that is unknown."""
    suites = read_entries(SUITES, SchedulerSuite)
    for name, suite in suites.items():
        if suite.model:
            one_of("model", suite.model, names_in("models"), f"{SUITES}: {name}.model")
        for index, grid in enumerate(suite.grids):
            where = f"{SUITES}: {name}.grids.{index}"
            for workload in grid.workloads:
                one_of("workload", workload, names_in("workloads"), where)
            for strategy in grid.strategies:
                one_of("strategy", strategy, set(STRATEGIES), where)
    return suites


def read_scheduler_suite(name: str) -> SchedulerSuite:
    suites = read_scheduler_suites()
    one_of("suite", name, set(suites), SUITES)
    return suites[name]


def benches(suite: SchedulerSuite) -> dict[str, tuple[Grid, str, int]]:
    """The benches by name: a grid, one of its workloads and one of its numbers of stages."""
    found = {}
    for grid in suite.grids:
        for workload, stages in product(grid.workloads, grid.stages):
            name = f"workload~{workload}/stages~{stages}/samples~{grid.samples}"
            if name in found:
                raise UserError(f"{SUITES}: two grids have the bench {name}")
            found[name] = grid, workload, stages
    return found


def bench_hash(suite: SchedulerSuite, name: str) -> str:
    """Changes with anything that the numbers of a bench depend on."""
    grid, _, _ = benches(suite)[name]
    return content_hash(suite.model_dump(mode="json", exclude={"grids", "minutes", "repeats"}) | grid.model_dump())


def current_hash(suite: str, name: str) -> str:
    """The hash of a bench of a suite as the file has it now; KeyError for one that it does not have."""
    return bench_hash(read_scheduler_suites()[suite], name)


def run_bench(suite_name: str, name: str, repeat: int, out: Path, log: Path | None) -> str:
    """Plan and simulate all points of a bench and write its result file; returns a line about it."""
    suite = read_scheduler_suite(suite_name)
    known = benches(suite)
    one_of("bench", name, set(known), f"{SUITES}: {suite_name}")
    grid, workload_name, stages = known[name]
    started = datetime.now(UTC).isoformat(timespec="seconds")
    costs = chosen_costs(stages, suite.model)
    metrics = []
    for global_batch, adapters in product(grid.global_batch, grid.adapters):
        workload = repeated_workload(workload_name, grid.samples, global_batch, adapters, suite.seed)
        for strategy in grid.strategies:
            metrics += measured(
                workload, strategy, stages, global_batch, suite.capacity, costs, name, in_seconds=bool(suite.model)
            )
        print(f"{name}: global batch {global_batch}, {adapters} adapters", flush=True)
    metrics.append(row("peak_memory", largest_resident_set(), "whole", {"cell": name, "kind": "measured"}))
    cell = {"suite": suite_name, "kind": "simulated", "cell": name, "model": suite.model, "workload": workload_name,
            "gpus": stages, "repeat": repeat, "stages": stages, "capacity": suite.capacity,
            "samples": grid.samples}  # fmt: skip
    write_bench(out, cell, metrics, provenance("cpu"), config_hash=bench_hash(suite, name), seed=suite.seed,
                started=started, log=log, bench=("scheduler", suite_name, name),
                command=["scheduler", "measure", "--suite", suite_name, "--bench", name, "--out", out, "--repeat",
                         repeat])  # fmt: skip
    return f"{len(metrics)} numbers"


def repeated_workload(name: str, samples: int, global_batch: int, adapters: int, seed: int) -> Workload:
    """A workload of configs/workloads whose adapters are repeated, or cut, to a number, each with its own samples."""
    path, jobs = CONFIGS / "workloads" / f"{name}.yaml", []
    while len(jobs) < adapters:
        made = make_workload(path, samples=samples, global_batch=global_batch, seed=seed + len(jobs))
        jobs += [job.model_copy(update={"name": f"adapter-{len(jobs) + index}"}) for index, job in enumerate(made.jobs)]
    return Workload(name=name, jobs=tuple(jobs[:adapters]))


def measured(
    workload: Workload,
    strategy: str,
    stages: int,
    global_batch: int,
    capacity: int,
    costs: CostModel,
    bench: str,
    in_seconds: bool,
) -> Iterator[dict]:
    """The rows of one plan: how long it took, how many microbatches it has, and what the simulator makes of them."""
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
    own = {"system": strategy, "adapters": len(workload.jobs), "global_batch": global_batch}
    own["cell"] = f"{bench}/batch~{global_batch}/adapters~{len(workload.jobs)}/strategy~{strategy}"
    for metric, window, value in (
        ("microbatch_ratio", "whole", len(plan.microbatches) / least),
        ("fill", "whole", plan.statistics.fill),
        *(("bubble", window, timeline.bubble(window).mean()) for window in ("whole", "steady")),
        *(("throughput", window, timeline.throughput(window)) for window in ("whole", "steady")),
    ):
        if metric == "throughput" and not in_seconds:
            continue
        yield row(metric, value, window, own, note=_note(plan) if metric == "microbatch_ratio" else "")
    of_machine = own | {"kind": "measured"}
    yield row("solve_time", solve_time, "whole", of_machine)
    yield row("time", simulation_time, "whole", of_machine | {"implementation": "simulator"})


def _note(plan: Plan) -> str:
    most = max(microbatch.tokens for microbatch in plan.microbatches)
    return f"{len(plan.microbatches)} microbatches, {plan.statistics.noops} of them no-ops; at most {most} tokens"
