"""Whole training steps of all implementations of a bench, timed in turns.

Each is a `TrainingRun` as a worker has it, on modules of its own around the same base weights; a middle stage takes
random hidden states and gradients from no neighbours. What is timed is a turn: microbatches in a row, each with its
forward and backward pass and the step of every adapter, for which the host waits no more than in a real run.
"""

from __future__ import annotations

import copy
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch

from lorafusion.core.clock import Duration, canary, free_memory
from lorafusion.core.config import read_model
from lorafusion.core.files import write
from lorafusion.core.machine import provenance
from lorafusion.core.seals import seal
from lorafusion.core.workload import Job, Sample
from lorafusion.data.packing import BatchBuilder
from lorafusion.data.tokens import Tokens
from lorafusion.engine.pipeline import Pipeline
from lorafusion.engine.training import TrainingRun
from lorafusion.lab import profiler
from lorafusion.lab.experiments.bench import Variant
from lorafusion.lab.experiments.experiment import Point
from lorafusion.lab.experiments.steps_suite import StepsBench, StepsSuite, workload_and_plan
from lorafusion.lab.experiments.timing import median_ratio
from lorafusion.lab.table.result import require_clocks, require_steps, row
from lorafusion.launch.heartbeat import Position
from lorafusion.launch.outcome import FaultyRunError
from lorafusion.model import lora
from lorafusion.model.liger import is_installed, use_liger
from lorafusion.model.stage import Stage, build_stage, named_generator

WARM_UPS = 3  # microbatches of each arm before any is timed
# Of all arms in turns on a GPU, as in `timing`: its power limit lowers the clock only after a while.
WARM_SECONDS = 2.0
PROFILED = 2  # microbatches


class RandomTokens:
    """Uniform tokens, drawn once: fetching them costs the host no more than reading a store."""

    def __init__(self, vocabulary: int) -> None:
        self.vocabulary = vocabulary
        self._kept: dict[tuple[int, int], Tokens] = {}

    def tokens(self, job: Job, sample: Sample) -> Tokens:
        key = job.seed, sample.id
        if key not in self._kept:
            generator = named_generator(job.seed, f"sample-{sample.id}", torch.device("cpu"))
            self._kept[key] = Tokens(torch.randint(self.vocabulary, (sample.tokens,), generator=generator), 1)
        return self._kept[key]

    def labels(self, job: Job, sample: Sample) -> int:
        return sample.tokens - 1


@dataclass(frozen=True)
class Shared:
    """What the arms of a bench have in common. x, gradient [1, T, H]: what a middle stage's neighbours would send; None
    where there is no neighbour. allocated: bytes on a GPU once all this is there."""

    stage: Stage
    pipeline: Pipeline
    position: Position
    source: RandomTokens
    x: torch.Tensor | None
    gradient: torch.Tensor | None
    allocated: int

    @classmethod
    def of(cls, bench: StepsBench, suite: StepsSuite, position: Position) -> Shared:
        config = read_model(bench.model)
        device, dtype = torch.device(suite.device), getattr(torch, suite.dtype)
        index, count = bench.stage
        stage = build_stage(config, index=index, count=count, device=device, dtype=dtype, seed=suite.seed,
                            checkpointing=bench.checkpointing)  # fmt: skip

        def hidden(name: str) -> torch.Tensor:
            shape, generator = (1, bench.tokens, config.hidden_size), named_generator(suite.seed, name, device)
            return torch.randn(shape, device=device, dtype=dtype, generator=generator)

        x = None if stage.is_first else hidden("x")
        gradient = None if stage.is_last else hidden("gradient")
        pipeline = Pipeline(0, 1, 1, device, dtype, config.hidden_size)
        source = RandomTokens(config.vocab_size)
        return cls(stage, pipeline, position, source, x, gradient, _allocated(device))


