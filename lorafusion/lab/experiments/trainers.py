"""The arms of the experiment `steps`, ready to train.

Each is a `TrainingRun` as a worker has it, on modules of its own around the same base weights; a middle stage takes
random hidden states and gradients from no neighbours.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch

from lorafusion.core.clock import Duration
from lorafusion.core.config import ModelConfig, read_model
from lorafusion.core.workload import Job, Sample
from lorafusion.data.packing import BatchBuilder
from lorafusion.data.tokens import Tokens
from lorafusion.engine.pipeline import Pipeline
from lorafusion.engine.training import TrainingRun
from lorafusion.lab.experiments.bench import DeviceEntry, Variant
from lorafusion.lab.experiments.implementations import IMPLEMENTATIONS
from lorafusion.lab.experiments.steps_suite import StepsBench, workload_and_plan
from lorafusion.lab.table.result import require_clocks, require_steps
from lorafusion.launch.heartbeat import Position
from lorafusion.model.liger import is_installed, use_liger
from lorafusion.model.stage import Stage, build_stage, named_generator


class RandomTokens:
    """Uniform tokens, drawn once: fetching them costs the host no more than reading a store."""

    def __init__(self, vocabulary: int) -> None:
        self.vocabulary = vocabulary
        self._kept: dict[tuple[int, int, int], Tokens] = {}

    def tokens(self, job: Job, sample: Sample) -> Tokens:
        key = job.seed, sample.id, sample.tokens
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
    def of(cls, bench: StepsBench, suite: DeviceEntry, position: Position, config: ModelConfig | None = None) -> Shared:
        """config: by default the bench's model; x and gradient have the bench's tokens."""
        config = config or read_model(bench.model)
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
        return cls(stage, pipeline, position, source, x, gradient, allocated(device))


class Trainer:
    """An arm, ready to train."""

    def __init__(self, bench: StepsBench, arm: Variant, shared: Shared, like: Trainer | None = None) -> None:
        """like: of the same arm with other microbatches, whose modules are used; bench: of no more tokens than that
        which `shared` is of."""
        self.x, self.gradient = (
            None if hidden is None else hidden[:, : bench.tokens] for hidden in (shared.x, shared.gradient)
        )
        device, dtype = shared.pipeline.device, shared.pipeline.dtype
        workload, plan = workload_and_plan(bench, arm)
        builder, implementation = BatchBuilder(workload, shared.source, device), IMPLEMENTATIONS[arm.implementation]
        if like is None:
            # Modules of its own, with the same weights in the same memory.
            stage = copy.deepcopy(shared.stage, {id(weight): weight for weight in shared.stage.parameters()})
            if device.type == "cuda" and is_installed():
                use_liger(stage)
            active = implementation.inject(stage, workload.jobs, dtype)
            # Nobody trains a frozen model, so nothing would ask for gradients, and the backward pass would be left out.
            # They go through all layers; those of the first layer's q, k and v are all that training does not compute.
            if stage.is_first and not arm.adapters:
                stage.model.embed_tokens.register_forward_hook(lambda _module, _inputs, out: out.requires_grad_())
        else:
            stage, active = like.run.stage, like.run.active
        if not arm.adapters:
            workload = workload.model_copy(update={"jobs": ()})
            without_steps = tuple(batch.model_copy(update={"step_after": ()}) for batch in plan.microbatches)
            plan = plan.model_copy(update={"microbatches": without_steps})
        autocast = dtype if implementation.autocasts_on(device) else None
        self.run = TrainingRun(workload, plan, stage, active, builder, shared.pipeline, shared.position, autocast)
        self.wanted = {job.name: 0 for job in workload.jobs}  # steps
        self.clocks: list[Duration] = []  # of turns

    def microbatch(self, slot: int, passed: Callable[[], object] = lambda: None) -> None:
        """As `stream.execute` trains one. passed: called after each of its passes."""
        for adapter in self.run.steps[slot]:
            self.wanted[self.run.workload.jobs[adapter].name] += 1
        x = None if self.x is None else self.x.detach().requires_grad_()
        out = self.run.forward(slot, x)
        passed()
        torch.autograd.backward(out, self.gradient)
        passed()
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
        self.require_steps()
        require_clocks(self.clocks, len(self.clocks))

    def require_steps(self) -> None:
        """Raise `FaultyRunError` unless every step was made."""
        adapters = self.run.adapters
        if adapters:
            steps = {adapter.job.name: adapter.steps_made() for adapter in adapters}
            stopped = [adapter.job.name for adapter in adapters if adapter.stopped]
            require_steps({"steps": steps, "stopped": stopped}, self.wanted)


def allocated(device: torch.device) -> int:
    """Bytes on a GPU; none on a CPU."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
