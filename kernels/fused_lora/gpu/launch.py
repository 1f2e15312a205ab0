"""The CUDA implementation of `fused_lora::linear` and its gradients: which kernels run, in which order, on what memory.

Nothing here waits for the GPU or copies to it: grids come from shapes that the host knows, and what depends on where
segments begin is found by the kernels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from fused_lora.gpu import masks, passes, products
from fused_lora.gpu.choices import Shape, Target, choose, rank_block
from fused_lora.gpu.gemms import MOST_LINEARS, input_product, output, part_of
from fused_lora.ops import rank_width
from fused_lora.philox import word_count

INTERPRETER = "interpreter"
SUMMED_TILE = 256  # elements of a program that adds partial sums: small, as there are few elements for many programs
MOST_RANKS = {1: 128, 2: 64, 3: 32}  # that it has accumulators for, by the number of linears


@lru_cache
def target_of(device: torch.device) -> Target:
    """The GPU, as choices know it; a CPU is there for Triton's interpreter."""
    if device.type == "cpu":
        return Target(INTERPRETER, (0, 0), 4)
    properties = torch.cuda.get_device_properties(device)
    return Target(properties.name, (properties.major, properties.minor), properties.multi_processor_count)


def overlap_of(target: Target) -> dict:
    """Launch settings: does a kernel begin while the one before it ends?"""
    return {"OVERLAP": True, "launch_pdl": True} if target.capability >= (9, 0) else {"OVERLAP": False}