class Trainer:
    """An arm, ready to train."""

    def __init__(self, bench: StepsBench, arm: Variant, shared: Shared) -> None:
        self.x, self.gradient = shared.x, shared.gradient
        device, dtype = shared.pipeline.device, shared.pipeline.dtype
        stage = own_modules(shared.stage)
        if device.type == "cuda" and is_installed():
            use_liger(stage)
        workload, plan = workload_and_plan(bench, arm)
        builder = BatchBuilder(workload, shared.source, device)
        if arm.adapters:
            kind = lora.fused if arm.implementation.startswith("fused") else lora.peft
            adapter_dtype = torch.float32 if arm.implementation == "peft" else dtype
            active = lora.inject_adapters(stage, workload.jobs, adapter_dtype, kind)
        else:
            # Nobody trains, so nothing would ask for gradients, and the backward pass would be left out. They go
            # through all layers; those of the first layer's q, k and v are all that training does not compute.
            if stage.is_first:
                stage.model.embed_tokens.register_forward_hook(lambda _module, _inputs, out: out.requires_grad_())
            active = lora.ActiveBatch()
            workload = workload.model_copy(update={"jobs": ()})
            without_steps = tuple(batch.model_copy(update={"step_after": ()}) for batch in plan.microbatches)
            plan = plan.model_copy(update={"microbatches": without_steps})
        # PEFT as shipped has adapters in float32 and trains under autocast.
        autocast = dtype if arm.implementation == "peft" and device.type == "cuda" else None
        self.run = TrainingRun(workload, plan, stage, active, builder, shared.pipeline, shared.position, autocast)
        self.wanted = {job.name: 0 for job in workload.jobs}  # steps
        self.clocks: list[Duration] = []  # of turns

    def microbatch(self, slot: int) -> None:
        """As `stream.execute` trains one."""
        for adapter in self.run.steps[slot]:
            self.wanted[self.run.workload.jobs[adapter].name] += 1
        x = None if self.x is None else self.x.detach().requires_grad_()
        out = self.run.forward(slot, x)
        torch.autograd.backward(out, self.gradient)
        self.run.step(slot)

    def train(self, microbatches: int | None = None) -> None:
        """The plan's first microbatches, by default all of them."""
        for slot in range(microbatches or len(self.run.microbatches)):
            self.microbatch(slot)

    def seconds(self) -> float:
        """The time of a microbatch in a turn. One before the clock starts lets the host get ahead of the device, and
        finds memory where other arms' activations were."""
        meter = self.run.record.meter
        start = meter.point()
        self.train(1)
        begin = meter.mark()
        self.train()
        end = meter.point()
        self.finish()
        self.clocks.append(meter.duration(start, end))
        return meter.seconds(begin, end.mark) / len(self.run.microbatches)

    def finish(self) -> None:
        """Wait for the device, and forget what was noted on the way."""
        record = self.run.record
        record.wait()
        record.losses.clear()
        record.done.clear()

    def require_sound(self) -> None:
        """Raise `FaultyRunError` unless every step was made, and the device's clock went as the host's."""
        adapters = self.run.adapters
        report = {"steps": {adapter.job.name: adapter.steps_made() for adapter in adapters},
                  "stopped": [adapter.job.name for adapter in adapters if adapter.stopped]}  # fmt: skip
        if adapters:
            require_steps(report, self.wanted)
        require_clocks(self.clocks, len(self.clocks))


def own_modules(stage: Stage) -> Stage:
    """A copy of a stage with the same weights in the same memory."""
    return copy.deepcopy(stage, {id(weight): weight for weight in stage.parameters()})


