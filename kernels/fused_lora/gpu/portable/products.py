"""The LoRA term of y and of dx, written for a library's GEMM to add to; and factors as `sm90.gemms` want them.

These add the term at the cost of one more step along the inner dimension, where `expand_*` write the whole output once
and the library reads it back: 7 % of the product at 4096 columns.
"""

import triton
import triton.language as tl

from fused_lora.gpu.portable.masks import kept, loaded_words
from fused_lora.gpu.portable.segments import segments_meeting, wait_for_the_kernel_before


@triton.jit
def _segment(rank_offsets, offsets, adapters, segment):
    """A segment's first row and end, its adapter's first row of a and rank on one linear, and the linear's first row of
    a. The rank is 0 where the segment has no adapter."""
    adapter = tl.load(adapters + segment)
    has_adapter = adapter >= 0
    row_of_a = tl.load(rank_offsets + adapter, mask=has_adapter, other=0)
    rank = tl.load(rank_offsets + adapter + 1, mask=has_adapter, other=0) - row_of_a
    return tl.load(offsets + segment), tl.load(offsets + segment + 1), row_of_a, rank, tl.load(rank_offsets)


@triton.jit
def _add_lora_term(
    total, s, factor, rank_offsets, offsets, adapters, rows, tokens, cols, columns, s_width, first, last,
    INPUT: tl.constexpr, PRECISION: tl.constexpr, RANKS: tl.constexpr,
):  # fmt: skip
    """total [rows, cols] + s b^T, or + ds a where INPUT, of the segments [first, last).

    factor: one linear's b, or all of a. rank_offsets, s: of the linear.
    """
    ranks = tl.arange(0, RANKS)
    for segment in range(first, last):
        start, stop, row_of_a, rank, first_of_a = _segment(rank_offsets, offsets, adapters, segment)
        inside = (rows >= start) & (rows < stop) & (rows < tokens)
        s_rows = s + rows.to(tl.int64)[:, None] * s_width
        for rank_first in range(0, rank, RANKS):
            r = rank_first + ranks
            s_tile = tl.load(s_rows + r[None, :], mask=inside[:, None] & (r < rank)[None, :], other=0.0)
            if INPUT:
                place = (row_of_a + r).to(tl.int64)[:, None] * columns + cols[None, :]
            else:
                block = (row_of_a - first_of_a).to(tl.int64) * columns
                place = block + cols[None, :] * rank + r[:, None]
            f_tile = tl.load(factor + place, mask=(r < rank)[:, None] & (cols < columns)[None, :], other=0.0)
            total = tl.dot(s_tile, f_tile.to(s_tile.dtype), total, input_precision=PRECISION)
    return total


@triton.jit(do_not_specialize=["tokens", "segments"])
def expand_output_kernel(
    y, s, b, bias, rank_offsets, offsets, adapters, tokens, columns, s_width, segments,
    HAS_BIAS: tl.constexpr, PRECISION: tl.constexpr, SEGMENTS: tl.constexpr, RANKS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """y = s b^T + bias of one linear: what a library's GEMM adds x w^T to. Grid (row tiles, column tiles)."""
    wait_for_the_kernel_before(OVERLAP)
    row = tl.program_id(0) * ROWS
    rows, cols = row + tl.arange(0, ROWS), tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    first, last = segments_meeting(offsets, row, row + ROWS, tokens, segments, SEGMENTS)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    total = _add_lora_term(
        total, s, b, rank_offsets, offsets, adapters, rows, tokens, cols, columns, s_width, first, last,
        False, PRECISION, RANKS,
    )  # fmt: skip
    if HAS_BIAS:
        total += tl.load(bias + cols, mask=cols < columns, other=0.0).to(tl.float32)[None, :]
    place = y + rows.to(tl.int64)[:, None] * columns + cols[None, :]
    tl.store(place, total.to(y.dtype.element_ty), mask=(rows < tokens)[:, None] & (cols < columns)[None, :])


@triton.jit(do_not_specialize=["tokens", "segments", "adapter_count"])
def expand_input_kernel(
    dx, ds, a, bits, rank_offsets, offsets, adapters, tokens, columns, s_width, words, segments, adapter_count,
    LINEARS: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr, SEGMENTS: tl.constexpr,
    RANKS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """dx = the sum of m(ds a): what a library's GEMMs add dy w to. Grid (row tiles, column tiles)."""
    wait_for_the_kernel_before(OVERLAP)
    row, column = tl.program_id(0) * ROWS, tl.program_id(1) * COLUMNS
    rows, cols = row + tl.arange(0, ROWS), column + tl.arange(0, COLUMNS)
    first, last = segments_meeting(offsets, row, row + ROWS, tokens, segments, SEGMENTS)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for linear in tl.static_range(LINEARS):
        term = tl.zeros((ROWS, COLUMNS), tl.float32)
        term = _add_lora_term(
            term, ds + linear * tl.cast(tokens, tl.int64) * s_width, a, rank_offsets + linear * (adapter_count + 1),
            offsets, adapters, rows, tokens, cols, columns, s_width, first, last, True, PRECISION, RANKS,
        )  # fmt: skip
        if MASKED:
            plane = bits + linear * tl.cast(tokens, tl.int64) * words
            word = loaded_words(plane, rows, column, words, tokens, COLUMNS)
            term = tl.where(kept(word, ROWS, COLUMNS), term, 0.0)
        total += term
    place = dx + rows.to(tl.int64)[:, None] * columns + cols[None, :]
    tl.store(place, total.to(dx.dtype.element_ty), mask=(rows < tokens)[:, None] & (cols < columns)[None, :])


@triton.jit(do_not_specialize=["adapter_count"])
def pad_kernel(
    factor, padded, rank_offsets, columns, adapter_count, width,
    INPUT: tl.constexpr, RANKS: tl.constexpr, COLUMNS: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """Every adapter's factor with `width` ranks, those beyond its own being zero, for `sm90.gemms`.

    factor: all of a where INPUT, padded [P * adapters * width, columns]; else one linear's b, padded [adapters *
    columns, width]. rank_offsets: of these linears. Grid (column tiles, adapters, P).
    """
    wait_for_the_kernel_before(OVERLAP)
    adapter, linear = tl.program_id(1), tl.program_id(2)
    linear_offsets = rank_offsets + linear * (adapter_count + 1) + adapter
    row_of_a = tl.load(linear_offsets)
    rank = tl.load(linear_offsets + 1) - row_of_a
    cols, ranks = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS), tl.arange(0, RANKS)
    wanted = (cols < columns)[:, None] & (ranks < width)[None, :]
    if INPUT:
        source = (row_of_a + ranks).to(tl.int64)[None, :] * columns + cols[:, None]
        place = ((linear * adapter_count + adapter) * width + ranks).to(tl.int64)[None, :] * columns + cols[:, None]
    else:
        source = (row_of_a - tl.load(rank_offsets)).to(tl.int64) * columns + cols[:, None] * rank + ranks[None, :]
        place = (adapter * columns + cols).to(tl.int64)[:, None] * width + ranks[None, :]
    value = tl.load(factor + source, mask=wanted & (ranks < rank)[None, :], other=0.0)
    tl.store(padded + place, value.to(padded.dtype.element_ty), mask=wanted)
