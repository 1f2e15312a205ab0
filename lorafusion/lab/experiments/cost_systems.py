"""A short run of a system: of the experiment `costs`, the rows of what an executor does besides the passes.

Some executors are libraries with work of their own: they gather weights that replicas share, and have hooks around
each layer. That is in the times of a run, and in no time of a stage alone.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

from lorafusion.core.config import read_model
from lorafusion.core.files import write
from lorafusion.core.plan import Plan
from lorafusion.core.workload import Sample, Workload
from lorafusion.lab.experiments.bench import equal_jobs
from lorafusion.lab.experiments.costs_suite import SystemBench
from lorafusion.lab.experiments.experiment import Point
from lorafusion.lab.table.result import row
from lorafusion.launch.launch import launch
from lorafusion.launch.spec import RunSpec
from lorafusion.planning import plan_system

JOBS, BATCHES, MICROBATCHES = 2, 4, 4  # adapters, global batches of each, and microbatches a replica of each of these
RANK, DROPOUT = 16, 0.1
PASSES = ("forward", "backward")


def system_rows(point: Point) -> Iterator[list[dict]]:
    """Seconds of a microbatch by pass, and of the steps after one, as medians over some runs of a system."""
    entry, bench = point.settings, point.subject
    with tempfile.TemporaryDirectory(prefix="lorafusion-") as folder:
        workload, plan = _workload_and_plan(bench)
        paths = [Path(folder) / name for name in ("workload.json", "plan.json")]
        for path, content in zip(paths, (workload, plan), strict=True):
            write(path, content.to_json())
        spec = RunSpec(system=bench.system, model=bench.model, workload=str(paths[0]), plan=str(paths[1]),
                       device=entry.device, dtype=entry.dtype, adapter_dtype=entry.dtype, seed=entry.seed)  # fmt: skip
        outcomes = [launch(spec, bench.replicas, 60 * entry.minutes) for _ in range(entry.rounds)]
    rounds = [_seconds(outcome.report, plan) for outcome in outcomes if outcome.status == "ok"]
    layers = read_model(bench.model).num_hidden_layers
    cell = {"cell": f"bench~{point.name}/layers~{layers}/system~{bench.system}/tokens~{bench.tokens}"
                    f"/sample~{bench.sample_tokens}",
            "bench": point.name, "system": bench.system, "tokens": bench.tokens}  # fmt: skip
    status, note = ("ok", "") if rounds else (outcomes[-1].status, outcomes[-1].note[:200])
    yield [
        row("step_time" if name == "step" else "time",
            statistics.median(seconds[name] for seconds in rounds) if rounds else None, "steady",
            cell | {"pass": None if name == "step" else name}, status=status, note=note)
        for name in (*PASSES, "step")
    ]  # fmt: skip


def _workload_and_plan(bench: SystemBench) -> tuple[Workload, Plan]:
    """Equal microbatches, of one adapter after another."""
    size = bench.tokens // bench.sample_tokens * MICROBATCHES * bench.replicas
    samples = tuple(Sample(i, bench.sample_tokens) for i in range(size * BATCHES))
    jobs = equal_jobs(JOBS, rank=RANK, alpha=2.0 * RANK, dropout=DROPOUT, global_batch_size=size, samples=samples)
    workload = Workload(name=bench.system, jobs=jobs)
    return workload, plan_system(workload, bench.system, stages=1, capacity=bench.tokens, data_parallel=bench.replicas)


def _seconds(report: dict, plan: Plan) -> dict[str, float]:
    """Of the first process, by pass, and of the steps that follow a microbatch. What comes between two microbatches
    counts as backward, but for what comes with steps alone."""
    begins, ends = (report["times"][0]["forward"][place::3] for place in (1, 2))
    stepping = [any(part.step_after for part in parts) for parts in plan.slots()]
    turns = [(after - before) / 1e6 for before, after in pairwise(begins)]
    alone, with_steps = (
        statistics.median(turn for turn, steps in zip(turns, stepping, strict=False) if steps == which)
        for which in (False, True)
    )
    forward = statistics.median((end - begin) / 1e6 for begin, end in zip(begins, ends, strict=True))
    return {"forward": forward, "backward": alone - forward, "step": max(0.0, with_steps - alone)}
