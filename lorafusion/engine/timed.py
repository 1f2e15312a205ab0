"""A run against the clock, from its warm-up to its report: the same for every system and for whoever wants the time.

Here alone the clock is started and stopped, and the peak of memory is reset.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from lorafusion.core.machine import process_seconds
from lorafusion.core.plan import Plan
from lorafusion.core.workload import Workload
from lorafusion.engine.executor import Executor, prepared
from lorafusion.engine.process import gathered
from lorafusion.engine.training import TrainingRun
from lorafusion.engine.warm_up import warm_up_executor

Shares = Sequence[tuple[int, int, float]]  # as `Record.losses`


def timed(run: TrainingRun, execute: Executor, place: Callable[[], Sequence] = tuple) -> bool:
    """Warm up a run's executor and its stage, and train its plan against the clock; False if it was asked to stop
    before the end. Every process calls it.

    place: puts the run, once it is warm, where it is to begin, and returns what its executor takes besides it.
    """
    warm_up_executor(run, execute)
    run.position.set("the warm-up")
    run.warm_up()
    run.position.set("the start of the run")
    arguments = place()
    with ready(run, execute) as train:
        return train(*arguments)


@contextmanager
def ready(run: TrainingRun, execute: Executor) -> Iterator[Callable[..., bool]]:
    """Within it a run's executor is set up, as in `prepared`. What it gives trains the run by the clock: all processes
    begin together, and each one's ends when its device has done all its work."""
    record = run.record
    with prepared(run, execute) as train:

        def train_by_the_clock(*arguments: object) -> bool:
            record.steps_before = [adapter.steps_made() for adapter in run.adapters]
            record.meter.reset_peak_memory()
            run.wait_for_everyone()
            record.meter.synchronize()
            record.spans.clear()
            record.begin, record.start_up = record.meter.point(), process_seconds()
            finished = train(*arguments)
            record.end = record.meter.point()
            run.position.set("the end of the run")
            record.wait()
            return finished

        yield train_by_the_clock


def report_of(run: TrainingRun) -> dict:
    """What is known of a run that was timed, the same on every process; all of them call it.

    start_up: seconds from the start of a process to that of the clock, the most over the processes.
    seconds: when the first process was done with its slots, from its start on, [slot, seconds] each.
    times: of each process its passes, steps and waits (`Record.times`).
    clocks: of each process the seconds from its start to its end, by its device's clock and by the host's.
    losses: of each job those of its global batches; None where a share of one is missing or there are too many.
    steps: of each job the optimizer steps that changed its weights while the clock ran, the fewest over the processes.
    stopped: the jobs that some process has stopped, as a gradient was not finite.
    peak_memory: bytes, the largest over the processes.
    graphs: of each process what its stage's graphs took (`graphs.Usage`), or why it could not be captured, or None;
    left out where no process has either.
    """
    record = run.record
    steps = [adapter.steps_made() - before for adapter, before in zip(run.adapters, record.steps_before, strict=True)]
    names = [job.name for job in run.workload.jobs]
    mine = {
        "start_up": record.start_up,
        "seconds": [[slot, record.meter.seconds(record.begin.mark, mark)] for slot, mark in record.done],
        "times": record.times(),
        "clocks": list(record.meter.duration(record.begin, record.end)),
        "losses": record.losses,
        "steps": dict(zip(names, steps, strict=True)),
        "stopped": [adapter.job.name for adapter in run.adapters if bool(adapter.stopped)],
        "peak_memory": record.meter.peak_memory() + (run.graphs.usage.uncounted if run.graphs else 0),
        "graphs": run.graphs.usage._asdict() if run.graphs else run.without_graphs or None,
    }
    everyone = gathered(mine)
    shares = [share for part in everyone for share in part["losses"]]
    graphs = [part["graphs"] for part in everyone]
    return ({"graphs": graphs} if any(graphs) else {}) | {
        "start_up": max(part["start_up"] for part in everyone),
        "seconds": everyone[0]["seconds"],
        "times": [part["times"] for part in everyone],
        "clocks": [part["clocks"] for part in everyone],
        "losses": losses_by_job(run.workload, run.plan, shares) if record.kept else {},
        "steps": {name: min(part["steps"][name] for part in everyone) for name in names},
        "stopped": [name for name in names if any(name in part["stopped"] for part in everyone)],
        "peak_memory": max(part["peak_memory"] for part in everyone),
    }


def losses_by_job(workload: Workload, plan: Plan, shares: Shares) -> dict[str, list[float | None]]:
    """For each job the loss of each of its global batches, the sum of the shares in its microbatches; None where there
    are not just as many shares as the plan has segments of the batch. Batches that were trained before are 0."""
    arrived: Counter[tuple[int, int]] = Counter()
    sums: dict[tuple[int, int], float] = {}
    for adapter, batch, share in shares:
        arrived[adapter, batch] += 1
        sums[adapter, batch] = sums.get((adapter, batch), 0.0) + share
    segments = [segment for microbatch in plan.microbatches for segment in microbatch.segments]
    expected = Counter((part.adapter, workload.jobs[part.adapter].batch_of(part.samples[0])) for part in segments)
    return {
        job.name: [
            sums.get((index, batch), 0.0) if arrived[index, batch] == expected[index, batch] else None
            for batch in range(len(job.batches))
        ]
        for index, job in enumerate(workload.jobs)
    }
