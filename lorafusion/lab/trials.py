"""Several plans timed one after another by the same processes, and where a GPU's time goes in one of them.

The stage is built once. Each trial has two plans. The full plan's largest microbatch must fit in memory, beside two
sets of optimizer states: the trial's own, and those of the run that the stage was built with, which stand for a
reducer's buffers. The plan of the first global batches is timed.
"""

from lorafusion.core.clock import free_memory
from lorafusion.core.plan import Plan, check
from lorafusion.core.workload import Workload
from lorafusion.engine.build import build_run, executor_of
from lorafusion.engine.executor import Executor
from lorafusion.engine.process import WorkerProcess
from lorafusion.engine.timed import report_of, timed
from lorafusion.engine.training import TrainingRun
from lorafusion.engine.warm_up import warm_up_executor
from lorafusion.lab import profiler
from lorafusion.lab.cost import profiled
from lorafusion.lab.table.result import require_whole, whole_seconds
from lorafusion.lab.tuned import TrialOptions

# Of the best, below which no smaller capacity is tried. Where the GPU waits for the host a trial is not much surer:
# mLoRA's on an H200 had up to 17 % more than its runs, with a capacity that was taken.
SLOWER = 0.95


def try_capacities(process: WorkerProcess) -> dict:
    """The task that tries plans in turn; what they gave is in the file of throughputs."""
    options = TrialOptions.of(process.spec)
    try_plans(options, *_built(process, options), process.rank)
    return {}


def profile_trial(process: WorkerProcess) -> dict:
    """The task that says where the time goes in the first trial."""
    options = TrialOptions.of(process.spec)
    return {"profile": profile(options, *_built(process, options))}


def _built(process: WorkerProcess, options: TrialOptions) -> tuple[TrainingRun, Executor]:
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
            with open(options.throughputs, "a" if throughputs[1:] else "w") as file:  # of a first try that was killed
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
    clock = untraced.record
    seconds = clock.meter.duration(clock.begin, clock.end).device
    del untraced  # with its optimizers' states, before there are others
    spans = profiled(run.again(part, plan), execute)
    print(*profiler.unknown_kernels(spans), sep="\n", flush=True)
    scale = 1000 / part.tokens
    breakdown = profiler.at_full_speed(profiler.breakdown(spans, 1), 1e3 * seconds)
    parts = {
        name: profiler.KernelTotals(part.milliseconds * scale, part.kernels * scale) for name, part in breakdown.items()
    }
    return profiler.csv_rows(parts)


def _read(path: str, workload: Workload) -> Plan:
    plan = Plan.read(path)
    check(plan, workload, source=path)
    return plan
