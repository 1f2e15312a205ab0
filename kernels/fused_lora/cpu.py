"""The operators of `ops` on a CPU, by the reference: they take the adapters' factors stacked, and masks as bits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fused_lora.adapters import LoRAAdapter, LoRABatch, rank_width
from fused_lora.philox import unpack, word_count, words_of_threshold
from fused_lora.reference import gated, gated_backward, lora_backward, lora_forward


def linear(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    a: Tensor,
    b: Tensor,
    scales: Tensor,
    thresholds: Tensor,
    keys: Tensor,
    rank_offsets: Tensor,
    offsets: Tensor,
    adapters: Tensor,
    positions: Tensor,
    ranks: Sequence[int],
    max_rank: int,
    masked: bool,
    keep_bits: bool,
) -> tuple[list[Tensor], Tensor, Tensor]:
    """y of each linear, s and the mask bits."""
    segments = LoRABatch(offsets, adapters, positions).segments()
    bits = _draw(x, thresholds, keys, segments, positions) if masked else no_bits(x)
    s = x.new_zeros(len(weights), x.shape[0], rank_width(max_rank))
    ys = []
    for index, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        own = _adapters(index, weights, a, b, scales, rank_offsets, ranks)
        bias = bias if bias.numel() else None
        y, projected = lora_forward(x, weight, bias, own, segments, _masks(bits, index, segments, x.shape[1]))
        for segment, part in zip(segments, projected, strict=True):
            s[index, segment.start : segment.stop, : part.shape[1]] = part
        ys.append(y)
    return ys, s, bits if keep_bits else no_bits(x)


def linear_backward(
    dys: Sequence[Tensor],
    x: Tensor,
    weights: Sequence[Tensor],
    a: Tensor,
    b: Tensor,
    scales: Tensor,
    thresholds: Tensor,
    keys: Tensor,
    rank_offsets: Tensor,
    offsets: Tensor,
    adapters: Tensor,
    positions: Tensor,
    s: Tensor,
    bits: Tensor,
    ranks: Sequence[int],
    max_rank: int,
    masked: bool,
    wants_x: bool,
    wants_factors: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """dx [M, K], da as a and db as b; empty where not wanted."""
    segments = LoRABatch(offsets, adapters, positions).segments()
    if masked and not bits.numel():
        bits = _draw(x, thresholds, keys, segments, positions)
    dx = torch.zeros_like(x, memory_format=torch.contiguous_format)
    da, db = [a.new_zeros(0, a.shape[1])], [b.new_zeros(0)]
    for index, (dy, weight) in enumerate(zip(dys, weights, strict=True)):
        own = _adapters(index, weights, a, b, scales, rank_offsets, ranks)
        projected = [s[index, one.start : one.stop, : own[one.adapter].rank] for one in segments]
        masks = _masks(bits, index, segments, x.shape[1])
        dx_part, da_parts, db_parts = lora_backward(dy, x, weight, projected, own, segments, masks)
        dx += dx_part
        da += da_parts
        db += [part.flatten() for part in db_parts]
    return (
        dx if wants_x else x.new_empty(0),
        torch.cat(da) if wants_factors else a.new_empty(0),
        torch.cat(db) if wants_factors else b.new_empty(0),
    )


def gated_linear(
    gate: Tensor,
    up: Tensor,
    weight: Tensor,
    bias: Tensor,
    a: Tensor,
    b: Tensor,
    scales: Tensor,
    thresholds: Tensor,
    keys: Tensor,
    rank_offsets: Tensor,
    offsets: Tensor,
    adapters: Tensor,
    positions: Tensor,
    ranks: Sequence[int],
    max_rank: int,
    masked: bool,
    keep_bits: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """y, s and the mask bits of one linear of h."""
    tables = (scales, thresholds, keys, rank_offsets, offsets, adapters, positions)
    settings = (ranks, max_rank, masked, keep_bits)
    h = gated(gate.contiguous(), up.contiguous())
    [y], s, bits = linear(h, [weight], [bias], a, b, *tables, *settings)
    return y, s, bits


def gated_linear_backward(
    dy: Tensor,
    gate: Tensor,
    up: Tensor,
    weight: Tensor,
    a: Tensor,
    b: Tensor,
    scales: Tensor,
    thresholds: Tensor,
    keys: Tensor,
    rank_offsets: Tensor,
    offsets: Tensor,
    adapters: Tensor,
    positions: Tensor,
    s: Tensor,
    bits: Tensor,
    ranks: Sequence[int],
    max_rank: int,
    masked: bool,
    wants_inputs: bool,
    wants_factors: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dgate and dup [M, K], da as a and db as b; empty where not wanted."""
    tables = (scales, thresholds, keys, rank_offsets, offsets, adapters, positions)
    settings = (ranks, max_rank, masked, wants_inputs, wants_factors)
    gate, up = gate.contiguous(), up.contiguous()
    dh, da, db = linear_backward([dy], gated(gate, up), [weight], a, b, *tables, s, bits, *settings)
    if not wants_inputs:
        return gate.new_empty(0), gate.new_empty(0), da, db
    return *gated_backward(gate, up, dh), da, db


def no_bits(x: Tensor) -> Tensor:
    return x.new_empty(0, dtype=torch.int32)


def _draw(x: Tensor, thresholds: Tensor, keys: Tensor, segments: Sequence, positions: Tensor) -> Tensor:
    """The mask bits of all linears; tokens without an adapter keep everything."""
    if len(positions) != x.shape[0]:
        positions = positions + torch.arange(x.shape[0])
    bits = torch.full((len(thresholds), x.shape[0], word_count(x.shape[1])), -1, dtype=torch.int32)
    for index, row in enumerate(zip(thresholds.tolist(), keys.tolist(), strict=True)):
        for segment in segments:
            threshold, key = (values[segment.adapter] for values in row)
            tokens = slice(segment.start, segment.stop)
            words = words_of_threshold(key % (1 << 64), positions[tokens], x.shape[1], threshold)
            bits[index, tokens] = words.to(torch.int32)  # wraps: the same 32 bits
    return bits


def _masks(bits: Tensor, index: int, segments: Sequence, columns: int) -> list[Tensor | None]:
    if not bits.numel():
        return [None] * len(segments)
    return [unpack(bits[index, one.start : one.stop], columns) for one in segments]


def _adapters(index: int, weights, a, b, scales, rank_offsets, ranks) -> list[LoRAAdapter]:
    """The adapters of one linear, from their stacked factors; with their whole factor as scaling."""
    flat = sum(weight.shape[0] * rank for weight, rank in zip(weights[:index], ranks, strict=False))
    return [
        LoRAAdapter(a[start:stop], b[first:last].view(len(weights[index]), stop - start), scaling)
        for (start, stop), (first, last), scaling in zip(
            _pairs(rank_offsets[index].tolist()),
            _pairs([flat + weights[index].shape[0] * (r - sum(ranks[:index])) for r in rank_offsets[index].tolist()]),
            scales[index].tolist(),
            strict=True,
        )
    ]


def _pairs(values: list[int]) -> Iterator[tuple[int, int]]:
    return zip(values[:-1], values[1:], strict=True)
