"""1F1B without flush: one endless stream of microbatches, each adapter stepping in mid-stream (LoRAFusion, mLoRA).

Stage s does S-1-s forwards, then one forward and one backward in turn to the end of the plan. After the backward of a
microbatch that ends an adapter's global batch, the stage steps that adapter at once, on its own parameters. That the
next batch's forward comes after the step on every stage is the plan's dependency rule, checked before the run.
"""

from __future__ import annotations

from collections import deque

import torch

from lorafusion.errors import UserError
from lorafusion.runtime.training import TrainingRun


def execute(run: TrainingRun) -> None:
    """Train a plan on this stage; every stage of the pipeline calls this."""
    if run.plan.flush and run.plan.stages > 1:
        raise UserError(f"the plan of {run.plan.system} flushes its pipeline; the streaming executor does not")
    stream = _Stream(run)
    count = len(run.plan.microbatches)
    ahead = min(run.pipeline.size - 1 - run.pipeline.index, count)
    run.record.start()
    for index in range(count + ahead):
        if index < count:
            stream.forward(index)
        if index >= ahead:
            stream.backward(index - ahead)
    run.pipeline.finish()


class _Stream:
    """The forwards and backwards of one stage, with what lies between them."""

    def __init__(self, run: TrainingRun) -> None:
        self.run = run
        self.in_flight: deque[tuple[torch.Tensor | None, torch.Tensor | None]] = deque()

    def forward(self, index: int) -> None:
        microbatch, pipeline = self.run.plan.microbatches[index], self.run.pipeline
        if microbatch.noop:
            self.in_flight.append((None, None))
            return
        x = None
        if not pipeline.is_first:
            x = pipeline.receive_hidden(microbatch.tokens).requires_grad_()
        out = self.run.forward(index, x)
        if not pipeline.is_last:
            pipeline.send_hidden(out)
        self.in_flight.append((x, out))

    def backward(self, index: int) -> None:
        microbatch, pipeline = self.run.plan.microbatches[index], self.run.pipeline
        x, out = self.in_flight.popleft()
        if microbatch.noop:
            self.run.record.finished(index)
            return
        self.run.record.position = f"the backward of microbatch {index}"
        # Activation checkpointing recomputes the forward here, for which this microbatch must be the active one.
        self.run.active.batch = self.run.batches[index]
        gradient = None if pipeline.is_last else pipeline.receive_gradient(microbatch.tokens)
        torch.autograd.backward(out, gradient)
        if x is not None:
            pipeline.send_gradient(x.grad)
        self.run.step(index)
