"""The base products with the LoRA term: by our GEMM for sm_90, which adds it inside, or by the library's, in place over
the term that `expand_*` wrote before. `choices` says whose is faster for a shape."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fused_lora.gpu.host.calls import MOST_LINEARS, Call, cdiv, fetchable, gluon_described, launch, part_of
from fused_lora.gpu.host.choices import OWN, gemm_programs, rank_block
from fused_lora.gpu.portable import products
from fused_lora.gpu.sm90 import gemms as sm90
from fused_lora.gpu.sm90.ring import DEPTH, REGISTERS, TILE_COLUMNS, TILE_ROWS, WARPS

RANK_CHUNK = 32  # ranks that our GEMM takes at a time: half a slot, and few steps for the usual ranks


def output(call: Call, linear: int, s: Tensor, bias: Tensor, y: Tensor) -> None:
    """Fill y [M, N] of one linear: x wᵀ + bias + s bᵀ. s: of all linears; bias: [N], or empty."""
    weight = call.weights[linear]
    columns = weight.shape[0]
    choice = call.choice("output", columns, call.columns)
    if choice["gemm"] != OWN or not _takes(call.x, weight, y):
        expand_output(call, linear, s, bias, y)
        torch.addmm(y, call.x, weight.t(), out=y)
        return
    b, chunk = call.padded_b(linear), _chunk(call.width)
    launch(
        sm90.output_gemm_kernel, (gemm_programs(call.tokens, columns, call.target),),
        gluon_described(call.x, TILE_ROWS, DEPTH), gluon_described(weight, TILE_COLUMNS, DEPTH),
        gluon_described(y, TILE_ROWS // 2, TILE_COLUMNS // choice["slices"]),
        gluon_described(s[linear], TILE_ROWS, chunk), gluon_described(b, TILE_COLUMNS, chunk), bias, *call.batch,
        call.tokens, columns, call.columns, call.segments, HAS_BIAS=bias.numel() > 0,
        STEPS=_halvings(call.segments), **_settings(call, choice),
    )  # fmt: skip


def input_product(
    call: Call, group: slice, dys: Sequence[Tensor], ds: Tensor, bits: Tensor, dx: Tensor, next_may_begin: bool = False
) -> bool:
    """Fill dx [M, K] with the sum over a group of linears, or add to what an earlier group has filled. dys: [M, N_p] of
    all linears.

    next_may_begin: let the next kernel begin while this one runs, if it is ours. Returns whether it may."""
    weights, dys, first_group = call.weights[group], dys[group], group.start == 0
    inner = [weight.shape[0] for weight in weights]
    choice = call.choice("input", call.columns, sum(inner), len(inner))
    words = [part_of(bits, group).flatten(0, 1)] if call.masked else []
    if choice["gemm"] == OWN and first_group and _takes(*dys, *weights, dx, *words):
        _own_input_product(call, group, choice, dys, ds, words, dx, next_may_begin)
        return next_may_begin
    if first_group:
        expand_input(call, group, ds, bits, dx)
    else:
        terms = torch.empty_like(dx)
        expand_input(call, group, ds, bits, terms)
        dx += terms
    for dy, weight in zip(dys, weights, strict=True):
        torch.addmm(dx, dy, weight, out=dx)
    return False


def _own_input_product(
    call: Call, group: slice, choice: Mapping[str, Any], dys: Sequence[Tensor], ds: Tensor, words: list[Tensor],
    dx: Tensor, next_may_begin: bool,
) -> None:  # fmt: skip
    weights = call.weights[group]
    linears, chunk = len(weights), _chunk(call.width)
    described = [
        descriptor
        for dy, weight in zip(dys, weights, strict=True)
        for descriptor in (gluon_described(dy, TILE_ROWS, DEPTH), gluon_described(weight, DEPTH, TILE_COLUMNS))
    ]  # fmt: skip
    inner, missing = [weight.shape[0] for weight in weights], MOST_LINEARS - linears
    described_ds = gluon_described(ds[group].flatten(0, 1), TILE_ROWS, chunk)
    described_words = gluon_described(words[0], TILE_ROWS, TILE_COLUMNS // 32) if words else described_ds
    launch(
        sm90.input_gemm_kernel, (gemm_programs(call.tokens, call.columns, call.target),),
        *described, *described[:2] * missing, gluon_described(dx, TILE_ROWS // 2, TILE_COLUMNS // choice["slices"]),
        described_ds, gluon_described(call.padded_a(group), chunk, TILE_COLUMNS), described_words, *call.batch,
        call.tokens, call.columns, *inner, *inner[:1] * missing, call.segments, call.adapter_count,
        LINEARS=linears, MASKED=call.masked, NEXT_MAY_BEGIN=next_may_begin,
        # A loop over the segments, if only of one: without it the compiler spills the terms of several linears.
        STEPS=max(_halvings(call.segments), int(linears > 1)), **_settings(call, choice),
    )  # fmt: skip


def expand_output(call: Call, linear: int, s: Tensor, bias: Tensor, y: Tensor) -> None:
    """Fill y of one linear with all but the product of the base: bias + s bᵀ."""
    columns = call.weights[linear].shape[0]
    lora, choice = call.operands, call.choice("expand_output", columns)
    grid = (cdiv(call.tokens, choice["rows"]), cdiv(columns, choice["columns"]))
    launch(
        products.expand_output_kernel, grid,
        y, s[linear], call.b_of(linear, lora.b), bias, lora.rank_offsets[linear], *call.batch, call.tokens, columns,
        call.width, call.segments, HAS_BIAS=bias.numel() > 0, PRECISION=call.precision, SEGMENTS=call.segment_block,
        RANKS=rank_block(call.max_rank, 32), ROWS=choice["rows"], COLUMNS=choice["columns"],
        num_warps=choice["warps"], **call.overlap,
    )  # fmt: skip


def expand_input(call: Call, group: slice, ds: Tensor, bits: Tensor, dx: Tensor) -> None:
    """Fill dx with all but the products of the bases, of a group of linears: the masked ds a."""
    linears = group.stop - group.start
    lora, choice = call.operands, call.choice("expand_input", call.columns, linears=linears)
    grid = (cdiv(call.tokens, choice["rows"]), cdiv(call.columns, choice["columns"]))
    launch(
        products.expand_input_kernel, grid,
        dx, ds[group], lora.a, part_of(bits, group), lora.rank_offsets[group], *call.batch, call.tokens, call.columns,
        call.width, call.words, call.segments, call.adapter_count, LINEARS=linears, MASKED=call.masked,
        PRECISION=call.precision, SEGMENTS=call.segment_block, RANKS=rank_block(call.max_rank, 32),
        ROWS=choice["rows"], COLUMNS=choice["columns"], num_warps=choice["warps"], **call.overlap,
    )  # fmt: skip


def _settings(call: Call, choice: Mapping[str, Any]) -> dict:
    return {
        "WIDTH": call.width,
        "GROUP": choice["group"],
        "SLOTS": choice["slots"],
        "STORES": choice["stores"],
        "num_warps": WARPS,
        "maxnreg": REGISTERS,
        "launch_pdl": True,
    }


def _chunk(width: int) -> int:
    """Ranks that our GEMM takes at a time: a divisor of the width."""
    return RANK_CHUNK if width % RANK_CHUNK == 0 else 16


def _halvings(segments: int) -> int:
    """Steps of a search that tells how many of the segments are below a limit; 0 for a single segment."""
    return segments.bit_length() if segments > 1 else 0


def _takes(*tensors: Tensor) -> bool:
    """May our GEMM take them? It wants 16-bit numbers; the mask's words have 32."""
    return all((tensor.element_size() == 2 or tensor.dtype == torch.int32) and fetchable(tensor) for tensor in tensors)
