"""Several plans timed one after another by the same processes, and where a GPU's time goes in one of them.

The stage is built once. Each plan is two: the whole one, whose largest microbatch must fit in memory beside two sets of
optimizers' states (the trial's own, and those of the run that the stage was built with, in place of a reducer's
buffers), and the one of the workload's first global batches, which is run against the clock.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist

from lorafusion.measure import profiler
from lorafusion.measure.timers import Mark, free_memory
from lorafusion.plan import Plan, check
from lorafusion.runtime.rehearsal import rehearse
from lorafusion.runtime.spec import RunSpec
from lorafusion.runtime.training import TrainingRun
from lorafusion.workload import Workload

# Of the best, below which no smaller capacity is tried. Where the GPU waits for the host a trial is not much surer:
# mLoRA's on an H200 had up to 17 % more than its runs, with a capacity that was taken.
SLOWER = 0.95


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
    timed = _Timed(partial(run.again, part, plan), execute)
    rehearse(run, execute)
    run.again(part, plan).warm_up()
    timed.prepare()
    run.wait_for_everyone()
    timed()
    seconds = _seconds(timed.run)
    spans = timed.while_the_clock_ran(profiler.trace(timed, before=timed.prepare))
    print(*profiler.unknown_kernels(spans), sep="\n", flush=True)
    scale = 1000 / plan.statistics.tokens
    parts = {name: profiler.Part(one.milliseconds * scale, one.kernels * scale)
             for name, one in profiler.at_full_speed(profiler.breakdown(spans, 1), 1e3 * seconds).items()}  # fmt: skip
    return profiler.csv_rows(parts)


class _Timed:
    """Runs that are made and executed one after another, and when the executor of the newest was done, which may work
    before the run's clock starts and after it stops, such as on a reducer's buffers."""

    def __init__(self, make: Callable[[], TrainingRun], execute: Callable[[TrainingRun], object]) -> None:
        self.make, self.execute = make, execute
        self.run: TrainingRun | None = None
        self.done: Mark | None = None

    def prepare(self) -> None:
        self.run = None  # with its optimizers' states, before there are others
        self.run = self.make()

    def __call__(self) -> None:
        self.execute(self.run)
        self.done = self.run.record.clock.mark()

    def while_the_clock_ran(self, spans: list[profiler.Span]) -> list[profiler.Span]:
        """Those of the newest run's spans that it had the device do."""
        seconds, record = _seconds(self.run), self.run.record
        stopped = max(span.end for span in spans) - 1e9 * record.clock.seconds(record.done[-1][1], self.done)
        return [span for span in spans if stopped - 1e9 * seconds <= span.begin < stopped]


def _seconds(run: TrainingRun) -> float:
    """Of a run that is over, on this process's clock."""
    run.record.wait()
    return run.record.clock.seconds(run.record.begin, run.record.done[-1][1])


def _read(path: str, workload: Workload) -> Plan:
    plan = Plan.read(path)
    check(plan, workload, source=path)
    return plan


def _throughput(run: TrainingRun, execute: Callable[[TrainingRun], object]) -> float:
    """Of all processes the slowest's, so that they all go on or all end."""
    run.wait_for_everyone()
    execute(run)
    seconds = torch.tensor([_seconds(run)], device=run.pipeline.device)
    if dist.is_initialized():
        dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
    return run.plan.statistics.tokens / seconds.item()
