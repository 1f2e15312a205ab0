"""A stage's passes as CUDA graphs: the host launches a whole pass at once, where it launched hundreds of kernels.

A *lane* is the memory of one microbatch in flight. It holds what the microbatch is, the stage's input and the gradient
of its output; and for each bucket of the plan a graph of the forward and one of the backward pass, captured on the
lane's pool of memory. A microbatch is in one bucket, so the buckets share the pool: the largest is captured first, and
what its backward pass frees is where the next ones lie.

A graph reads and writes the same memory at each replay. So all that it depends on is on the device and copied there
before: nothing of a microbatch is known to the host while it is captured but what its bucket says. What a replay leaves
is copied before anyone gets it, for the lane's next microbatch overwrites it. Adapters' gradients are added to in
place.

PEFT's forward has the host choose the one adapter of a microbatch. So there each adapter has graphs of its own.
"""

import time
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from traceback import extract_tb
from typing import Any, NamedTuple, Protocol

import torch
from torch.autograd.function import once_differentiable

from fused_lora import AdapterStack
from lorafusion.core.clock import free_memory
from lorafusion.data.packing import PackedBatch
from lorafusion.launch.outcome import FaultyRunError

Through = Callable[[PackedBatch, torch.Tensor | None], torch.Tensor]
Work = Callable[[], None]


class Recorder(Protocol):
    """How a device's work is captured. pool: memory that several graphs share. rehearse: do the work once before it is
    captured, which compiles its kernels. capture: of the work; returns what replays it. memory: bytes that the process
    has of the device, and of these the ones in use."""

    def pool(self) -> Any: ...

    def rehearse(self, work: Work) -> None: ...

    def capture(self, work: Work, pool: Any) -> Work: ...

    def memory(self) -> tuple[int, int]: ...


class CudaRecorder:
    """A GPU's. All work is on one stream: autograd remembers the stream on which a leaf was first used."""

    def __init__(self, device: torch.device) -> None:
        self.device, self._stream = device, torch.cuda.Stream(device)

    def pool(self) -> Any:
        free_memory()  # of what the rehearsal left: a pool takes nothing that the allocator keeps for others
        return torch.cuda.graph_pool_handle()

    def rehearse(self, work: Work) -> None:
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            work()
        torch.cuda.current_stream(self.device).wait_stream(self._stream)

    def capture(self, work: Work, pool: Any) -> Work:
        graph = torch.cuda.CUDAGraph()
        # Other threads, such as NCCL's, may go on with what a capture forbids.
        capture = torch.cuda.graph(graph, pool, self._stream, capture_error_mode="thread_local")
        with self._left_as_it_was(pool), torch.cuda.stream(self._stream), capture:
            work()
        return graph.replay

    @contextmanager
    def _left_as_it_was(self, pool: Any) -> Iterator[None]:
        """Where a capture is broken off, torch forgets to tell its allocator and its generator, which then refuse to
        empty the cache and to draw."""
        try:
            yield
        except RuntimeError:
            with suppress(RuntimeError):  # of a capture that was ended all the same
                torch._C._cuda_endAllocateToPool(self.device.index, pool)
                torch._C._cuda_releasePool(self.device.index, pool)
            generator = torch.cuda.default_generators[self.device.index]
            generator.graphsafe_set_state(generator.clone_state())
            raise

    def memory(self) -> tuple[int, int]:
        free_memory()
        return torch.cuda.memory_reserved(self.device), torch.cuda.memory_allocated(self.device)


def recorder_of(device: torch.device) -> Recorder | None:
    """None for a device without graphs."""
    return CudaRecorder(device) if device.type == "cuda" else None


class Usage(NamedTuple):
    """What the graphs of a stage took: seconds to capture them; bytes of the device; of these the ones that no tensor
    holds, which torch's peak of memory does not count."""

    graphs: int
    seconds: float
    bytes: int
    uncounted: int

    def __str__(self) -> str:
        return f"{self.graphs} graphs, captured in {self.seconds:.1f} s, take {self.bytes / 2**30:.2f} GiB"


class CaptureError(FaultyRunError):
    """A stage that cannot be captured, and why."""


@contextmanager
def _refused(buckets: int) -> Iterator[None]:
    """Within it torch's errors are `CaptureError`: no memory, a wait for the device, what no graph can hold."""
    try:
        yield
    except RuntimeError as error:
        cause = error  # the end of a capture that was broken off is an error itself
        while isinstance(cause.__context__, RuntimeError):
            cause = cause.__context__
        if isinstance(cause, torch.OutOfMemoryError):
            raise CaptureError("oom", f"graphs of {buckets} buckets do not fit in memory") from error
        place = extract_tb(cause.__traceback__)[-1]
        reason = str(cause).partition("\n")[0]
        raise CaptureError("crash", f"{Path(place.filename).name}:{place.lineno}: {reason}") from error


