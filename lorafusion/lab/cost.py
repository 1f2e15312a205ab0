"""What the training of a run costs besides its time: a part of its plan once more, after the clock has stopped.

On a GPU it is profiled, and what counts are kernels, launches and the time in which the device is busy; on a CPU its
operators are counted. Time is not what is measured here, so that the measuring may slow the run down.
"""

import faulthandler
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import NamedTuple

import torch
from peft.tuners.lora import Linear as PeftLinear

from lorafusion.core.clock import Meter, TimePoint, free_memory
from lorafusion.core.plan import Microbatch, Plan, statistics_of
from lorafusion.engine.executor import Executor
from lorafusion.engine.process import WorkerProcess, gathered
from lorafusion.engine.task import train_plan
from lorafusion.engine.timed import ready
from lorafusion.engine.training import TrainingRun
from lorafusion.lab import operators, profiler
from lorafusion.model.liger import install, is_used
from lorafusion.model.stage import Stage, is_gated_mlp

COUNTING = "the cost of the run"  # what a process is doing then
# Of the part, at least: half a second of an H200 with Llama-3.1-8B, and of a CPU with the tiny model.
TOKENS = {"cuda": 8192, "cpu": 512}
PATIENCE = 120.0  # seconds
FROZEN_TOKENS = {"cuda": 65536, "cpu": 512}  # that the frozen model is timed with, at least
UNCHANGED = {"learning_rate": 0.0, "evaluation": (), "evaluate_every": None}


class DeviceCounts(NamedTuple):
    """What one process's device did. busy_ms: not counted where it waits for another device; None on a CPU."""

    operators: int | None = None
    kernels: int | None = None
    launches: int | None = None
    busy_ms: float | None = None


class Watched(Meter):
    """A meter that has something watch what is done between the start and the end of its clock."""

    def __init__(self, device: torch.device, watcher: AbstractContextManager) -> None:
        super().__init__(device)
        self._watcher, self._runs = watcher, False

    def point(self) -> TimePoint:
        if not self._runs:
            self._runs = True
            self._watcher.__enter__()
            return super().point()
        point = super().point()
        self._watcher.__exit__(None, None, None)
        return point


def train_with_cost(process: WorkerProcess) -> dict:
    """The task that trains as `train` does, and then says what that costs besides time."""
    run, execute, report = train_plan(process)
    if report["finished"]:
        process.keep(report | {"pending": "cost"})
        for name, task in (("cost", cost_of), ("frozen", frozen_rate)):
            try:
                report[name] = task(run, execute)
            except RuntimeError as error:  # no memory, no profiler, another process that is gone
                # The run ended well, and has its time all the same.
                report[name] = {"unknown": " ".join(str(error).split())[:300]}
    return report


def cost_of(run: TrainingRun, execute: Executor) -> dict:
    """The cost of a run that is over, the same on every process; all of them call it. Adapters stay as they are, but
    the run cannot be resumed: what its optimizers hold is given up for the sake of memory.

    part: which of its microbatches were run once more, in so many slots, with so many tokens. counts: theirs, all
    processes together.
    layers: of the whole model. The rest is as the first process has it: see `structure`.
    """
    run.position.set(COUNTING)
    first = structure(run)
    run.adapters.clear()
    part = beginning(run.plan, TOKENS[run.pipeline.device.type])
    with patience(PATIENCE):
        processes = gathered((first, measured(run, execute, part)))
    stages = [stage for stage, _ in processes[: run.pipeline.size]]
    sums = [(name, [getattr(counts, name) for _, counts in processes]) for name in DeviceCounts._fields]
    return first | {
        **{name: sum(stage[name] for stage in stages) for name in ("layers", "recomputed_layers")},
        "part": f"the first {len(part.microbatches)} of {len(run.plan.microbatches)} microbatches",
        "slots": len(part.slots()),
        "tokens": part.statistics.tokens,
        "counts": {name: sum(values) for name, values in sums if values[0] is not None},
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
    statistics = statistics_of(taken, plan.capacity)
    return plan.model_copy(update={"microbatches": tuple(taken), "statistics": statistics})


def measured(run: TrainingRun, execute: Executor, part: Plan) -> DeviceCounts:
    """What this process's device does for a part of a run's plan."""
    again = repeated(run, part)
    if run.pipeline.device.type == "cuda":
        return counts_of(profiled(again, execute))
    operations: list[operators.Operation] = []
    watched(again, execute, operators.Counting(operations.append))
    return DeviceCounts(operators=len(operations))


def repeated(run: TrainingRun, part: Plan) -> TrainingRun:
    """A part of a run's plan, on adapters that do not change, with the graphs of the run."""
    jobs = tuple(job.model_copy(update=UNCHANGED) for job in run.workload.jobs)
    again = run.again(run.workload.model_copy(update={"jobs": jobs}), part)
    again.graphs = run.graphs
    return again


def frozen_rate(run: TrainingRun, execute: Executor) -> dict:
    """The throughput, in tokens a second, of the frozen model's passes in the beginning of a run's plan: the limit of
    what adapters can reach. Of a run that is over, on one process, whose kind stacks its adapters: others do more than
    to replace forwards of linears. Empty for the others. The stage has no adapters after it."""
    if run.pipeline.size * run.pipeline.replicas > 1 or not run.active.stacks:
        return {}
    run.graphs = None
    remove_adapters(run.stage)
    free_memory()
    part = beginning(run.plan, FROZEN_TOKENS[run.pipeline.device.type])
    microbatches = tuple(item.model_copy(update={"step_after": ()}) for item in part.microbatches)
    again = repeated(run, part.model_copy(update={"microbatches": microbatches}))
    again.warm_up()
    with ready(again, execute) as train:
        train()
    seconds = again.record.meter.seconds(again.record.begin.mark, again.record.end.mark)
    return {
        "throughput": part.statistics.tokens / seconds,
        "part": f"the first {len(part.microbatches)} of {len(run.plan.microbatches)} microbatches",
    }


def remove_adapters(stage: Stage) -> None:
    """Have a stage compute what the base model does, with a backward pass through all of it."""
    liger = is_used(stage)
    for module in stage.modules():
        if isinstance(module, PeftLinear):
            module.forward = module.get_base_layer().forward
        elif is_gated_mlp(module):
            vars(module).pop("forward", None)
    if liger:
        install(stage)
    if stage.is_first:
        # Nobody asks for a gradient else.
        stage.model.embed_tokens.register_forward_hook(lambda _module, _inputs, out: out.requires_grad_())


def counts_of(spans: Sequence[profiler.Span]) -> DeviceCounts:
    """Of what a GPU did."""
    busy = profiler.busy_nanoseconds(profiler.without_communication(spans)) / 1e6
    return DeviceCounts(kernels=len(spans), launches=len({span.launch for span in spans}), busy_ms=busy)


def profiled(run: TrainingRun, execute: Executor) -> list[profiler.Span]:
    """What the GPU does while the clock of a run on a warm stage runs."""
    profiler.start()
    tracer = profiler.Tracer()
    watched(run, execute, tracer)
    return tracer.spans


def watched(run: TrainingRun, execute: Executor, watcher: AbstractContextManager) -> None:
    """Train a run, and have something watch it while its clock runs."""
    run.record.meter = Watched(run.pipeline.device, watcher)
    with ready(run, execute) as train:
        train()
