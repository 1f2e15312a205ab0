"""1F1B without flush: one endless stream of microbatches, each adapter stepping in mid-stream (LoRAFusion, mLoRA).

Stage s does S-1-s forwards, then one forward and one backward in turn to the end of the plan. An adapter steps when all
stages have done the backward of its global batch. The gradient norm is a sum over the stages. Partial sums of squares
travel with the gradients from the last stage to the first. The total travels back with the hidden states, ahead of
those of slot k+S. No sample of the adapter's next batch enters before that slot (the plan's dependency rule, checked
before the run), so only the optimizer step waits for the norm.

At a checkpoint the stream runs dry, so that all stages are at the same slot: S-1 slots of filling and draining. So it
does after each step of a plan with `flush`.
"""

from collections import deque
from collections.abc import Iterator

import torch

from lorafusion.core.schema import UserError
from lorafusion.engine.pipeline import Expected
from lorafusion.engine.saving import Checkpoints
from lorafusion.engine.training import TrainingRun


def execute(run: TrainingRun, checkpoints: Checkpoints | None = None) -> bool:
    """Train a plan on this stage; every stage of the pipeline calls this. False if it was asked to stop before."""
    flush = run.plan.flush and run.plan.stages > 1
    if flush and checkpoints is not None:
        raise UserError(f"the plan of {run.plan.system} flushes its pipeline; it cannot be resumed from a checkpoint")
    count, begin = len(run.microbatches), run.begin
    while begin < count:
        end = count
        if flush:
            end = next(slot for slot in range(begin, count) if run.steps[slot] or slot == count - 1) + 1
        if checkpoints is not None:
            end = min(count, checkpoints.due(run, begin))
        stream = _Stream(run, begin, end, checkpoints)
        stream.run_through()
        begin = stream.end
        if checkpoints is not None:
            checkpoints.save(run, begin, last=stream.stopping or begin == count)
        if stream.stopping:
            return begin == count
    return True


class _Stream:
    """The slots [begin, end) on one stage; the end comes nearer when the run is asked to stop."""

    def __init__(self, run: TrainingRun, begin: int, end: int, checkpoints: Checkpoints | None) -> None:
        self.run, self.begin, self.end, self.checkpoints = run, begin, end, checkpoints
        self.stopping = False
        pipeline = run.pipeline
        self.in_flight: deque[tuple[torch.Tensor | None, torch.Tensor | None]] = deque()
        # Of slots that are not updated yet, added from the last stage to here.
        self.norms: dict[int, torch.Tensor | None] = {}
        if not pipeline.is_first:
            self.before = pipeline.from_before(self._from_before(), run.waiting)
        if not pipeline.is_last:
            self.after = pipeline.from_after(self._from_after(), run.waiting)

    def run_through(self) -> None:
        stages = self.run.pipeline.size
        ahead = stages - 1 - self.run.pipeline.index
        index = self.begin
        while index < self.end + ahead:
            if index >= self.begin + ahead:
                self._expect(index - ahead)
            if index < self.end:
                self._look_for_a_stop(index)
                self._update(index - stages)
                self._forward(index)
                if self.checkpoints is not None and index + 1 == len(self.run.microbatches):
                    self.checkpoints.no_more_forwards(index)
            if index >= self.begin + ahead:
                self._backward(index - ahead)
            index += 1
        for slot in range(max(self.begin, self.end - stages), self.end):
            self._update(slot)
        with self.run.waiting("its neighbours to take what was sent"):
            self.run.pipeline.finish_sends()
        self.before = self.after = None  # their generators hold this, and with it a run's memory

    def _expect(self, slot: int) -> None:
        """Post the receives of all that the stage after this one sends in a slot's backward pass, before anything is
        sent to it in this turn (`pipeline` says why). It needs nothing more of us for that."""
        if not self.run.pipeline.is_last:
            self.after.post((not self.run.microbatches[slot].noop) + bool(self.run.steps[slot]))

    def _look_for_a_stop(self, slot: int) -> None:
        if self.checkpoints is None or self.stopping:
            return
        stages = self.run.pipeline.size
        # Replicas wait for each other at steps, stages are at most `stages` slots apart: after the next step that this
        # stage has not made, whoever waited for it, or for a stage that waited, has gone on and said how far it is.
        undone = range(max(0, slot - (stages - 1 - self.run.pipeline.index)), len(self.run.steps))
        step = next((later for later in undone if self.run.steps[later]), slot)
        last = self.checkpoints.stop_after(slot, hold=max(slot, step) + 3 * stages)
        if last is not None and last < self.end:  # else it is in a later part of the plan
            self.stopping, self.end = True, last + 1

    def _forward(self, slot: int) -> None:
        microbatch, pipeline = self.run.microbatches[slot], self.run.pipeline
        if microbatch.noop:
            self.in_flight.append((None, None))
            return
        x = None if pipeline.is_first else self.before.next().requires_grad_()
        out = self.run.forward(slot, x)
        if not pipeline.is_last:
            pipeline.send_after(out)
        self.in_flight.append((x, out))

    def _backward(self, slot: int) -> None:
        pipeline = self.run.pipeline
        x, out = self.in_flight.popleft()
        if out is not None:
            gradient = None if pipeline.is_last else self.after.next()
            torch.autograd.backward(out, gradient)
            if x is not None:
                pipeline.send_before(x.grad)
        norms = self.run.reduce(slot)
        if norms is not None:
            if not pipeline.is_last:
                norms = norms + self.after.next()
            if not pipeline.is_first:
                pipeline.send_before(norms)
        self.norms[slot] = norms

    def _update(self, slot: int) -> None:
        """The steps and evaluations that follow a slot, once it is known how long the gradients are."""
        if slot < self.begin:
            return
        pipeline, norms = self.run.pipeline, self.norms.pop(slot)
        if norms is not None:
            if not pipeline.is_first:
                norms = self.before.next()
            if not pipeline.is_last:
                pipeline.send_after(norms)
        self.run.update(slot, norms)
        for adapter in self.run.evaluations[slot]:
            receive = None if pipeline.is_first else self.before.next
            self.run.evaluate(slot, adapter, receive, pipeline.send_after)

    def _from_before(self) -> Iterator[Expected]:
        """What the stage before sends, in its order: norms and evaluations where `_update` comes, hidden states."""
        stages, index = self.run.pipeline.size, self.begin
        while index < self.end + stages:
            yield from self._updates(index - stages)
            if index < self.end and not self.run.microbatches[index].noop:
                name = f"the hidden states of microbatch {index}"
                yield self.run.pipeline.hidden(self.run.microbatches[index].length, name)
            index += 1

    def _updates(self, slot: int) -> Iterator[Expected]:
        if not self.begin <= slot < self.end:
            return
        if self.run.steps[slot]:
            yield self._norms(slot)
        for adapter in self.run.evaluations[slot]:
            for batch in self.run.evaluation_batches(adapter):
                name = f"hidden states of an evaluation after microbatch {slot}"
                yield self.run.pipeline.hidden(batch.input_ids.shape[1], name)

    def _from_after(self) -> Iterator[Expected]:
        """What the stage after sends: the gradient of each slot, and norms where adapters step."""
        slot = self.begin
        while slot < self.end:
            if not self.run.microbatches[slot].noop:
                name = f"the gradient of microbatch {slot}"
                yield self.run.pipeline.hidden(self.run.microbatches[slot].length, name)
            if self.run.steps[slot]:
                yield self._norms(slot)
            slot += 1

    def _norms(self, slot: int) -> Expected:
        return Expected((len(self.run.steps[slot]),), self.run.norm_dtype, f"the norms after microbatch {slot}")
