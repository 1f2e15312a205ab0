"""The CUDA implementation of `fused_lora::linear` and its gradients: which kernels run, in which order, on what memory.

Nothing here waits for the GPU or copies to it: grids come from shapes that the host knows, and what depends on where
segments begin is found by the kernels.

Numbers that follow from a batch's tokens (rows, segments, tiles) are not specialised: Triton would compile a kernel for
each combination of those that are one, or multiples of 16, and batches of many lengths meet them all. On a new machine
the few batches of three short plans of Llama-3.1-8B compiled for nearly three minutes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fused_lora.gpu import hopper_passes, masks, passes
from fused_lora.gpu.calls import SUMMED_TILE, Call, aligned, cdiv, described, gluon_described, part_of
from fused_lora.gpu.choices import (
    MOST_RANKS,
    PROJECT_COLUMNS,
    PROJECT_ROWS,
    draws_while_projecting,
    project_registers,
    project_slots,
    rank_block,
)
from fused_lora.gpu.gemms import input_product, output


def forward(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], a: Tensor, b: Tensor, scales: Tensor,
    thresholds: Tensor, keys: Tensor, rank_offsets: Tensor, offsets: Tensor, adapters: Tensor, positions: Tensor,
    ranks: Sequence[int], max_rank: int, masked: bool, keep_bits: bool,
) -> tuple[list[Tensor], Tensor, Tensor]:  # fmt: skip
    """y of each linear, s and the mask bits: see `fused_lora.ops`."""
    call = Call(x, weights, a, b, scales, thresholds, keys, rank_offsets, offsets, adapters, positions, ranks,
                 max_rank, masked)  # fmt: skip
    s = x.new_empty(call.linears, call.tokens, call.width)
    ys = [x.new_empty(call.tokens, weight.shape[0]) for weight in weights]
    bits = project(call, s)
    if call.tokens:
        for linear in range(call.linears):
            output(call, linear, s, biases[linear], ys[linear])
    return ys, s, bits if keep_bits else _none(x)


def backward(
    dys: Sequence[Tensor], x: Tensor, weights: Sequence[Tensor], a: Tensor, b: Tensor, scales: Tensor,
    thresholds: Tensor, keys: Tensor, rank_offsets: Tensor, offsets: Tensor, adapters: Tensor, positions: Tensor,
    s: Tensor, bits: Tensor, ranks: Sequence[int], max_rank: int, masked: bool, wants_x: bool, wants_factors: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dx, da and db: see `fused_lora.ops`."""
    call = Call(x, weights, a, b, scales, thresholds, keys, rank_offsets, offsets, adapters, positions, ranks,
                 max_rank, masked)  # fmt: skip
    if masked and not bits.numel():
        bits = draw_masks(call)
    dx, (da, db) = x.new_empty(x.shape if wants_x else 0), call.factor_gradients(wants_factors)
    if not call.tokens:
        return dx, da.zero_(), db.zero_()
    ds = torch.empty_like(s)
    for linear in range(call.linears):
        output_pass(call, linear, dys[linear], s, ds, db)
    input_gradients(call, dys, ds, bits, dx if wants_x else None, da if wants_factors else None)
    return dx, da, db


def input_gradients(
    call: Call, dys: Sequence[Tensor], ds: Tensor, bits: Tensor, dx: Tensor | None, da: Tensor | None
) -> None:
    """Fill dx and da, where they are wanted.

    The tiles of dx are seldom a multiple of the multiprocessors. Those that are left make da meanwhile, and all of them
    what remains of it in the end: our GEMM lets the pass over x begin beside it. On a second stream either could begin
    first, and a pass that did took all multiprocessors.
    """
    groups = call.groups()
    let_go = beside = dx is not None and da is not None and len(groups) == 1
    # Before the GEMM: memory that its launch gives back must not be written beside it.
    early = input_parts(call, groups[0]) if let_go else None
    if dx is not None:
        for group in groups:
            beside = input_product(call, group, dys, ds, bits, dx, let_go)
    if da is not None:
        for group in groups:
            parts = input_parts(call, group) if early is None else early
            input_pass(call, group, ds, bits, parts, da, beside)


def project(call: Call, s: Tensor) -> Tensor:
    """Fill s; the mask bits, int32 [P, tokens, words], or an empty tensor without masks."""
    at_once = all(
        draws_while_projecting(group.stop - group.start, call.max_rank, call.bits, call.target)
        for group in call.groups()
    )
    if not call.masked:
        bits = _none(call.x)
    elif at_once:
        bits = _new_bits(call)
    else:
        bits = draw_masks(call)
    for group in call.groups() if call.tokens else ():
        (mask_and_project if at_once else project_masked)(call, group, bits, s)
    return bits