@dataclass
class Arms:
    """The arms of a bench that train, and why the others do not: a status and a note."""

    trainers: dict[Variant, Trainer] = field(default_factory=dict)
    lost: dict[Variant, tuple[str, str]] = field(default_factory=dict)

    def attempt(self, arm: Variant, work: Callable[[Variant], float]) -> float | None:
        """The result of some work of an arm; None where the memory does not suffice, after which the arm is lost."""
        try:
            return work(arm)
        except torch.OutOfMemoryError as error:
            note = str(error)
        self.lose(arm, "oom", note)
        return None

    def lose(self, arm: Variant, status: str, note: str) -> None:
        self.lost[arm] = status, note
        self.trainers.pop(arm, None)
        free_memory()

    def seconds(self, arm: Variant) -> float | None:
        """As its trainer's; None where it ran out of memory."""
        return self.attempt(arm, lambda arm: self.trainers[arm].seconds())


def bench_rows(point: Point, repeat: int, profile: Path) -> Iterator[list[dict]]:
    """The rows about times and memory, and then, on a GPU, those about how busy it is; what a microbatch's time goes
    into is written to `profile`, as CSV. An implementation that runs out of memory is rows that say so."""
    device = torch.device(point.settings.device)
    rows = [
        row("time", value, "steady", {"cell": f"bench~{point.name}/{name}"}, implementation=name)
        for name, value in canary(device).items()
    ]
    with tempfile.TemporaryDirectory(prefix="lorafusion-") as folder:
        arms, measured = measure(point, repeat, Position(Path(folder), 0))
        yield rows + measured
        if device.type == "cuda":
            origin = provenance("cuda")
            identity = {"suite": point.suite, "bench": point.name, "gpu_name": origin["gpu_name"],
                        "git_sha": origin["git_sha"]}  # fmt: skip
            rows, shares = profiled(point, arms, identity)
            write(profile, profiler.csv_text(shares))
            seal(profile)
            yield rows


def measure(point: Point, repeat: int, position: Position) -> tuple[Arms, list[dict]]:
    """All arms, and the rows about their memory and their speed."""
    bench, suite = point.subject, point.settings
    torch.manual_seed(suite.seed)  # PEFT's own dropout draws from torch's generator
    shared, arms, rows = Shared.of(bench, suite, position), Arms(), []
    for arm in bench.arms:
        peak = arms.attempt(arm, partial(_first_turn, bench, shared, arms))
        if peak is None:
            rows.append(_failed(point, arm, "peak_memory", arms))
        elif shared.pipeline.device.type == "cuda":
            rows.append(_row(point, arm, "peak_memory", peak))
        print(f"{point.name}: {arm.name}: {_gibibytes(peak)}", flush=True)
    times = seconds(bench, arms, shared.pipeline.device, suite.rounds, repeat)
    for arm in list(arms.trainers):
        try:
            arms.trainers[arm].require_sound()
        except FaultyRunError as fault:
            arms.lose(arm, fault.status, str(fault))
    return arms, rows + speed_rows(point, arms, times)


def _first_turn(bench: StepsBench, shared: Shared, arms: Arms, arm: Variant) -> float:
    """Build an arm and let it train a turn, in which it comes to hold all that it ever does. Returns the bytes of its
    peak, of which what the arms before it hold is no part: their adapters and moments, whose bytes are counted exactly.
    What libraries keep for themselves is in the peak of the first that needs it."""
    device = shared.pipeline.device
    free_memory()
    others = _allocated(device) - shared.allocated
    arms.trainers[arm] = Trainer(bench, arm, shared)
    meter = arms.trainers[arm].run.record.meter
    meter.reset_peak_memory()
    arms.trainers[arm].train()
    arms.trainers[arm].finish()
    return meter.peak_memory() - others


