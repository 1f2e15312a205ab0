"""Several plans timed one after another by the same processes, and where a GPU's time goes in one of them.

The stage is built once. Each trial has two plans. The full plan's largest microbatch must fit in memory, beside two
sets of optimizer states: the trial's own, and those of the run that the stage was built with, which stand for a
reducer's buffers. The plan of the first global batches is timed.
"""

from __future__ import annotations

from contextlib import ExitStack

from lorafusion.core.clock import free_memory
from lorafusion.core.plan import Plan, check
from lorafusion.core.workload import Workload
from lorafusion.engine.build import build_run, executor_of
from lorafusion.engine.executor import Executor
from lorafusion.engine.process import Process
from lorafusion.engine.timed import ready, report_of, timed
from lorafusion.engine.training import TrainingRun
from lorafusion.engine.warm_up import warm_up_executor
from lorafusion.lab import profiler
from lorafusion.lab.table.result import require_whole, whole_seconds
from lorafusion.lab.tuned import TrialOptions

# Of the best, below which no smaller capacity is tried. Where the GPU waits for the host a trial is not much surer:
# mLoRA's on an H200 had up to 17 % more than its runs, with a capacity that was taken.
SLOWER = 0.95


def try_capacities(process: Process) -> dict:
    """The task that tries plans in turn; what they gave is in the file of throughputs."""
    options = TrialOptions.of(process.spec)
    try_plans(options, *_built(process, options), process.rank)
    return {}


def profile_trial(process: Process) -> dict:
    """The task that says where the time goes in the first trial."""
    options = TrialOptions.of(process.spec)
    return {"profile": profile(options, *_built(process, options))}


def _built(process: Process, options: TrialOptions) -> tuple[TrainingRun, Executor]:
    """A run of the first trial, and its executor."""
    source = options.trials[0].plan
    workload, plan = Workload.read(process.spec.workload), Plan.read(source)
    process.require_processes(plan, source)
    return build_run(process, workload, plan), executor_of(process.spec.system)


def try_plans(options: TrialOptions, run: TrainingRun, execute: Executor, rank: int) -> None:
    """Write tokens a second of the trials in turn, of which one that is clearly slower than the best before it
    is the last. Raises `FaultyRunError` for one that did not train all of its part."""
    part = Workload.read(options.part)
    warm_up_executor(run, execute)  # once before the largest microbatches take the memory that connections need
    throughputs: list[float] = []
    for trial in options.trials:
        whole = run.again(run.workload, _read(trial.plan, run.workload))
        whole.hold_the_largest()
        del whole
        throughputs.append(_throughput(run.again(part, _read(trial.part, part)), execute))
        if rank == 0:
            with open(options.throughputs, "a") as file:
                file.write(f"{throughputs[-1]}\n")
        free_memory()
        if throughputs[-1] < SLOWER * max(throughputs):
            break


def _throughput(run: TrainingRun, execute: Executor) -> float:
    """Tokens a second of a trial, the same on all processes, so that they all go on or all end."""
    timed(run, execute)
    report = report_of(run)
    require_whole(report, run.workload, run.plan)
    return run.workload.tokens / whole_seconds(report)


def profile(options: TrialOptions, run: TrainingRun, execute: Executor) -> list[dict[str, object]]:
    """What this process's GPU does while the beginning of the only trial is run: rows of a class of kernels,
    with milliseconds and kernels for 1000 real tokens. How long it is idle is told by a run without the profiler."""
    part = Workload.read(options.part)
    plan = _read(options.trials[0].part, part)
    untraced = run.again(part, plan)
    timed(untraced, execute)
    seconds = _seconds(untraced)
    del untraced
    with _Traced(run, part, plan, execute) as traced:
        spans = traced.while_the_clock_ran(profiler.trace(traced, before=traced.prepare))
    print(*profiler.unknown_kernels(spans), sep="\n", flush=True)
    scale = 1000 / part.tokens
    breakdown = profiler.at_full_speed(profiler.breakdown(spans, 1), 1e3 * seconds)
    parts = {name: profiler.Part(part.milliseconds * scale, part.kernels * scale) for name, part in breakdown.items()}
    return profiler.csv_rows(parts)


class _Traced:
    """Runs of a plan on a warm stage that are made and trained one after another. What their executor sets up is set up
    while nothing is traced, and put back likewise."""

    def __init__(self, run: TrainingRun, workload: Workload, plan: Plan, execute: Executor) -> None:
        self._stage_of, self._workload, self._plan, self._execute = run, workload, plan, execute
        self._stack = ExitStack()

    def __enter__(self) -> _Traced:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def prepare(self) -> None:
        self._stack.close()
        self.run = self._train = None  # with its optimizers' states, before there are others
        self.run = self._stage_of.again(self._workload, self._plan)
        self._train = self._stack.enter_context(ready(self.run, self._execute))

    def __call__(self) -> None:
        self._train()

    def while_the_clock_ran(self, spans: list[profiler.Span]) -> list[profiler.Span]:
        """Those of the newest run's spans that came after the start of its clock, at whose end the last one ended."""
        begin = max(span.end for span in spans) - 1e9 * _seconds(self.run)
        return [span for span in spans if span.begin >= begin]


def _seconds(run: TrainingRun) -> float:
    """Of a run that is over, on this process's clock."""
    return run.record.meter.duration(run.record.begin, run.record.end).device


def _read(path: str, workload: Workload) -> Plan:
    plan = Plan.read(path)
    check(plan, workload, source=path)
    return plan
