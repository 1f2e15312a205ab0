"""One call of the LoRA linear as its kernels share it: arguments, sizes derived from them, and what fits the GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import accumulate
from operator import attrgetter
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as GluonDescriptor
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from fused_lora.adapters import Operands, Settings, rank_width
from fused_lora.gpu.host import choices
from fused_lora.gpu.host.choices import Shape, Target
from fused_lora.gpu.host.record import Recorder
from fused_lora.gpu.portable import products
from fused_lora.philox import word_count

INTERPRETER = "interpreter"
MOST_LINEARS = 3  # that one kernel takes
GLUON_TYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16, torch.int32: gl.int32}
SUMMED_TILE = 256  # elements of a program that adds partial sums: small, as there are few elements for many programs
RUN = attrgetter("run")
REMEMBERED = 4096  # choices: those of one model's linears for a hundred lengths of microbatches


@lru_cache
def target_of(device: torch.device) -> Target:
    """The GPU, as choices know it; a CPU is there for Triton's interpreter."""
    if device.type == "cpu":
        return Target(INTERPRETER, (0, 0), 4)
    properties = torch.cuda.get_device_properties(device)
    return Target(properties.name, (properties.major, properties.minor), properties.multi_processor_count)


@dataclass(frozen=True)
class Launcher:
    """What is asked before a kernel is launched. The tools and tests put others in the place of these functions.

    choose: the launch settings of a kernel. target_of: the GPU that a tensor's device is. run_of: a kernel's method
    that launches it. remembers: are calls recorded and done again (`replay`), so that only the first two of a kind pass
    through the host code and through Triton's? plans: what was recorded, by kind.
    """

    choose: Callable[[str, Shape, Target], dict[str, Any]] = choices.choose
    target_of: Callable[[torch.device], Target] = target_of
    run_of: Callable[[JITFunction], Callable] = RUN
    remembers: bool = True
    plans: dict[tuple, Any] = field(default_factory=dict)


_launcher = Launcher()
_recorder: ContextVar[Recorder | None] = ContextVar("recorder", default=None)


@contextmanager
def launching(**replacements: Any) -> Iterator[None]:
    """Launch with replacements of the `Launcher`'s functions, in all threads: the backward pass has its own."""
    global _launcher
    before = _launcher
    _launcher = Launcher(**replacements)
    try:
        yield
    finally:
        _launcher = before


def launcher() -> Launcher:
    return _launcher


@contextmanager
def recording(recorder: Recorder) -> Iterator[None]:
    """Write down what this thread would launch."""
    token = _recorder.set(recorder)
    try:
        with recorder:
            yield
    finally:
        _recorder.reset(token)


def target_for(x: Tensor) -> Target:
    """The GPU that kernels for x are launched on."""
    recorder = _recorder.get()
    return recorder.target if recorder else _launcher.target_of(x.device)


def launch(kernel: JITFunction, grid: tuple[int, ...], *arguments: Any, **settings: Any) -> None:
    recorder = _recorder.get()
    if recorder:
        recorder.launch(kernel, grid, arguments, settings)
    else:
        _launcher.run_of(kernel)(*arguments, grid=grid, warmup=False, **settings)


