"""Several plans timed one after another by the same processes, and where a GPU's time goes in one of them.

The stage is built once. Each plan is two: the whole one, whose largest microbatch must fit in memory beside the
optimizers' states (twice, those of the stage's own run being there too, which stand for a reducer's buffers), and the
one of the workload's first global batches, which is run against the clock.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist

from lorafusion.measure import profiler
from lorafusion.measure.timers import free_memory
from lorafusion.plan import Plan, check
from lorafusion.runtime.rehearsal import rehearse
from lorafusion.runtime.spec import RunSpec
from lorafusion.runtime.training import TrainingRun
from lorafusion.workload import Workload

SLOWER = 0.98  # of the best, below which no smaller capacity is tried


def try_plans(spec: RunSpec, run: TrainingRun, execute: Callable[[TrainingRun], object], rank: int) -> None:
    """Write tokens a second of the spec's trials in turn, of which one that is clearly slower than the best before it
    is the last."""
    part = Workload.read(spec.part)
    rehearse(run, execute)
    throughputs: list[float] = []
    for trial in spec.trials:
        whole = run.again(run.workload, _read(trial.plan, run.workload))
        whole.hold_the_largest()
        del whole
        beginning = run.again(part, _read(trial.part, part))
        beginning.warm_up()
        throughputs.append(_throughput(beginning, execute))
        if rank == 0:
            with open(spec.throughputs, "a") as file:
                file.write(f"{throughputs[-1]}\n")
        del beginning
        free_memory()
        if throughputs[-1] < SLOWER * max(throughputs):
            break


def profile(spec: RunSpec, run: TrainingRun, execute: Callable[[TrainingRun], object]) -> list[dict[str, object]]:
    """What this process's GPU does while the beginning of the spec's only trial is run: rows of a class of kernels,
    with milliseconds and kernels for 1000 real tokens. How long it is idle is told by a run without the profiler."""
    part = Workload.read(spec.part)
    plan = _read(spec.trials[0].part, part)
    runs: list[TrainingRun] = []

    def prepare() -> Callable[[], object]:
        runs.append(run.again(part, plan))
        return partial(execute, runs[-1])

    rehearse(run, execute)
    run.again(part, plan).warm_up()
    prepare()()
    seconds = _seconds(runs[-1])
    spans = _while_the_clock_runs(profiler.trace(prepare), runs[-1])
    print(*profiler.unknown_kernels(spans), sep="\n", flush=True)
    scale = 1000 / plan.statistics.tokens
    parts = {name: profiler.Part(part.milliseconds * scale, part.kernels * scale)
             for name, part in profiler.at_full_speed(profiler.breakdown(spans, 1), 1e3 * seconds).items()}  # fmt: skip
    return profiler.csv_rows(parts)


def _while_the_clock_runs(spans: list[profiler.Span], run: TrainingRun) -> list[profiler.Span]:
    """Without what an executor has the device do before the run's clock starts, such as filling a reducer's buffers."""
    begin = max(span.end for span in spans) - 1e9 * _seconds(run)
    return [span for span in spans if span.begin >= begin]


def _seconds(run: TrainingRun) -> float:
    """Of a run that is over, on this process's clock."""
    run.record.clock.synchronize()
    run.record.readback.wait()
    return run.record.clock.seconds(run.record.begin, run.record.done[-1][1])


def _read(path: str, workload: Workload) -> Plan:
    plan = Plan.read(path)
    check(plan, workload, source=path)
    return plan


def _throughput(run: TrainingRun, execute: Callable[[TrainingRun], object]) -> float:
    """Of all processes the slowest's, so that they all go on or all end."""
    if dist.is_initialized():
        dist.barrier()
    execute(run)
    seconds = torch.tensor([_seconds(run)], device=run.pipeline.device)
    if dist.is_initialized():
        dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
    return run.plan.statistics.tokens / seconds.item()