def seconds(bench: StepsBench, arms: Arms, device: torch.device, rounds: int, seed: int) -> dict[Variant, list[float]]:
    """The time of a microbatch of each arm in each of the rounds, whose order is shuffled. An arm that runs out of
    memory on the way is lost. Compare arms by the ratios of each round, as those of `timing.seconds`."""
    begin, microbatches = time.perf_counter(), 0
    least = WARM_SECONDS if device.type == "cuda" else 0.0
    while arms.trainers and (microbatches < WARM_UPS or time.perf_counter() - begin < least):
        for arm in list(arms.trainers):
            arms.seconds(arm)
        microbatches += bench.microbatches
    order, shuffle = list(arms.trainers), random.Random(seed)
    times: dict[Variant, list[float]] = {arm: [] for arm in order}
    for index in range(rounds):
        shuffle.shuffle(order)
        for arm in [arm for arm in order if arm in arms.trainers]:
            taken = arms.seconds(arm)
            if taken is not None:
                times[arm].append(taken)
        print(f"round {index + 1} of {rounds}", flush=True)
    return {arm: times[arm] for arm in arms.trainers}


def speed_rows(point: Point, arms: Arms, times: dict[Variant, list[float]]) -> list[dict]:
    """The rows about the arms' times, and those without a value of the arms that were lost."""
    rows, times = [], {arm: times[arm] for arm in arms.trainers}
    by_implementation = {arm.implementation: samples for arm, samples in times.items()}
    frozen, peft = by_implementation.get("frozen"), by_implementation.get("peft-bf16")
    for arm, samples in times.items():
        median = statistics.median(samples)
        rows.append(_row(point, arm, "time", median))
        rows.append(_row(point, arm, "throughput", point.subject.tokens / median))
        if arm.adapters and frozen:
            rows.append(_row(point, arm, "overhead", median_ratio(samples, frozen) - 1))
        if arm.adapters and peft and arm.implementation != "peft-bf16":
            rows.append(_row(point, arm, "speedup", median_ratio(peft, samples)))
    for arm in arms.lost:
        metrics = ("time", "throughput", *(("overhead", "speedup") if arm.adapters else ()))
        rows += [_failed(point, arm, metric, arms) for metric in metrics]
    return rows


def profiled(point: Point, arms: Arms, identity: dict) -> tuple[list[dict], list[dict]]:
    """How busy the GPU is with each arm, as rows, and what it does meanwhile, as those of `profiler`."""
    rows, shares = [_failed(point, arm, "busy", arms) for arm in arms.lost], []
    for arm, trainer in arms.trainers.items():
        spans = profiler.trace(partial(trainer.train, PROFILED))
        trainer.finish()
        if not spans:
            print(f"{point.name}: {arm.name}: the profiler saw no kernels", flush=True)
            continue
        parts = profiler.breakdown(spans, PROFILED)
        busy = profiler.busy_share(parts)
        rows.append(_row(point, arm, "busy", busy))
        shares += profiler.csv_rows(parts, **identity, **arm.model_dump())
        print(f"{point.name}: {arm.name}: {busy:.1%} busy", *profiler.unknown_kernels(spans), sep="\n", flush=True)
    return rows, shares


def _row(point: Point, arm: Variant, metric: str, value: float | None, status: str = "ok", why: str = "") -> dict:
    """A number of an arm, or why there is none."""
    bench, (index, count) = point.subject, point.subject.stage
    cell = {
        "cell": f"bench~{point.name}/implementation~{arm.implementation}/adapters~{arm.adapters}",
        "tokens": bench.tokens,
        "adapters": arm.adapters,
    }
    window = "whole" if metric == "peak_memory" else "steady"
    notes = [f"stage {index} of {count}"] if count > 1 else []
    notes += [f"{bench.checkpointing:.0%} of the layers recomputed"] if bench.checkpointing else []
    note = ", ".join(notes) if status == "ok" else why[:200]
    return row(metric, value, window, cell, status=status, implementation=arm.implementation, note=note)


def _failed(point: Point, arm: Variant, metric: str, arms: Arms) -> dict:
    """A row that a lost arm should have had, without a value."""
    return _row(point, arm, metric, None, *arms.lost[arm])


def _allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def _gibibytes(size: float | None) -> str:
    return "out of memory" if size is None else f"{size / 2**30:.2f} GiB"
