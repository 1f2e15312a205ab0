"""What the training of a run costs besides its time: a part of its plan once more, after the clock has stopped.

On a GPU it is profiled, and what counts are kernels, launches and the time in which the device is busy; on a CPU its
operators are counted. Time is not what is measured here, so that the measuring may slow the run down.
"""

from __future__ import annotations

import faulthandler
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from lorafusion.core.clock import Meter, Point
from lorafusion.core.plan import Microbatch, Plan, statistics_of
from lorafusion.core.workload import Workload
from lorafusion.engine.executor import Executor
from lorafusion.engine.process import Process, gathered
from lorafusion.engine.task import train_plan
from lorafusion.engine.timed import ready
from lorafusion.engine.training import TrainingRun
from lorafusion.lab import operators, profiler
from lorafusion.model.liger import is_used

COUNTING = "the cost of the run"  # what a process is doing then
# Of the part, at least: half a second of an H200 with Llama-3.1-8B, and of a CPU with the tiny model.
TOKENS = {"cuda": 8192, "cpu": 512}
PATIENCE = 120.0  # seconds
UNCHANGED = {"learning_rate": 0.0, "evaluation": (), "evaluate_every": None}


class Counts(NamedTuple):
    """What one process's device did. busy_ms: not counted where it waits for another device; None on a CPU."""

    operators: int | None = None
    kernels: int | None = None
    launches: int | None = None
    busy_ms: float | None = None


@dataclass
class Watched(Meter):
    """A meter that has something watch what is done between the start and the end of its clock."""

    device: torch.device
    watch: Callable[[], AbstractContextManager]
    _watching: AbstractContextManager | None = field(default=None, init=False)

    def point(self) -> Point:
        if self._watching is None:
            self._watching = self.watch()
            self._watching.__enter__()
            return super().point()
        point = super().point()
        self._watching.__exit__(None, None, None)
        return point


def train_with_cost(process: Process) -> dict:
    """The task that trains as `train` does, and then says what that costs besides time."""
    run, execute, report = train_plan(process)
    if report["finished"]:
        process.keep(report | {"pending": "cost"})
        report["cost"] = cost_or_reason(run, execute)
    return report


def cost_or_reason(run: TrainingRun, execute: Executor) -> dict:
    """`cost_of` a run, or why it is not known: a run that ended well has its time all the same."""
    try:
        return cost_of(run, execute)
    except RuntimeError as error:  # no memory, no profiler, another process that is gone
        return {"unknown": " ".join(str(error).split())[:300]}


def cost_of(run: TrainingRun, execute: Executor) -> dict:
    """The cost of a run that is over, the same on every process; all of them call it. Adapters stay as they are, but
    the run cannot be resumed: what its optimizers hold is given up for the sake of memory.

    part: which of its microbatches were run once more, with so many tokens. counts: theirs, all processes together.
    layers: of the whole model. The rest is as the first process has it: see `structure`.
    """
    run.position.set(COUNTING)
    first = structure(run)
    run.adapters.clear()
    part = beginning(run.plan, TOKENS[run.pipeline.device.type])
    with patience(PATIENCE):
        processes = gathered((first, measured(run, execute, part)))
    stages = [stage for stage, _ in processes[: run.pipeline.size]]
    counted = [counts._asdict() for _, counts in processes]
    extent = f"the first {len(part.microbatches)} of {len(run.plan.microbatches)} microbatches"
    return first | {
        **{name: sum(stage[name] for stage in stages) for name in ("layers", "recomputed_layers")},
        "part": extent,
        "tokens": part.statistics.tokens,
        "counts": {
            name: sum(counts[name] for counts in counted) for name in Counts._fields if counted[0][name] is not None
        },
    }


@contextmanager
def patience(seconds: float) -> Iterator[None]:
    """This process ends where what is within takes longer: a process that failed leaves others waiting for it."""
    faulthandler.dump_traceback_later(seconds, exit=True)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


def structure(run: TrainingRun) -> dict:
    """What decides on the cost of a stage and its adapters: dtypes, layers that are recomputed, whose kernels."""
    adapter, stage = run.adapters[0], run.stage
    frozen = next(parameter for parameter in stage.parameters() if not parameter.requires_grad)
    moments = next(iter(adapter.optimizer.state.values()))["exp_avg"]
    return {
        "dtypes": {
            "model": operators.dtype_name(frozen),
            "adapters": operators.dtype_name(next(iter(adapter.parameters.values()))),
            "gradients": operators.dtype_name(adapter.gradients[0]),
            "moments": operators.dtype_name(moments),
            "autocast": str(run.autocast).removeprefix("torch.") if run.autocast else None,
        },
        "layers": stage.last - stage.first,
        "recomputed_layers": stage.checkpointed - stage.first,
        "liger": is_used(stage),
    }


def beginning(plan: Plan, tokens: int) -> Plan:
    """The first slots of a plan, up to a step: as few as have so many tokens."""
    taken: list[Microbatch] = []
    for slot in plan.slots():
        taken += slot
        ended = any(microbatch.step_after for microbatch in slot)
        if ended and sum(microbatch.tokens for microbatch in taken) >= tokens:
            break
    return plan.model_copy(
        update={"microbatches": tuple(taken), "statistics": statistics_of(taken, plan.capacity)},
    )


def unchanging(workload: Workload) -> Workload:
    """A workload that changes no adapter."""
    return workload.model_copy(update={"jobs": tuple(job.model_copy(update=UNCHANGED) for job in workload.jobs)})


def measured(run: TrainingRun, execute: Executor, part: Plan) -> Counts:
    """What this process's device does for a part of a run's plan."""
    if run.pipeline.device.type != "cuda":
        operations: list[operators.Operation] = []
        watched(run, execute, part, lambda: operators.Counting(operations.append))
        return Counts(operators=len(operations))
    return counts_of(profiled(run, execute, part))


def counts_of(spans: Sequence[profiler.Span]) -> Counts:
    """Of what a GPU did."""
    busy = profiler.busy_nanoseconds(profiler.without_communication(spans)) / 1e6
    return Counts(kernels=len(spans), launches=len({span.launch for span in spans}), busy_ms=busy)


def profiled(run: TrainingRun, execute: Executor, part: Plan) -> list[profiler.Span]:
    """What the GPU does while the clock of a part of a run's plan runs."""
    profiler.start()
    tracer = profiler.Tracer()
    watched(run, execute, part, lambda: tracer)
    return tracer.spans


def watched(run: TrainingRun, execute: Executor, part: Plan, watch: Callable[[], AbstractContextManager]) -> None:
    """Train a part of a run's plan, on adapters that do not change, within what watches it."""
    repeat = run.again(unchanging(run.workload), part)
    repeat.record.meter = Watched(run.pipeline.device, watch)
    with ready(repeat, execute) as train:
        train()