def _new_bits(call: Call) -> Tensor:
    return torch.empty(call.linears, call.tokens, call.words, dtype=torch.int32, device=call.x.device)


def draw_masks(call: Call) -> Tensor:
    """The mask bits, int32 [P, tokens, words]."""
    bits = _new_bits(call)
    choice = call.choice("masks", call.columns)
    rows, columns = choice["rows"], choice["columns"]
    grid = (cdiv(call.tokens, rows), cdiv(call.words, columns), call.linears)
    if call.tokens:
        masks.draw_masks_kernel[grid](
            bits, call.positions, call.thresholds, call.keys, *call.batch, call.tokens, call.words, call.segments,
            call.adapter_count, POSITION_STRIDE=call.position_stride, SEGMENTS=call.segment_block,
            ROWS=rows, COLUMNS=columns, num_warps=choice["warps"], **call.overlap,
        )  # fmt: skip
    return bits


def mask_and_project(call: Call, group: slice, bits: Tensor, s: Tensor) -> None:
    """Fill the bits and s of a group of linears."""
    linears = group.stop - group.start
    ranks = rank_block(call.max_rank, MOST_RANKS[linears])
    splits = call.choice("mask_and_project", call.columns, linears=linears)["splits"]
    tiles, (registers, drawing) = call.tiles(PROJECT_ROWS), project_registers(linears, ranks)

    def launch(grid: tuple[int, ...], *arguments, **settings) -> None:
        hopper_passes.mask_and_project_kernel[grid](
            gluon_described(call.x, PROJECT_ROWS, PROJECT_COLUMNS),
            gluon_described(call.a_like_x, ranks, PROJECT_COLUMNS), *arguments, call.positions,
            call.thresholds[group], call.keys[group], **settings, POSITION_STRIDE=call.position_stride,
            SLOTS=project_slots(math.prod(grid), linears, ranks, call.target), DRAWING_REGISTERS=drawing,
            num_warps=hopper_passes.WARPS, maxnreg=registers, launch_pdl=True,
        )  # fmt: skip

    _project(call, group, bits, s, ranks, tiles, splits, PROJECT_COLUMNS, launch)


def project_masked(call: Call, group: slice, bits: Tensor, s: Tensor) -> None:
    """Fill s of a group of linears, from masks that are drawn."""
    linears = group.stop - group.start
    ranks = rank_block(call.max_rank, MOST_RANKS[linears])
    choice = call.choice("project", call.columns, linears=linears)
    rows, columns = choice["rows"], choice["columns"]

    def launch(grid: tuple[int, ...], *arguments, **settings) -> None:
        passes.project_kernel[grid](
            described(call.x, rows, columns), described(call.a_like_x, ranks, columns), *arguments, **settings,
            PRECISION=call.precision, **call.pass_settings(choice),
        )  # fmt: skip

    _project(call, group, bits, s, ranks, call.tiles(rows), choice["splits"], columns, launch)


def _project(
    call: Call, group: slice, bits: Tensor, s: Tensor, ranks: int, tiles: int, splits: int, columns: int,
    launch: Callable[..., None],
) -> None:  # fmt: skip
    """What both have in common: how the columns are split, and the sums of the splits."""
    linears, rank_tiles = group.stop - group.start, cdiv(call.max_rank, ranks)
    # Whole tiles of columns to each split, so that no tile is read by two.
    split_columns = cdiv(cdiv(call.columns, splits), columns) * columns
    splits = cdiv(call.columns, split_columns)
    whole = splits == rank_tiles == 1  # then sums are complete, and an adapter's row is written by one program
    shape = (linears, call.tokens, call.width)
    target = s[group] if whole else s.new_empty(splits, *shape, dtype=torch.float32)
    launch(
        (tiles, rank_tiles, splits), part_of(bits, group), target, call.scales[group], call.rank_offsets[group],
        *call.batch, call.tokens, call.columns, call.width, call.words, call.segments, call.adapter_count,
        split_columns, LINEARS=linears, MASKED=call.masked, WHOLE=whole, SEGMENTS=call.segment_block, RANKS=ranks,
    )  # fmt: skip
    if whole:
        return
    width, rows = call.summed_rows()
    passes.finish_project_kernel[(cdiv(call.tokens, rows), linears)](
        target, s[group], call.scales[group], call.rank_offsets[group], *call.batch, call.tokens, call.width,
        call.segments, call.adapter_count, splits, target.stride(0), SEGMENTS=call.segment_block, WIDTH=width,
        ROWS=rows, num_warps=4, **call.overlap,
    )  # fmt: skip


