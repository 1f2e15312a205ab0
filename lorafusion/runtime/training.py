"""What every executor shares: a stage with its adapters, their optimizers, the microbatches, the record of the run."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from lorafusion.data.packing import BatchBuilder, PackedBatch
from lorafusion.measure.timers import Clock, Mark
from lorafusion.models.lora import ActiveBatch, adapter_parameters
from lorafusion.models.loss import weighted_losses
from lorafusion.models.stage import Stage
from lorafusion.plan import Plan
from lorafusion.runtime.pipeline import Pipeline
from lorafusion.workload import Workload


@dataclass
class Record:
    """What happened on this stage: when, and with which losses. Tensors and marks stay on the device until read.

    done: after the backward of microbatch k, and the steps that follow it, the mark (k, mark).
    losses: an adapter's share of its global batch's loss in one microbatch, (adapter, batch, scalar).
    position: what the stage is doing, for the message of a failure.
    """

    clock: Clock
    begin: Mark | None = None
    done: list[tuple[int, Mark]] = field(default_factory=list)
    losses: list[tuple[int, int, torch.Tensor]] = field(default_factory=list)
    position: str = "start-up"

    def start(self) -> None:
        self.begin = self.clock.mark()

    def finished(self, microbatch: int) -> None:
        self.done.append((microbatch, self.clock.mark()))


class TrainingRun:
    """One stage's part in the execution of a plan. An executor decides when `forward`, backward and `step` happen."""

    def __init__(
        self,
        workload: Workload,
        plan: Plan,
        stage: Stage,
        active: ActiveBatch,
        builder: BatchBuilder,
        pipeline: Pipeline,
    ) -> None:
        self.workload, self.plan, self.stage, self.pipeline = workload, plan, stage, pipeline
        self.active = active
        self.record = Record(Clock(pipeline.device))
        self.batches: list[PackedBatch | None] = [
            None if microbatch.noop else builder.build(microbatch) for microbatch in plan.microbatches
        ]
        self.optimizers = [
            torch.optim.AdamW(adapter_parameters(stage, job), lr=job.learning_rate, weight_decay=job.weight_decay)
            for job in workload.jobs
        ]

    def forward(self, index: int, x: torch.Tensor | None) -> torch.Tensor:
        """A microbatch through this stage.

        x: hidden states [1, T, H], None on the first stage. Returns hidden states, or on the last stage the scalar
        sum of the adapters' shares of their losses, which is what backward starts from.
        """
        self.record.position = f"the forward of microbatch {index}"
        batch = self.batches[index]
        self.active.batch = batch
        source = batch.input_ids if self.stage.is_first else x
        out = self.stage(source, batch.position_ids, batch.borders)
        if not self.stage.is_last:
            return out
        losses = weighted_losses(out, batch.labels, batch.weights)
        for segment in batch.segments:
            share = losses[segment.start : segment.stop].detach().sum()
            self.record.losses.append((segment.adapter, segment.batch, share))
        return losses.sum()

    def step(self, index: int) -> None:
        """Step the optimizers that the plan names after this microbatch, and note that it is done."""
        for adapter in self.plan.microbatches[index].step_after:
            self.optimizers[adapter].step()
            self.optimizers[adapter].zero_grad(set_to_none=True)
        self.record.finished(index)

    def warm_up(self) -> None:
        """One forward and backward of the largest microbatch on this stage alone, so that the clock starts warm.

        It leaves no trace: the gradients are dropped, the losses forgotten, and the masks are stateless.
        """
        sizes = [microbatch.tokens for microbatch in self.plan.microbatches]
        index = sizes.index(max(sizes))
        x = None
        if not self.stage.is_first:
            shape = (1, sizes[index], self.pipeline.hidden_size)
            x = torch.zeros(shape, device=self.pipeline.device, dtype=self.pipeline.dtype, requires_grad=True)
        self.forward(index, x).sum().backward()
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        self.record.losses.clear()
        self.record.clock.synchronize()
