"""CUDA graphs without a GPU: what a function does on a CPU is recorded, operator by operator, and done again on the
same memory. Like a captured graph a replay knows nothing of the host, and what asks the device while it is recorded is
an error. Unlike one it may allocate; so the tensors of a pool are filled with rubbish before they are used again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes, _get_current_dispatch_mode
from torch.utils._pytree import tree_leaves

from lorafusion.engine import graphs
from lorafusion.model import attention

# A wait for the device, or a copy from memory that the host may have changed by the next replay.
FORBIDDEN = ("aten::_local_scalar_dense", "aten::lift_fresh", "aten::nonzero", "aten::equal")
READ_PAST = ("tolist", "numpy")  # ways to a CPU tensor's memory that are no operators
REFUSED = "operation not permitted when stream is capturing"


class Pool(list):
    """The tensors that were made while its graphs were recorded, and how many graphs there are."""

    graphs = 0

    def spoil(self) -> None:
        for tensor in self:
            tensor.fill_(float("nan") if tensor.is_floating_point() else 0x5A)


def refusing(name: str) -> Callable:
    """A tensor's method, which the recorded function itself may not call; what it calls by operators may."""
    original = getattr(torch.Tensor, name)

    def method(tensor, *arguments):
        if isinstance(_get_current_dispatch_mode(), Recording):
            raise RuntimeError(f"{REFUSED}: {name}")
        return original(tensor, *arguments)

    return method


class Recording(TorchDispatchMode):
    def __init__(self, pool: Pool) -> None:
        super().__init__()
        self.pool, self.calls = pool, []
        self.patch = pytest.MonkeyPatch()

    def __enter__(self):
        for name in READ_PAST:
            self.patch.setattr(torch.Tensor, name, refusing(name))
        return super().__enter__()

    def __exit__(self, *error):
        self.patch.undo()
        return super().__exit__(*error)

    def __torch_dispatch__(self, function, types, arguments=(), settings=None):
        if function.name() in FORBIDDEN:
            raise RuntimeError(f"{REFUSED}: {function.name()}")
        return self.call(partial(function, **(settings or {})), *arguments)

    def call(self, function: Callable, *arguments):
        given = {storage(tensor) for tensor in tensors(arguments)}
        result = function(*arguments)
        fresh = [tensor if storage(tensor) not in given else None for tensor in tensors(result)]
        self.pool += [tensor for tensor in fresh if tensor is not None]
        self.calls.append((function, arguments, fresh))
        return result

    @torch.no_grad()
    def replay(self) -> None:
        for function, arguments, fresh in self.calls:
            for target, source in zip(fresh, tensors(function(*arguments)), strict=True):
                if target is not None:
                    target.copy_(source)


def tensors(values) -> list[torch.Tensor]:
    return [value for value in tree_leaves(values) if isinstance(value, torch.Tensor)]


def storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


class CpuRecorder:
    """A `graphs.Recorder`. captured: the graphs there are."""

    def __init__(self) -> None:
        self.captured = self.replayed = 0

    pool = Pool

    def rehearse(self, work: Callable[[], None]) -> None:
        work()

    def capture(self, work: Callable[[], None], pool: Pool) -> Callable[[], None]:
        with Recording(pool) as recording:
            work()
        is_forward, pool.graphs = pool.graphs % 2 == 0, pool.graphs + 1
        self.captured += 1

        def replay() -> None:
            self.replayed += 1
            if is_forward:  # of the microbatch before nothing is left
                pool.spoil()
            recording.replay()

        return replay

    def memory(self) -> tuple[int, int]:
        return 1000 * self.captured, 10 * self.captured


class DeviceAttention(torch.autograd.Function):
    """The same attention of each sample, whose borders are read where a GPU's kernel reads them: when it runs."""

    @staticmethod
    def forward(ctx, query, key, value, offsets, scaling):
        ctx.save_for_backward(query, key, value, offsets)
        ctx.scaling = scaling
        return on_the_device(partial(attended, scaling), query, key, value, offsets)

    @staticmethod
    def backward(ctx, gradient):
        return *on_the_device(partial(differentiated, ctx.scaling), gradient, *ctx.saved_tensors), None, None


def on_the_device(function: Callable, *arguments):
    """Call a function that is a kernel for who records."""
    mode = _get_current_dispatch_mode()
    with _disable_current_modes():
        return mode.call(function, *arguments) if isinstance(mode, Recording) else function(*arguments)


def attended(scaling: float, query, key, value, offsets) -> torch.Tensor:
    lengths = [length for length in offsets.diff().tolist() if length]
    samples = zip(*(tensor.split(lengths, dim=2) for tensor in (query, key, value)), strict=True)
    return torch.cat(
        [F.scaled_dot_product_attention(*part, is_causal=True, scale=scaling, enable_gqa=True) for part in samples], 2
    )


def differentiated(scaling: float, gradient, query, key, value, offsets) -> tuple[torch.Tensor, ...]:
    with torch.enable_grad():
        leaves = [tensor.detach().requires_grad_() for tensor in (query, key, value)]
        return torch.autograd.grad(attended(scaling, *leaves, offsets), leaves, gradient)


@contextmanager
def graphs_on_a_cpu() -> Iterator[CpuRecorder]:
    """Within it stages are captured on a CPU."""
    recorder = CpuRecorder()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(graphs, "recorder_of", lambda device: recorder)
        patch.setattr(attention, "_each_sample", lambda q, k, v, borders, scaling: DeviceAttention.apply(
            q, k, v, borders.offsets, scaling))  # fmt: skip
        yield recorder