def output_pass(call: Call, linear: int, dy: Tensor, s: Tensor, ds: Tensor, db: Tensor) -> None:
    """Fill ds of one linear and, unless it is empty, the linear's part of db."""
    columns = call.weights[linear].shape[0]
    choice = call.choice("output_pass", columns)
    ranks = rank_block(call.max_rank, 128)
    tiles, column_tiles = call.tiles(choice["chunk"]), cdiv(columns, choice["columns"])
    ds_parts = dy.new_empty(column_tiles, call.tokens, call.width, dtype=torch.float32)
    db_parts = dy.new_empty(tiles, columns, call.width, dtype=torch.float32)
    tables = (call.rank_offsets[linear], *call.batch)
    passes.output_pass_kernel[(tiles, column_tiles, cdiv(call.max_rank, ranks))](
        described(aligned(dy), choice["rows"], choice["columns"]), call.b_of(linear, call.b),
        described(s[linear], choice["rows"], ranks), ds_parts, db_parts, *tables, call.tokens, columns, call.width,
        call.segments, PRECISION=call.precision, SEGMENTS=call.segment_block, RANKS=ranks, CHUNK=choice["chunk"],
        **call.pass_settings(choice),
    )  # fmt: skip
    width, rows = call.summed_rows()
    ds_programs, db_programs = cdiv(call.tokens, rows), cdiv(columns, rows)
    passes.finish_output_kernel[(ds_programs + (db_programs * call.adapter_count if db.numel() else 0),)](
        ds_parts, ds[linear], db_parts, call.b_of(linear, db), call.scales[linear], *tables, call.tokens, columns,
        call.width, call.segments, column_tiles, ds_programs, db_programs, CHUNK=choice["chunk"],
        SEGMENTS=call.segment_block, WIDTH=width, ROWS=rows, num_warps=4, **call.overlap,
    )  # fmt: skip


def input_parts(call: Call, group: slice) -> Tensor:
    """Memory for `input_pass`'s partial sums."""
    linears = group.stop - group.start
    tiles = call.tiles(call.choice("input_pass", call.columns, linears=linears)["chunk"])
    return call.x.new_empty(linears, tiles, call.width, call.columns, dtype=torch.float32)


def input_pass(
    call: Call, group: slice, ds: Tensor, bits: Tensor, parts: Tensor, da: Tensor, beside: bool = False
) -> None:
    """Fill the rows of da that belong to a group of linears. beside: the kernel before has let this one begin, which
    reads only what is older."""
    linears, tiles = parts.shape[:2]
    choice = call.choice("input_pass", call.columns, linears=linears)
    ranks = rank_block(call.max_rank, MOST_RANKS[linears])
    rank_tiles = cdiv(call.max_rank, ranks)
    tables = (call.rank_offsets[group], *call.batch)
    passes.input_pass_kernel[(tiles, cdiv(call.columns, choice["columns"]), rank_tiles)](
        described(call.x, choice["rows"], choice["columns"]),
        described(ds[group].flatten(0, 1), choice["rows"], ranks), part_of(bits, group), parts, *tables, call.tokens,
        call.columns, call.width, call.words, call.segments, call.adapter_count, tiles,
        LINEARS=linears, MASKED=call.masked, PRECISION=call.precision, SEGMENTS=call.segment_block, RANKS=ranks,
        CHUNK=choice["chunk"], BESIDE=beside, **call.pass_settings(choice),
    )  # fmt: skip
    ranks = 4
    columns = SUMMED_TILE // ranks
    grid = (cdiv(call.columns, columns), cdiv(call.max_rank, ranks), linears * call.adapter_count)
    passes.finish_input_kernel[grid](
        parts, da, *tables, call.tokens, call.columns, call.width, call.segments, call.adapter_count, tiles,
        CHUNK=choice["chunk"], SEGMENTS=call.segment_block, RANKS=ranks, COLUMNS=columns, num_warps=4, **call.overlap,
    )  # fmt: skip


def _none(x: Tensor) -> Tensor:
    return x.new_empty(0, dtype=torch.int32)
