"""Launches of the passes over the large activations, and of the kernel that draws masks: grids, settings, memory."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from fused_lora.gpu.host.calls import SUMMED_TILE, Call, aligned, cdiv, described, gluon_described, launch, part_of
from fused_lora.gpu.host.choices import MOST_RANKS, project_registers, project_slots, rank_block
from fused_lora.gpu.portable import masks, passes
from fused_lora.gpu.sm90 import projection
from fused_lora.gpu.sm90.projection import PROJECT_COLUMNS, PROJECT_ROWS


def new_bits(call: Call) -> Tensor:
    return torch.empty(call.linears, call.tokens, call.words, dtype=torch.int32, device=call.x.device)


def draw_masks(call: Call) -> Tensor:
    """The mask bits, int32 [P, tokens, words]."""
    bits = new_bits(call)
    lora, choice = call.operands, call.choice("masks", call.columns)
    rows, columns = choice["rows"], choice["columns"]
    grid = (cdiv(call.tokens, rows), cdiv(call.words, columns), call.linears)
    if call.tokens:
        launch(
            masks.draw_masks_kernel, grid,
            bits, lora.positions, lora.thresholds, lora.keys, *call.batch, call.tokens, call.words, call.segments,
            call.adapter_count, POSITION_STRIDE=call.position_stride, SEGMENTS=call.segment_block,
            ROWS=rows, COLUMNS=columns, num_warps=choice["warps"], **call.overlap,
        )  # fmt: skip
    return bits


def mask_and_project(call: Call, group: slice, bits: Tensor, s: Tensor) -> None:
    """Fill the bits and s of a group of linears."""
    lora, linears = call.operands, group.stop - group.start
    ranks = rank_block(call.max_rank, MOST_RANKS[linears])
    splits = call.choice("mask_and_project", call.columns, linears=linears)["splits"]
    registers, drawing = project_registers(linears, ranks)
    tiles = (call.tiles(PROJECT_ROWS), ranks, PROJECT_COLUMNS)

    def run(grid: tuple[int, ...], *arguments, **settings) -> None:
        launch(
            projection.mask_and_project_kernel, grid, gluon_described(call.x, PROJECT_ROWS, PROJECT_COLUMNS),
            gluon_described(call.a_like_x, ranks, PROJECT_COLUMNS), *arguments, lora.positions,
            lora.thresholds[group], lora.keys[group], **settings, POSITION_STRIDE=call.position_stride,
            SLOTS=project_slots(math.prod(grid), linears, ranks, call.target), DRAWING_REGISTERS=drawing,
            num_warps=projection.WARPS, maxnreg=registers, launch_pdl=True,
        )  # fmt: skip

    _project(call, group, bits, s, tiles, splits, run)


def project_masked(call: Call, group: slice, bits: Tensor, s: Tensor) -> None:
    """Fill s of a group of linears, from masks that are drawn."""
    linears = group.stop - group.start
    ranks = rank_block(call.max_rank, MOST_RANKS[linears])
    choice = call.choice("project", call.columns, linears=linears)
    rows, columns = choice["rows"], choice["columns"]

    def run(grid: tuple[int, ...], *arguments, **settings) -> None:
        launch(
            passes.project_kernel, grid, described(call.x, rows, columns), described(call.a_like_x, ranks, columns),
            *arguments, **settings, PRECISION=call.precision, **call.pass_settings(choice),
        )  # fmt: skip

    _project(call, group, bits, s, (call.tiles(rows), ranks, columns), choice["splits"], run)


def _project(
    call: Call, group: slice, bits: Tensor, s: Tensor, tiles: tuple[int, int, int], splits: int, run: Callable
) -> None:
    """What both projections have in common: how the columns are split, and the sums of the splits.

    tiles: row tiles, ranks of a tile and columns of a step. run: launches the kernel."""
    row_tiles, ranks, columns = tiles
    linears, rank_tiles = group.stop - group.start, cdiv(call.max_rank, ranks)
    # Whole tiles of columns to each split, so that no tile is read by two.
    split_columns = cdiv(cdiv(call.columns, splits), columns) * columns
    splits = cdiv(call.columns, split_columns)
    whole = splits == rank_tiles == 1  # then sums are complete, and an adapter's row is written by one program
    shape = (linears, call.tokens, call.width)
    target = s[group] if whole else s.new_empty(splits, *shape, dtype=torch.float32)
    tables = (call.operands.scales[group], call.operands.rank_offsets[group], *call.batch)
    run(
        (row_tiles, rank_tiles, splits), part_of(bits, group), target, *tables, call.tokens, call.columns, call.width,
        call.words, call.segments, call.adapter_count, split_columns, LINEARS=linears, MASKED=call.masked, WHOLE=whole,
        SEGMENTS=call.segment_block, RANKS=ranks,
    )  # fmt: skip
    if whole:
        return
    width, rows = call.summed_rows()
    launch(
        passes.finish_project_kernel, (cdiv(call.tokens, rows), linears), target, s[group], *tables, call.tokens,
        call.width, call.segments, call.adapter_count, splits, target.stride(0), SEGMENTS=call.segment_block,
        WIDTH=width, ROWS=rows, num_warps=4, **call.overlap,
    )  # fmt: skip


def output_pass(call: Call, linear: int, dy: Tensor, s: Tensor, ds: Tensor, db: Tensor) -> None:
    """Fill ds of one linear from its dy [M, N] and, unless db is empty, its part of db."""
    columns = call.weights[linear].shape[0]
    choice = call.choice("output_pass", columns)
    ranks = rank_block(call.max_rank, 128)
    tiles, column_tiles = call.tiles(choice["chunk"]), cdiv(columns, choice["columns"])
    ds_parts = dy.new_empty(column_tiles, call.tokens, call.width, dtype=torch.float32)
    db_parts = dy.new_empty(tiles, columns, call.width, dtype=torch.float32)
    tables = (call.operands.rank_offsets[linear], *call.batch)
    launch(
        passes.output_pass_kernel, (tiles, column_tiles, cdiv(call.max_rank, ranks)),
        described(aligned(dy), choice["rows"], choice["columns"]), call.b_of(linear, call.operands.b),
        described(s[linear], choice["rows"], ranks), ds_parts, db_parts, *tables, call.tokens, columns, call.width,
        call.segments, PRECISION=call.precision, SEGMENTS=call.segment_block, RANKS=ranks, CHUNK=choice["chunk"],
        **call.pass_settings(choice),
    )  # fmt: skip
    width, rows = call.summed_rows()
    ds_programs, db_programs = cdiv(call.tokens, rows), cdiv(columns, rows)
    launch(
        passes.finish_output_kernel, (ds_programs + (db_programs * call.adapter_count if db.numel() else 0),),
        ds_parts, ds[linear], db_parts, call.b_of(linear, db), call.operands.scales[linear], *tables, call.tokens,
        columns, call.width, call.segments, column_tiles, ds_programs, db_programs, CHUNK=choice["chunk"],
        SEGMENTS=call.segment_block, WIDTH=width, ROWS=rows, num_warps=4, **call.overlap,
    )  # fmt: skip


def input_parts(call: Call, group: slice) -> Tensor:
    """Memory for the partial sums of `input_pass`, float32 [linears of the group, tiles, width, K]."""
    linears = group.stop - group.start
    tiles = call.tiles(call.choice("input_pass", call.columns, linears=linears)["chunk"])
    return call.x.new_empty(linears, tiles, call.width, call.columns, dtype=torch.float32)


def input_pass(
    call: Call, group: slice, ds: Tensor, bits: Tensor, parts: Tensor, da: Tensor, concurrent: bool = False
) -> None:
    """Fill the rows of da that belong to a group of linears.

    concurrent: the kernel before has let this one begin, which reads only what is older."""
    linears, tiles = parts.shape[:2]
    choice = call.choice("input_pass", call.columns, linears=linears)
    ranks = rank_block(call.max_rank, MOST_RANKS[linears])
    rank_tiles = cdiv(call.max_rank, ranks)
    tables = (call.operands.rank_offsets[group], *call.batch)
    launch(
        passes.input_pass_kernel, (tiles, cdiv(call.columns, choice["columns"]), rank_tiles),
        described(call.x, choice["rows"], choice["columns"]),
        described(ds[group].flatten(0, 1), choice["rows"], ranks), part_of(bits, group), parts, *tables, call.tokens,
        call.columns, call.width, call.words, call.segments, call.adapter_count, tiles,
        LINEARS=linears, MASKED=call.masked, PRECISION=call.precision, SEGMENTS=call.segment_block, RANKS=ranks,
        CHUNK=choice["chunk"], CONCURRENT=concurrent, **call.pass_settings(choice),
    )  # fmt: skip
    ranks = 4
    columns = SUMMED_TILE // ranks
    grid = (cdiv(call.columns, columns), cdiv(call.max_rank, ranks), linears * call.adapter_count)
    launch(
        passes.finish_input_kernel, grid, parts, da, *tables, call.tokens, call.columns, call.width, call.segments,
        call.adapter_count, tiles, CHUNK=choice["chunk"], SEGMENTS=call.segment_block, RANKS=ranks, COLUMNS=columns,
        num_warps=4, **call.overlap,
    )  # fmt: skip
