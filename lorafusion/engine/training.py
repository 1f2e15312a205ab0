"""What every executor shares: a stage with its adapters, their optimizers, the microbatches, the record of the run."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import torch
from safetensors.torch import save_file

from lorafusion.core.clock import Meter, free_memory
from lorafusion.core.plan import Microbatch, Plan
from lorafusion.core.workload import Workload
from lorafusion.data.packing import BatchBuilder, PackedBatch
from lorafusion.engine import graphs
from lorafusion.engine.adapters import AdapterTraining, gradients_of
from lorafusion.engine.events import EventLog
from lorafusion.engine.pipeline import Pipeline
from lorafusion.engine.record import BACKWARD, FORWARD, STEP, WAIT, Record
from lorafusion.launch.heartbeat import Position
from lorafusion.model.lora import ActiveBatch
from lorafusion.model.loss import weighted_losses
from lorafusion.model.stage import Stage

LOGGER = logging.getLogger(__name__)
MOST_SIZES = 256  # of microbatches in a warm-up, each through two layers


class Around(Protocol):
    """What a system's `shard` makes of a stage: in its place it is called with a slot for the forward pass."""

    def attach(self, run: TrainingRun) -> None: ...

    def __call__(self, slot: int) -> torch.Tensor: ...


class TrainingRun:
    """One stage's part in the execution of a plan. An executor decides when `forward`, backward, `reduce` and `update`
    happen. Slots are counted from the beginning of the plan; this replica has one microbatch of each."""

    def __init__(
        self,
        workload: Workload,
        plan: Plan,
        stage: Stage,
        active: ActiveBatch,
        builder: BatchBuilder,
        pipeline: Pipeline,
        position: Position,
        autocast: torch.dtype | None = None,
        around: Around | None = None,
        meter: Meter | None = None,
        needs_graphs: bool = False,
    ) -> None:
        """autocast: the dtype to compute in where that is not the parameters' own. meter: by default the device's.
        needs_graphs: of a plan with buckets; without it a stage that cannot be captured is an eager one."""
        self.workload, self.plan, self.stage, self.pipeline = workload, plan, stage, pipeline
        self.active, self.position, self._builder, self.autocast = active, position, builder, autocast
        self.around, self.needs_graphs = around, needs_graphs
        if around is not None:
            around.attach(self)
        self.record = Record(meter or Meter(pipeline.device))
        slots = plan.slots()
        self.microbatches: list[Microbatch] = [slot[pipeline.replica] for slot in slots]
        self.steps = [tuple(sorted({adapter for part in slot for adapter in part.step_after})) for slot in slots]
        self.evaluations = _evaluations(workload, self.steps)
        self.adapters = [AdapterTraining(stage, job) for job in workload.jobs]
        self.begin = 0  # the slot to begin with
        self.events_kept: dict[str, int] = {}  # bytes of the files of events that are of the slots before it
        self.gradients: Path | None = None  # where those of the adapters' first steps are written to
        self.graphs: graphs.StageGraphs | None = None  # of this stage, once they are captured
        self.without_graphs = ""  # why they cannot be
        self._buckets = {item.tokens: (item, builder.logit_rows(item, plan.microbatches)) for item in plan.buckets}
        self._batches: dict[int, PackedBatch] = {}  # of the slots in flight
        self._evaluation_batches: dict[int, list[PackedBatch]] = {}  # by adapter

    def again(self, workload: Workload, plan: Plan) -> TrainingRun:
        """Another plan, of the same adapters on other samples perhaps, on the same stage; optimizers begin anew."""
        builder = BatchBuilder(workload, self._builder.source, self.pipeline.device)
        return TrainingRun(workload, plan, self.stage, self.active, builder, self.pipeline, self.position,
                           self.autocast, self.around, self.record.meter, self.needs_graphs)  # fmt: skip

    @property
    def norm_dtype(self) -> torch.dtype:
        return self.adapters[0].norm_dtype

    def forward(self, slot: int, x: torch.Tensor | None) -> torch.Tensor:
        """A slot's microbatch through this stage.

        x: hidden states [1, T, H], None on the first stage. Returns hidden states, or on the last stage the scalar
        sum of the adapters' shares of their losses, which is what backward starts from.
        """
        return self._forward(slot, x, self._built(self.microbatches[slot]))

    def _built(self, microbatch: Microbatch) -> PackedBatch:
        """On the host."""
        return self._builder.build(microbatch, *self._buckets.get(microbatch.bucket, ()))

    def forward_of_an_idle_replica(self, slot: int) -> torch.Tensor:
        """The microbatch that another replica has in a slot in which this one has none, through a stage that is the
        whole model, with a loss of zero: where replicas must do together what none of them can do alone."""
        other = next(microbatch for microbatch in self.plan.slots()[slot] if not microbatch.noop)
        batch = self._built(other)
        return self._forward(slot, None, replace(batch, weights=torch.zeros_like(batch.weights)))

    def _forward(self, slot: int, x: torch.Tensor | None, batch: PackedBatch) -> torch.Tensor:
        self.position.set(f"the forward of microbatch {slot}")
        with self.record.timing(FORWARD, slot):
            if self.graphs is not None:
                out = self.graphs(batch, x)
            else:
                self._batches[slot] = batch = batch.on(self.pipeline.device)
                out = self._through(batch, x)
            if self.stage.is_last:
                if not self.microbatches[slot].noop:
                    self._note_losses(slot, batch, out.detach())
                out = out.sum()
        out.register_hook(lambda _: self._begin_backward(slot))
        return out

    def _begin_backward(self, slot: int) -> None:
        """The first thing in a slot's backward pass. Activation checkpointing recomputes the forward in it, for which
        its microbatch must be the active one."""
        self.position.set(f"the backward of microbatch {slot}")
        self.active.batch = self._batches.pop(slot, None)  # a graph has its own
        begin = self.record.meter.mark()
        # By autograd's own end, as some executors call it themselves. Its callbacks run on the stream of the pass.
        torch.autograd.Variable._execution_engine.queue_callback(lambda: self.record.note(BACKWARD, slot, begin))

    def _through(self, batch: PackedBatch, x: torch.Tensor | None) -> torch.Tensor:
        """Hidden states, or on the last stage each token's share of its adapter's loss."""
        self.active.batch = batch
        dtype = self.autocast
        with torch.autocast(self.pipeline.device.type, dtype) if dtype else nullcontext():
            out = self.stage(batch.input_ids if self.stage.is_first else x, batch.position_ids, batch.borders)
            if self.stage.is_last:
                out = weighted_losses(out, self.stage.lm_head.weight, batch.labels, batch.weights, batch.rows)
        return out

    def _note_losses(self, slot: int, batch: PackedBatch, losses: torch.Tensor) -> None:
        """losses [T]."""
        real = [segment.tokens for segment in self.microbatches[slot].segments]
        parts = [(part.adapter, part.batch, tokens) for part, tokens in zip(batch.segments, real, strict=True)]

        def note(values: list[float]) -> None:
            for (adapter, index, tokens), value in zip(parts, values, strict=True):
                if self.record.kept:
                    self.record.losses.append((adapter, index, value))
                self.record.event(slot=slot, adapter=adapter, batch=index, tokens=tokens, loss=value)

        without_padding = losses[: batch.segments[-1].stop]
        losses_of_parts = without_padding.split([segment.stop - segment.start for segment in batch.segments])
        self.record.readback.add(torch.stack([part.sum() for part in losses_of_parts]), note)

    def wait_for_everyone(self) -> None:
        """Until all processes of the run are at this point."""
        if self.pipeline.size * self.pipeline.replicas > 1:
            self.position.waiting("the other processes")
        self.pipeline.wait_for_everyone()

    @contextmanager
    def waiting(self, what: str) -> Iterator[None]:
        """Within it this process, or on a GPU its device, waits for another one. what: for a person."""
        self.position.waiting(what)
        with self.record.timing(WAIT):
            yield

    def reduce(self, slot: int) -> torch.Tensor | None:
        """After a slot's backward pass: for the adapters that step, the gradient summed over the replicas, and the
        squared norm of this stage's part, [n]; None where none steps."""
        stepping = [self.adapters[index] for index in self.steps[slot]]
        if not stepping:
            return None
        if self.pipeline.replicas > 1:
            with self.waiting(f"the other replicas' gradients after microbatch {slot}"):
                self.pipeline.sum_over_replicas([gradient for adapter in stepping for gradient in adapter.gradients])
        return self.squared_norms(slot)

    def squared_norms(self, slot: int) -> torch.Tensor:
        """Of this stage's part of the gradients of the adapters that step after a slot, [n]."""
        with self.record.timing(STEP, slot):
            return torch.stack([self.adapters[index].squared_norm() for index in self.steps[slot]])

    def update(self, slot: int, squared_norms: torch.Tensor | None) -> None:
        """Step the slot's adapters by the norms [n] of their gradients over all stages, and note that it is done."""
        if squared_norms is not None:
            self.position.set(f"the optimizer steps after microbatch {slot}")
            with self.record.timing(STEP, slot):
                self._step(slot, squared_norms)
        self.record.finished(slot)

    def _step(self, slot: int, squared_norms: torch.Tensor) -> None:
        stepping = [self.adapters[index] for index in self.steps[slot]]
        self._save_gradients(stepping)
        steps = [adapter.steps for adapter in stepping]
        norms = [adapter.step(squared) for adapter, squared in zip(stepping, squared_norms, strict=True)]
        stopped = [adapter.stopped for adapter in stepping]
        if self.stage.is_last:
            values = torch.stack([*norms, *(stop.to(norms[0]) for stop in stopped)])
            self._note_steps(slot, self.steps[slot], steps, values)

    def _save_gradients(self, stepping: Sequence[AdapterTraining]) -> None:
        """Write this stage's part of the gradients of first steps, summed over the replicas, before any clipping."""
        if self.gradients is None:
            return
        for adapter in stepping:
            if adapter.steps == adapter.job.start:
                whole = gradients_of(adapter)  # replicas over which the stage is sharded make it together
                if self.pipeline.replica == 0:
                    folder = self.gradients / adapter.job.name
                    folder.mkdir(parents=True, exist_ok=True)
                    save_file(whole, folder / f"stage-{self.pipeline.index}.safetensors")

    def _note_steps(self, slot: int, adapters: tuple[int, ...], steps: list[int], values: torch.Tensor) -> None:
        def note(values: list[float]) -> None:
            norms, stopped = values[: len(adapters)], values[len(adapters) :]
            for adapter, step, norm, stop in zip(adapters, steps, norms, stopped, strict=True):
                rate = self.workload.jobs[adapter].learning_rate_at(step)
                self.record.event(slot=slot, adapter=adapter, step=step, norm=norm, learning_rate=rate)
                if stop and adapter not in self.record.stopped:
                    self.record.stopped.add(adapter)
                    self.record.event(slot=slot, adapter=adapter, stopped=step)

        self.record.readback.add(values, note)

    def step(self, slot: int) -> None:
        """`reduce` and `update` at once, for executors whose stages all come here at the same time."""
        norms = self.reduce(slot)
        self.update(slot, None if norms is None else self.pipeline.sum_over_stages(norms))

    def evaluation_batches(self, adapter: int) -> list[PackedBatch]:
        """A job's evaluation samples as microbatches of at most the plan's capacity, this replica's share of them."""
        if adapter not in self._evaluation_batches:
            every = self._builder.evaluations(adapter, self.plan.capacity)
            self._evaluation_batches[adapter] = every[self.pipeline.replica :: self.pipeline.replicas]
        return self._evaluation_batches[adapter]

    @torch.no_grad()
    def evaluate(self, slot: int, adapter: int, receive: Callable, send: Callable) -> None:
        """A job's evaluation samples through this stage, without dropout; the last stage notes their loss."""
        self.stage.eval()
        step, total = self.adapters[adapter].steps, torch.zeros(1, dtype=torch.float64, device=self.pipeline.device)
        for index, batch in enumerate(self.evaluation_batches(adapter)):
            self.position.set(f"part {index} of an evaluation of {self.workload.jobs[adapter].name}")
            x = receive() if not self.stage.is_first else None
            out = self._through(batch, x)
            if self.stage.is_last:
                total = total + out.sum()
            else:
                send(out)
        self.stage.train()
        if self.stage.is_last:
            self.record.readback.add(
                total, lambda values: self.record.event(slot=slot, adapter=adapter, step=step, evaluation=values[0])
            )

    def warm_up(self) -> None:
        """Warm up before timing: one forward and backward of the largest microbatch on the whole stage, then one of
        each size, at most `MOST_SIZES`, through two layers, so that all kernels are compiled. (With the largest alone,
        fused kernels compiled for up to 38 s within runs of 5 s.) `warm_up_executor` comes before and does the same for
        the executor.

        Graphs are captured instead where the plan has buckets for them. Raises `CaptureError` where a run that needs
        them has a stage that cannot be captured.

        It leaves no trace: the gradients are zeroed, the losses forgotten, and the masks are stateless. Every process
        calls it.
        """
        if self._capture():
            return
        with self._without_events():
            for slot in self._largest(1):
                self.backward_alone(slot)
            with self.stage.first_layers_alone():
                for slot in of_each_size(self._computed, MOST_SIZES):
                    self.backward_alone(slot)

    def _capture(self) -> bool:
        """Capture this stage's graphs; False where they have no place. Each process may do without them for itself."""
        recorder, active = graphs.recorder_of(self.pipeline.device), self.active
        if not self._buckets or recorder is None or not (active.stacks or active.one_adapter):
            return False
        parts = [part for part in self.microbatches if not part.noop]
        shape = {(part.bucket, not active.stacks and part.segments[0].adapter): part for part in parts}
        hidden = self._hidden(max((part.length for part in parts), default=0))
        ends = (None if self.stage.is_first else hidden, hidden[0, :, 0].double() if self.stage.is_last else hidden)
        batches, lanes = [self._built(part) for part in shape.values()], self.pipeline.size - self.pipeline.index
        try:
            self.graphs = graphs.StageGraphs(self._through, active.stacks, batches, ends, lanes, recorder)
            LOGGER.info(f"{self.pipeline.name}: {self.graphs.usage}")
        except graphs.CaptureError as error:
            if self.needs_graphs:
                raise graphs.CaptureError(error.status, f"graphs: found on, expected auto or off: {error}") from error
            self.without_graphs = str(error)
            LOGGER.warning(f"{self.pipeline.name}: without graphs: {error}")
        for adapter in self.adapters:
            adapter.zero_gradients()
        free_memory()  # of a capture that was broken off, which an error and its frames hold in a circle
        return self.graphs is not None

    def hold_the_largest(self) -> None:
        """As many of the largest microbatches as this stage holds at a time, forward and then backward, to see whether
        they fit in memory. Leaves no trace either."""
        with self._without_events():
            outs = [self._alone(slot) for slot in self._largest(self.pipeline.size - self.pipeline.index)]
            while outs:
                self._backward_alone(outs.pop())

    @property
    def _computed(self) -> list[Microbatch]:
        """What this process computes in each slot. Replicas that only compute together need the same answer."""
        if self.around is None:
            return self.microbatches
        return [max(parts, key=lambda part: part.length) for parts in self.plan.slots()]

    def _largest(self, count: int) -> list[int]:
        """The slots of the longest microbatches, of which there may be fewer."""
        lengths = [microbatch.length for microbatch in self._computed]
        return sorted((slot for slot in range(len(lengths)) if lengths[slot]), key=lambda slot: -lengths[slot])[:count]

    @contextmanager
    def _without_events(self) -> Iterator[None]:
        """Within it nothing is written of losses, and those that were noted are forgotten."""
        events, self.record.events = self.record.events, None
        yield
        self.record.wait()
        self.record.losses.clear()
        self.record.events = events

    def backward_alone(self, slot: int) -> None:
        """A slot's forward and backward pass on this stage, whatever the others do."""
        self._backward_alone(self._alone(slot))

    def _alone(self, slot: int) -> torch.Tensor:
        if self.around is not None:
            return self.around(slot)
        x = None
        if not self.stage.is_first:
            x = self._hidden(self.microbatches[slot].length).requires_grad_()
        return self.forward(slot, x).sum()

    def _hidden(self, tokens: int) -> torch.Tensor:
        """Hidden states of zeros."""
        shape = (1, tokens, self.pipeline.hidden_size)
        return torch.zeros(shape, device=self.pipeline.device, dtype=self.pipeline.dtype)

    def _backward_alone(self, out: torch.Tensor) -> None:
        out.backward()
        for adapter in self.adapters:
            adapter.zero_gradients()

    def kept_by_forward(self, slot: int) -> int:
        """Bytes on a GPU that a slot's forward pass keeps for its backward pass, which follows."""
        before = torch.cuda.memory_allocated()
        out = self._alone(slot)
        kept = torch.cuda.memory_allocated() - before
        self._backward_alone(out)
        return kept

    def open_events(self, folder: Path) -> None:
        """Write events to this replica's file of a folder, after those that its checkpoint has noted."""
        if self.stage.is_last:
            name = f"replica-{self.pipeline.replica}.jsonl"
            self.record.events = EventLog(folder / name, keep=self.events_kept.get(name, 0))

    @property
    def ends(self) -> list[int]:
        """The slots after which a job has made its last step, in order."""
        last = {adapter: slot for slot, stepping in enumerate(self.steps) for adapter in stepping}
        return sorted(set(last.values()))


def _evaluations(workload: Workload, steps: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """For each slot the adapters whose loss is measured after its steps: at intervals, and at the end."""
    steps_made = [job.start for job in workload.jobs]
    out = []
    for stepping in steps:
        due = []
        for adapter in stepping:
            job = workload.jobs[adapter]
            steps_made[adapter] += 1
            regular = job.evaluate_every and steps_made[adapter] % job.evaluate_every == 0
            if job.evaluation and (regular or steps_made[adapter] == len(job.batches)):
                due.append(adapter)
        out.append(tuple(due))
    return out


def of_each_size(microbatches: Sequence[Microbatch], most: int) -> list[int]:
    """A microbatch of each length with each number of adapters; of more than `most` such, evenly spread ones."""
    slots: dict[tuple[int, int], int] = {}
    for slot, microbatch in enumerate(microbatches):
        if not microbatch.noop:
            slots.setdefault((len(microbatch.segments), microbatch.length), slot)
    ordered = [slots[size] for size in sorted(slots)]
    return ordered[:: max(1, -(-len(ordered) // most))] if most else []