class _Call:
    """The arguments that every kernel of one call shares, and sizes derived from them."""

    def __init__(self, x, weights, a, b, scales, thresholds, keys, rank_offsets, offsets, adapters, positions, ranks,
                 max_rank, masked) -> None:  # fmt: skip
        self.x, self.weights, self.a, self.b = _aligned(x), weights, a, b
        self.a_like_x = _aligned(a.to(x.dtype))
        self.scales, self.thresholds, self.keys, self.rank_offsets = scales, thresholds, keys, rank_offsets
        self.offsets, self.adapters, self.positions = offsets, adapters, positions
        self.ranks, self.max_rank, self.masked = ranks, max_rank, masked
        self.tokens, self.columns = x.shape
        self.linears, self.adapter_count = scales.shape
        self.segments = adapters.shape[0]
        self.segment_block = triton.next_power_of_2(self.segments)
        self.words = word_count(self.columns)
        self.width = rank_width(max_rank)
        self.target = target_of(x.device)
        self.overlap = overlap_of(self.target)
        self.precision = "ieee" if x.dtype == torch.float32 else "tf32"

    def choice(self, kernel: str, columns: int, inner: int = 0, linears: int = 1) -> dict:
        bits = 32 if self.x.dtype == torch.float32 else 16
        shape = Shape(self.tokens, columns, inner, linears, self.width, bits, self.masked)
        return choose(kernel, shape, self.target)

    def pass_settings(self, choice: dict) -> dict:
        return {
            "ROWS": choice["rows"],
            "COLUMNS": choice["columns"],
            "num_warps": choice["warps"],
            "num_stages": choice["stages"],
            **self.overlap,
        }

    def summed_rows(self) -> tuple[int, int]:
        """Width and rows of the tiles whose partial sums one program adds."""
        width = triton.next_power_of_2(self.width)
        return width, max(4, SUMMED_TILE // width)

    def tiles(self, rows: int) -> int:
        """No fewer than the tiles of `rows` rows laid over each segment apart."""
        if self.segments == 1:
            return triton.cdiv(self.tokens, rows)
        return min(self.tokens, self.tokens // rows + self.segments)

    def b_of(self, linear: int, flat: Tensor) -> Tensor:
        """One linear's part of b, or of db."""
        first = sum(w.shape[0] * r for w, r in zip(self.weights[:linear], self.ranks, strict=False))
        return flat[first : first + self.weights[linear].shape[0] * self.ranks[linear]]

    def padded_b(self, linear: int) -> Tensor:
        """One linear's b in x's dtype, [adapters * N, width]: ranks beyond an adapter's own are zero."""
        columns, b = self.weights[linear].shape[0], self.b_of(linear, self.b)
        if self.ranks[linear] == self.adapter_count * self.width:
            return b.to(self.x.dtype).view(-1, self.width)
        padded = self.x.new_empty(self.adapter_count * columns, self.width)
        self._pad(b, padded, self.rank_offsets[linear : linear + 1], columns, INPUT=False)
        return padded

    def padded_a(self, group: slice) -> Tensor:
        """The a of a group of linears in x's dtype, [linears * adapters * width, K], padded likewise."""
        first, last = sum(self.ranks[: group.start]), sum(self.ranks[: group.stop])
        rows = (group.stop - group.start) * self.adapter_count * self.width
        if last - first == rows:
            return self.a_like_x[first:last]
        padded = self.x.new_empty(rows, self.columns)
        self._pad(self.a, padded, self.rank_offsets[group], self.columns, INPUT=True)
        return padded

    def _pad(self, factor: Tensor, padded: Tensor, rank_offsets: Tensor, columns: int, INPUT: bool) -> None:
        grid = (triton.cdiv(columns, 64), self.adapter_count, len(rank_offsets))
        products.pad_kernel[grid](
            factor, padded, rank_offsets, columns, self.adapter_count, self.width, INPUT=INPUT,
            RANKS=triton.next_power_of_2(self.width), COLUMNS=64, num_warps=4, **self.overlap,
        )  # fmt: skip

    @property
    def batch(self) -> tuple[Tensor, Tensor]:
        return self.offsets, self.adapters

    def groups(self) -> list[slice]:
        """The linears, as many at a time as one kernel takes."""
        return [slice(first, min(first + MOST_LINEARS, self.linears)) for first in range(0, self.linears, MOST_LINEARS)]


def forward(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], a: Tensor, b: Tensor, scales: Tensor,
    thresholds: Tensor, keys: Tensor, rank_offsets: Tensor, offsets: Tensor, adapters: Tensor, positions: Tensor,
    ranks: Sequence[int], max_rank: int, masked: bool, keep_bits: bool,
) -> tuple[list[Tensor], Tensor, Tensor]:  # fmt: skip
    """y of each linear, s and the mask bits: see `fused_lora.ops`."""
    call = _Call(x, weights, a, b, scales, thresholds, keys, rank_offsets, offsets, adapters, positions, ranks,
                 max_rank, masked)  # fmt: skip
    bits = draw_masks(call) if masked else _none(x)
    s = x.new_empty(call.linears, call.tokens, call.width)
    ys = [x.new_empty(call.tokens, weight.shape[0]) for weight in weights]
    if call.tokens:
        project(call, bits, s)
        for linear in range(call.linears):
            output(call, linear, s, biases[linear], ys[linear])
    return ys, s, bits if keep_bits else _none(x)


def backward(
    dys: Sequence[Tensor], x: Tensor, weights: Sequence[Tensor], a: Tensor, b: Tensor, scales: Tensor,
    thresholds: Tensor, keys: Tensor, rank_offsets: Tensor, offsets: Tensor, adapters: Tensor, positions: Tensor,
    s: Tensor, bits: Tensor, ranks: Sequence[int], max_rank: int, masked: bool, wants_x: bool, wants_factors: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dx, da and db: see `fused_lora.ops`."""
    call = _Call(x, weights, a, b, scales, thresholds, keys, rank_offsets, offsets, adapters, positions, ranks,
                 max_rank, masked)  # fmt: skip
    if masked and not bits.numel():
        bits = draw_masks(call)
    da, db = torch.empty_like(a), torch.empty_like(b)
    dx = x.new_empty(x.shape) if wants_x else x.new_empty(0)
    if not call.tokens:
        return dx, da.zero_(), db.zero_()
    ds = torch.empty_like(s)
    db_parts = [output_pass(call, linear, dys[linear], s, ds) for linear in range(call.linears)]
    gradients(call, dys, ds, bits, db_parts, dx if wants_x else None, da if wants_factors else None, db)
    return dx, da if wants_factors else a.new_empty(0), db if wants_factors else b.new_empty(0)


def gradients(
    call: _Call, dys: Sequence[Tensor], ds: Tensor, bits: Tensor, db_parts: Sequence[Tensor], dx: Tensor | None,
    da: Tensor | None, db: Tensor,
) -> None:  # fmt: skip
    """Fill dx, and da and db, where they are wanted.

    The tiles of dx are seldom a multiple of the multiprocessors. Those that are left make da meanwhile, on a stream of
    its own, and all of them what remains of it in the end: forward and backward pass of 8192 x 5120 x 5120 then take
    1354 us, and 1367 us in turn.
    """
    begun = torch.cuda.current_stream().record_event() if dx is not None and dx.is_cuda else None
    if dx is not None:
        for group in call.groups():
            input_product(call, group, dys, ds, bits, dx)
    if da is not None:
        for linear, parts in enumerate(db_parts):
            finish_db(call, linear, parts, db)
        with beside(begun):
            for group in call.groups():
                input_pass(call, group, ds, bits, da)


@contextmanager
def beside(begun: torch.cuda.Event | None) -> Iterator[None]:
    """Run what follows on a stream of its own, after an event and beside what the current stream was given since; the
    current stream then waits for it. Without an event, run it in turn."""
    if begun is None:
        yield
        return
    current = torch.cuda.current_stream()
    side = _side_stream(current.device)
    side.wait_event(begun)
    with torch.cuda.stream(side):
        # A moment's work, so that the other stream's kernel has taken its multiprocessors: in a CUDA graph either may
        # begin first, and a pass that does takes them all, which cost 30 to 70 us in some graphs.
        torch.zeros(1, device=current.device)
        yield
    current.wait_stream(side)


@lru_cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def draw_masks(call: _Call) -> Tensor:
    """The mask bits, int32 [P, tokens, words]."""
    bits = torch.empty(call.linears, call.tokens, call.words, dtype=torch.int32, device=call.x.device)
    choice = call.choice("masks", call.columns)
    rows, columns = choice["rows"], choice["columns"]
    grid = (triton.cdiv(call.tokens, rows), triton.cdiv(call.words, columns), call.linears)
    if call.tokens:
        masks.draw_masks_kernel[grid](
            bits, call.positions, call.thresholds, call.keys, *call.batch, call.tokens, call.words, call.segments,
            call.adapter_count, POSITION_STRIDE=int(len(call.positions) == call.tokens), SEGMENTS=call.segment_block,
            ROWS=rows, COLUMNS=columns, num_warps=choice["warps"], **call.overlap,
        )  # fmt: skip
    return bits


def project(call: _Call, bits: Tensor, s: Tensor) -> None:
    """Fill s."""
    for group in call.groups():
        linears = group.stop - group.start
        choice = call.choice("project", call.columns, linears=linears)
        ranks = rank_block(call.max_rank, MOST_RANKS[linears])
        rank_tiles = triton.cdiv(call.max_rank, ranks)
        # Whole tiles of columns to each split, so that no tile is read by two.
        split_columns = triton.cdiv(triton.cdiv(call.columns, choice["splits"]), choice["columns"]) * choice["columns"]
        splits = triton.cdiv(call.columns, split_columns)
        whole = splits == rank_tiles == 1  # then sums are complete, and an adapter's row is written by one program
        shape = (linears, call.tokens, call.width)
        target = s[group] if whole else s.new_empty(splits, *shape, dtype=torch.float32)
        passes.project_kernel[(call.tiles(choice["rows"]), rank_tiles, splits)](
            _described(call.x, choice["rows"], choice["columns"]), _described(call.a_like_x, ranks, choice["columns"]),
            part_of(bits, group), target, call.scales[group], call.rank_offsets[group], *call.batch, call.tokens,
            call.columns, call.width, call.words, call.segments, call.adapter_count, split_columns,
            LINEARS=linears, MASKED=call.masked, WHOLE=whole, PRECISION=call.precision, SEGMENTS=call.segment_block,
            RANKS=ranks, **call.pass_settings(choice),
        )  # fmt: skip
        if whole:
            continue
        width, rows = call.summed_rows()
        passes.finish_project_kernel[(triton.cdiv(call.tokens, rows), linears)](
            target, s[group], call.scales[group], call.rank_offsets[group], *call.batch, call.tokens, call.width,
            call.segments, call.adapter_count, splits, target.stride(0), SEGMENTS=call.segment_block, WIDTH=width,
            ROWS=rows, num_warps=4, **call.overlap,
        )  # fmt: skip


def output_pass(call: _Call, linear: int, dy: Tensor, s: Tensor, ds: Tensor) -> Tensor:
    """Fill ds of one linear; the partial sums of its db, for `finish_db`."""
    columns = call.weights[linear].shape[0]
    choice = call.choice("output_pass", columns)
    ranks = rank_block(call.max_rank, 128)
    tiles, column_tiles = call.tiles(choice["chunk"]), triton.cdiv(columns, choice["columns"])
    ds_parts = dy.new_empty(column_tiles, call.tokens, call.width, dtype=torch.float32)
    db_parts = dy.new_empty(tiles, columns, call.width, dtype=torch.float32)
    tables = (call.rank_offsets[linear], *call.batch)
    passes.output_pass_kernel[(tiles, column_tiles, triton.cdiv(call.max_rank, ranks))](
        _described(_aligned(dy), choice["rows"], choice["columns"]), call.b_of(linear, call.b),
        _described(s[linear], choice["rows"], ranks), ds_parts, db_parts, *tables, call.tokens, columns, call.width,
        call.segments, PRECISION=call.precision, SEGMENTS=call.segment_block, RANKS=ranks, CHUNK=choice["chunk"],
        **call.pass_settings(choice),
    )  # fmt: skip
    width, rows = call.summed_rows()
    passes.finish_ds_kernel[(triton.cdiv(call.tokens, rows),)](
        ds_parts, ds[linear], call.scales[linear], *tables, call.tokens, call.width, call.segments, column_tiles,
        SEGMENTS=call.segment_block, WIDTH=width, ROWS=rows, num_warps=4, **call.overlap,
    )  # fmt: skip
    return db_parts


def finish_db(call: _Call, linear: int, db_parts: Tensor, db: Tensor) -> None:
    """Fill one linear's part of db from `output_pass`'s partial sums."""
    columns = call.weights[linear].shape[0]
    width, rows = call.summed_rows()
    passes.finish_db_kernel[(triton.cdiv(columns, rows), call.adapter_count)](
        db_parts, call.b_of(linear, db), call.rank_offsets[linear], *call.batch, call.tokens, columns, call.width,
        call.segments, CHUNK=call.choice("output_pass", columns)["chunk"], SEGMENTS=call.segment_block, WIDTH=width,
        ROWS=rows, num_warps=4, **call.overlap,
    )  # fmt: skip


def input_pass(call: _Call, group: slice, ds: Tensor, bits: Tensor, da: Tensor) -> None:
    """Fill the rows of da that belong to a group of linears."""
    linears = group.stop - group.start
    choice = call.choice("input_pass", call.columns, linears=linears)
    ranks = rank_block(call.max_rank, MOST_RANKS[linears])
    tiles, rank_tiles = call.tiles(choice["chunk"]), triton.cdiv(call.max_rank, ranks)
    parts = call.x.new_empty(linears, tiles, call.width, call.columns, dtype=torch.float32)
    tables = (call.rank_offsets[group], *call.batch)
    passes.input_pass_kernel[(tiles, triton.cdiv(call.columns, choice["columns"]), rank_tiles)](
        _described(call.x, choice["rows"], choice["columns"]),
        _described(ds[group].flatten(0, 1), choice["rows"], ranks), part_of(bits, group), parts, *tables, call.tokens,
        call.columns, call.width, call.words, call.segments, call.adapter_count, tiles,
        LINEARS=linears, MASKED=call.masked, PRECISION=call.precision, SEGMENTS=call.segment_block, RANKS=ranks,
        CHUNK=choice["chunk"], **call.pass_settings(choice),
    )  # fmt: skip
    ranks = 4
    columns = SUMMED_TILE // ranks
    grid = (triton.cdiv(call.columns, columns), triton.cdiv(call.max_rank, ranks), linears * call.adapter_count)
    passes.finish_input_kernel[grid](
        parts, da, *tables, call.tokens, call.columns, call.width, call.segments, call.adapter_count, tiles,
        CHUNK=choice["chunk"], SEGMENTS=call.segment_block, RANKS=ranks, COLUMNS=columns, num_warps=4, **call.overlap,
    )  # fmt: skip


def _aligned(tensor: Tensor) -> Tensor:
    """The tensor, or a copy of it whose rows the copy engine can fetch: they begin at multiples of 16 bytes."""
    unit = 16 // tensor.element_size()
    if tensor.stride(0) % unit == 0 and tensor.stride(1) == 1 and tensor.data_ptr() % 16 == 0:
        return tensor
    rows, columns = tensor.shape
    copy = tensor.new_empty(rows, triton.cdiv(columns, unit) * unit)[:, :columns]
    return copy.copy_(tensor)


def _described(tensor: Tensor, rows: int, columns: int) -> TensorDescriptor:
    return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), [rows, columns])


def _none(x: Tensor) -> Tensor:
    return x.new_empty(0, dtype=torch.int32)