def cdiv(size: int, part: int) -> int:
    """size / part, rounded up. Triton's cdiv is made for kernels too, and takes the host ten times as long."""
    return -(-size // part)


def power_of_2(size: int) -> int:
    """The smallest power of two that is at least `size`, which is at least 1."""
    return 1 << (size - 1).bit_length()


@lru_cache(maxsize=REMEMBERED)
def _chosen(choose: Callable[..., dict], kernel: str, target: Target, *sizes: int) -> Mapping[str, Any]:
    """A choice, read only, since all launches of the same sizes share it. sizes: of the `Shape`, in its order; choose:
    who chooses, as the tuner does it otherwise."""
    return MappingProxyType(choose(kernel, Shape(*sizes), target))


def overlap_of(target: Target) -> dict:
    """Launch settings: does a kernel begin while the one before it ends?"""
    return {"OVERLAP": True, "launch_pdl": True} if target.capability >= (9, 0) else {"OVERLAP": False}


class Call:
    """The arguments that every kernel of one call shares, and sizes derived from them.

    x [M, K]: M is `tokens`, K `columns`. weights: of P linears (`linears`), [N_p, K] each. A *group* is a slice of the
    linears that one kernel takes. The tensors that the launches pass on are s and ds [P, M, width], in x's dtype, and
    the mask bits, int32 [P, M, words].
    """

    def __init__(self, operands: Operands, settings: Settings, x: Tensor, weights: Sequence[Tensor]) -> None:
        self.operands, self.x, self.weights = operands, aligned(x), weights
        self.ranks, self.max_rank, self.masked = settings
        self.a_like_x = aligned(operands.a.to(x.dtype))
        self.batch = (operands.offsets, operands.adapters)
        self.borders_of_b = [0, *accumulate(w.shape[0] * r for w, r in zip(weights, self.ranks, strict=True))]
        self.tokens, self.columns = x.shape
        self.linears, self.adapter_count = operands.scales.shape
        self.segments = operands.adapters.shape[0]
        self.segment_block = power_of_2(self.segments)
        self.words = word_count(self.columns)
        # 0 where positions hold the first row's alone
        self.position_stride = int(len(operands.positions) == self.tokens)
        self.width = rank_width(self.max_rank)
        self.target = target_for(x)
        self.overlap = overlap_of(self.target)
        self.bits = 8 * x.element_size()  # of an element
        self.precision = "ieee" if x.dtype == torch.float32 else "tf32"

    def choice(self, kernel: str, columns: int, inner: int = 0, linears: int = 1) -> Mapping[str, Any]:
        sizes = (self.tokens, columns, inner, linears, self.width, self.bits, self.masked)
        return _chosen(_launcher.choose, kernel, self.target, *sizes)

    def pass_settings(self, choice: Mapping[str, Any]) -> dict:
        return {
            "ROWS": choice["rows"],
            "COLUMNS": choice["columns"],
            "num_warps": choice["warps"],
            "num_stages": choice["stages"],
            **self.overlap,
        }

    def summed_rows(self) -> tuple[int, int]:
        """Columns and rows of the tile whose partial sums one program adds."""
        width = power_of_2(self.width)
        return width, max(4, SUMMED_TILE // width)

    def tiles(self, rows: int) -> int:
        """An upper bound of the tiles of `rows` rows, if each segment begins with a tile of its own."""
        if self.segments == 1:
            return cdiv(self.tokens, rows)
        return min(self.tokens, self.tokens // rows + self.segments)

    def b_of(self, linear: int, flat: Tensor) -> Tensor:
        """One linear's part of b, or of db."""
        return flat[self.borders_of_b[linear] : self.borders_of_b[linear + 1]]

    def factor_gradients(self, wanted: bool) -> list[Tensor]:
        """Memory for da and db; empty where they are not wanted."""
        factors = (self.operands.a, self.operands.b)
        return [torch.empty_like(factor) if wanted else factor.new_empty(0) for factor in factors]

    def padded_b(self, linear: int) -> Tensor:
        """One linear's b in x's dtype, [adapters * N, width]: ranks beyond an adapter's own are zero."""
        columns, b = self.weights[linear].shape[0], self.b_of(linear, self.operands.b)
        if self.ranks[linear] == self.adapter_count * self.width:
            return aligned(b.to(self.x.dtype).view(-1, self.width))
        padded = self.x.new_empty(self.adapter_count * columns, self.width)
        self._pad(b, padded, slice(linear, linear + 1), columns, INPUT=False)
        return padded

    def padded_a(self, group: slice) -> Tensor:
        """The a of a group of linears in x's dtype, [linears * adapters * width, K], padded likewise."""
        first, last = sum(self.ranks[: group.start]), sum(self.ranks[: group.stop])
        rows = (group.stop - group.start) * self.adapter_count * self.width
        if last - first == rows:
            return self.a_like_x[first:last]
        padded = self.x.new_empty(rows, self.columns)
        self._pad(self.operands.a, padded, group, self.columns, INPUT=True)
        return padded

    def _pad(self, factor: Tensor, padded: Tensor, group: slice, columns: int, INPUT: bool) -> None:
        rank_offsets = self.operands.rank_offsets[group]
        launch(
            products.pad_kernel, (cdiv(columns, 64), self.adapter_count, len(rank_offsets)),
            factor, padded, rank_offsets, columns, self.adapter_count, self.width, INPUT=INPUT,
            RANKS=power_of_2(self.width), COLUMNS=64, num_warps=4, **self.overlap,
        )  # fmt: skip

    def groups(self) -> list[slice]:
        """The linears, as many at a time as one kernel takes."""
        return [slice(first, min(first + MOST_LINEARS, self.linears)) for first in range(0, self.linears, MOST_LINEARS)]


def part_of(bits: Tensor, group: slice) -> Tensor:
    """The mask words of a group of linears; empty without masks."""
    return bits[group] if bits.numel() else bits


def fetchable(tensor: Tensor) -> bool:
    """Can the copy engine fetch its rows? They must begin at multiples of 16 bytes, and be rows of their own, which
    those of an expanded tensor are not."""
    apart = tensor.stride(0) >= tensor.shape[1] and tensor.stride(0) * tensor.element_size() % 16 == 0
    return apart and tensor.stride(1) == 1 and tensor.data_ptr() % 16 == 0


def aligned(tensor: Tensor) -> Tensor:
    """The tensor, or a copy of it whose rows the copy engine can fetch."""
    if fetchable(tensor):
        return tensor
    unit = 16 // tensor.element_size()
    rows, columns = tensor.shape
    copy = tensor.new_empty(rows, cdiv(columns, unit) * unit)[:, :columns]
    return copy.copy_(tensor)


def described(tensor: Tensor, rows: int, columns: int) -> TensorDescriptor:
    return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), [rows, columns])


def gluon_described(tensor: Tensor, rows: int, columns: int) -> GluonDescriptor:
    """The same for kernels written in Gluon."""
    layout = _layout(rows, columns, tensor.dtype)
    return GluonDescriptor(tensor, list(tensor.shape), list(tensor.stride()), [rows, columns], layout)


@lru_cache
def _layout(rows: int, columns: int, dtype: torch.dtype) -> gl.NVMMASharedLayout:
    """Of a tile in shared memory. There are a dozen, and to make one takes the host three times as long as the rest of
    a descriptor."""
    return gl.NVMMASharedLayout.get_default_for([rows, columns], GLUON_TYPES[dtype])