@dataclass
class _Passes:
    """Both passes of a bucket's microbatches in a lane, on the same tensors each time. out, dx: what replays leave."""

    batch: PackedBatch
    x: torch.Tensor | None
    gradient: torch.Tensor
    out: torch.Tensor | None = None
    dx: torch.Tensor | None = None
    replay_forward: Work | None = None
    replay_backward: Work | None = None

    def forward(self, through: Through) -> None:
        self.out = through(self.batch, self.x)

    def backward(self) -> None:
        out, self.out = self.out, self.out.detach()  # without its graph, and the activations that it keeps
        torch.autograd.backward(out, self.gradient)
        if self.x is not None:
            self.dx, self.x.grad = self.x.grad, None

    def both(self, through: Through) -> None:
        self.forward(through)
        self.backward()

    def capture(self, through: Through, recorder: Recorder, pool: Any) -> None:
        self.replay_forward = recorder.capture(lambda: self.forward(through), pool)
        self.replay_backward = recorder.capture(self.backward, pool)
        # The first launch of a graph puts it on the device. Later the host might wait there for other stages' messages.
        self.replay_forward()
        self.replay_backward()

    def fill(self, batch: PackedBatch, x: torch.Tensor | None) -> None:
        """Copy a microbatch from the host's memory and its hidden states from the device's; nobody waits for it."""
        for target, source in zip(self.batch.tensors, batch.tensors, strict=True):
            target.copy_(source, non_blocking=True)
        if self.x is not None:
            self.x.detach().copy_(x.detach())


class StageGraphs:
    """The graphs of one stage; in place of the stage it is called with a microbatch and its hidden states.

    Each call must be followed by the backward pass of its result before there are more than `lanes` of them.
    """

    def __init__(
        self,
        through: Through,
        stacks: Sequence[AdapterStack],
        batches: Sequence[PackedBatch],
        ends: tuple[torch.Tensor | None, torch.Tensor],
        lanes: int,
        recorder: Recorder,
    ) -> None:
        """Capture them. Adapters' gradients are not what they were.

        through: the stage, from a microbatch and its hidden states [1, T, H], if it is not the first, to what it gives.
        stacks: of the stage's adapters; none where the host chooses the one of a microbatch. batches: a microbatch of
        each bucket, and then of each adapter with microbatches of it. ends: what the stage takes, if it is not
        the first, and the gradient of what it gives, both for the largest bucket. lanes: microbatches in flight. Raises
        `CaptureError` where they cannot be captured.
        """
        begin, (reserved, used) = time.perf_counter(), recorder.memory()
        ordered = sorted(batches, key=_tokens, reverse=True)
        self._stacks = stacks
        self._key = _tokens if stacks else _tokens_and_adapter
        with _refused(len(set(map(_tokens, ordered)))):
            self._lanes = [_lane(ordered, ends, self._key) for _ in range(lanes)]
            for passes in self._lanes[0].values():
                recorder.rehearse(lambda passes=passes: passes.both(through))
            for lane in self._lanes:
                pool = recorder.pool()
                for passes in lane.values():
                    passes.capture(through, recorder, pool)
        self._free = deque(self._lanes)
        # Autograd asks for a backward pass only where an argument has a gradient; token ids have none.
        self._anchor = torch.zeros((), requires_grad=True)
        grown, more = (now - before for now, before in zip(recorder.memory(), (reserved, used), strict=True))
        graphs, seconds = 2 * lanes * len(ordered), time.perf_counter() - begin
        self.usage = Usage(graphs, seconds, grown, grown - more)

    def __call__(self, batch: PackedBatch, x: torch.Tensor | None) -> torch.Tensor:
        """What the stage gives. batch: in the host's memory, padded to its bucket."""
        for stack in self._stacks:
            stack.check_gradients()
        lane = self._free.popleft()
        passes = lane[self._key(batch)]
        passes.fill(batch, x)
        return _Replay.apply(passes, lambda: self._free.append(lane), x, self._anchor)


class _Replay(torch.autograd.Function):
    """A forward pass, and after its backward pass `done`. Both give copies: the lane's next microbatch writes over what
    a replay leaves, and it may be on its way to another stage, or among what is read back, for longer."""

    @staticmethod
    def forward(ctx, passes: _Passes, done: Work, _x: torch.Tensor | None, _anchor: torch.Tensor) -> torch.Tensor:
        ctx.passes, ctx.done = passes, done
        passes.replay_forward()
        return passes.out.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: torch.Tensor):
        passes = ctx.passes
        passes.gradient.copy_(gradient)
        passes.replay_backward()
        ctx.done()
        return None, None, None if passes.dx is None else passes.dx.clone(), None


def _tokens(batch: PackedBatch) -> int:
    return batch.input_ids.shape[1]


def _tokens_and_adapter(batch: PackedBatch) -> tuple[int, int]:
    return _tokens(batch), batch.segments[0].adapter


def _lane(
    batches: Sequence[PackedBatch],
    ends: tuple[torch.Tensor | None, torch.Tensor],
    key: Callable[[PackedBatch], Hashable],
) -> dict[Hashable, _Passes]:
    """Static tensors of each bucket, by its key; what is as large as activations is shared by all of them."""
    x, gradient = (None if end is None else torch.zeros_like(end) for end in ends)
    lane = {}
    for batch in batches:
        # What the host knows of this microbatch is wrong of the others.
        static = batch.of([tensor.clone() for tensor in batch.on(gradient.device).tensors])
        segments = () if key is _tokens else batch.segments
        static = replace(static, borders=replace(static.borders, lengths=()), segments=segments)
        first = None if x is None else _first(x, _tokens(batch)).detach().requires_grad_()
        lane[key(batch)] = _Passes(static, first, _first(gradient, _tokens(batch)))
    return lane


def _first(tensor: torch.Tensor, tokens: int) -> torch.Tensor:
    """Of hidden states [1, T, H], or of a value for each token, [T]."""
    return tensor.narrow(max(0, tensor.dim() - 2), 0, tokens)
