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

from lorafusion.core.files import write
from lorafusion.core.plan import Plan
from lorafusion.lab.experiments.costs_suite import WHOLE, cell_of, workload_and_plan
from lorafusion.lab.experiments.experiment import Point
from lorafusion.lab.table.result import row
from lorafusion.launch.launch import launch
from lorafusion.launch.spec import RunSpec

PASSES = ("forward", "backward")


def system_rows(point: Point) -> Iterator[list[dict]]:
    """Seconds as medians over some runs of a system: of a microbatch by pass, and of the steps after one. Of a pipeline
    those of the whole and of a forward pass, in the run in which these are in the median ratio."""
    entry, bench = point.settings, point.subject
    with tempfile.TemporaryDirectory(prefix="lorafusion-") as folder:
        workload, plan = workload_and_plan(bench)
        paths = [Path(folder) / name for name in ("workload.json", "plan.json")]
        for path, content in zip(paths, (workload, plan), strict=True):
            write(path, content.to_json())
        spec = RunSpec(system=bench.system, model=bench.model, workload=str(paths[0]), plan=str(paths[1]),
                       device=entry.device, dtype=entry.dtype, adapter_dtype=entry.dtype, seed=entry.seed)  # fmt: skip
        outcomes = [launch(spec, bench.processes, 60 * entry.minutes) for _ in range(entry.rounds)]
    rounds = [_seconds(outcome.report, plan) for outcome in outcomes if outcome.status == "ok"]
    if bench.stages > 1:
        rounds = sorted(rounds, key=lambda seconds: seconds[WHOLE] / seconds["forward"])[(len(rounds) - 1) // 2 :][:1]
    cell = {"cell": cell_of(point.name, bench), "bench": point.name, "system": bench.system, "tokens": bench.tokens,
            "stages": bench.stages, "adapters": bench.adapters}  # fmt: skip
    status, note = ("ok", "") if rounds else (outcomes[-1].status, outcomes[-1].note[:200])
    yield [
        row("step_time" if name == "step" else "time",
            statistics.median(seconds[name] for seconds in rounds) if rounds else None,
            WHOLE if name == WHOLE else "steady", cell | {"pass": name if name in PASSES else None},
            status=status, note=note)
        for name in ((WHOLE, "forward") if bench.stages > 1 else (*PASSES, "step"))
    ]  # fmt: skip


def _seconds(report: dict, plan: Plan) -> dict[str, float]:
    """Of a pipeline the whole run, in its slowest process, and the mean forward pass. Else of the first process, by
    pass, and of the steps that follow a microbatch; what comes between two microbatches counts as backward, but for
    what comes with steps alone."""
    if plan.stages > 1:
        spans = [(end - begin) / 1e6 for times in report["times"]
                 for begin, end in zip(times["forward"][1::3], times["forward"][2::3], strict=True)]  # fmt: skip
        return {WHOLE: max(host for _, host in report["clocks"]), "forward": statistics.mean(spans)}
    begins, ends = (report["times"][0]["forward"][place::3] for place in (1, 2))
    stepping = [any(part.step_after for part in parts) for parts in plan.slots()]
    turns = [(after - before) / 1e6 for before, after in pairwise(begins)]
    alone, with_steps = (
        statistics.median(turn for turn, steps in zip(turns, stepping, strict=False) if steps == which)
        for which in (False, True)
    )
    forward = statistics.median((end - begin) / 1e6 for begin, end in zip(begins, ends, strict=True))
    return {"forward": forward, "backward": alone - forward, "step": max(0.0, with_steps - alone)}
