"""The operators of `ops` on a CPU, by the reference: they take the adapters' factors stacked, and masks as bits."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from fused_lora.adapters import LoRAAdapter, LoRABatch, LoRASegment, Operands, Settings, Tensors, rank_width
from fused_lora.philox import unpack, word_count, words_of_threshold
from fused_lora.reference import gated, gated_backward, lora_backward, lora_forward


def linear(
    operands: Operands, settings: Settings, inputs: Tensors, weights: Tensors, biases: Tensors, keep_bits: bool
) -> tuple[list[Tensor], Tensor, Tensor]:
    """y of each linear, s and the mask bits."""
    x, segments = _x(inputs), _segments(operands)
    bits = _draw(operands, segments, x) if settings.masked else _no_bits(x)
    s = x.new_zeros(len(weights), x.shape[0], rank_width(settings.max_rank))
    ys = []
    for index, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        adapters = _adapters(operands, settings, index, weights)
        bias, masks = bias if bias.numel() else None, _masks(bits, index, segments, x.shape[1])
        y, projected = lora_forward(x, weight, bias, adapters, segments, masks)
        for segment, part in zip(segments, projected, strict=True):
            s[index, segment.start : segment.stop, : part.shape[1]] = part
        ys.append(y)
    return ys, s, bits if keep_bits else _no_bits(x)


def linear_backward(
    operands: Operands,
    settings: Settings,
    dys: Tensors,
    inputs: Tensors,
    weights: Tensors,
    s: Tensor,
    bits: Tensor,
    wanted: Sequence[bool],
) -> tuple[list[Tensor], Tensor, Tensor]:
    """The gradients of the inputs [M, K], da as a and db as b; empty where not wanted."""
    x, segments, (wants_inputs, wants_factors) = _x(inputs), _segments(operands), wanted
    if settings.masked and not bits.numel():
        bits = _draw(operands, segments, x)
    dx = torch.zeros_like(x, memory_format=torch.contiguous_format)
    da, db = [operands.a.new_zeros(0, x.shape[1])], [operands.b.new_zeros(0)]
    for index, (dy, weight) in enumerate(zip(dys, weights, strict=True)):
        adapters = _adapters(operands, settings, index, weights)
        projected = [s[index, part.start : part.stop, : adapters[part.adapter].rank] for part in segments]
        masks = _masks(bits, index, segments, x.shape[1])
        dx_part, da_parts, db_parts = lora_backward(dy, x, weight, projected, adapters, segments, masks)
        dx += dx_part
        da += da_parts
        db += [part.flatten() for part in db_parts]
    gradients = list(gated_backward(*inputs, dx)) if len(inputs) > 1 else [dx]
    return (
        gradients if wants_inputs else [tensor.new_empty(0) for tensor in inputs],
        torch.cat(da) if wants_factors else operands.a.new_empty(0),
        torch.cat(db) if wants_factors else operands.b.new_empty(0),
    )


def _x(inputs: Tensors) -> Tensor:
    """The input of the linears, of which gate and up are made one."""
    return gated(*(tensor.contiguous() for tensor in inputs)) if len(inputs) > 1 else inputs[0]


def _segments(operands: Operands) -> list[LoRASegment]:
    return LoRABatch(operands.offsets, operands.adapters, operands.positions).segments()


def _no_bits(x: Tensor) -> Tensor:
    return x.new_empty(0, dtype=torch.int32)


def _draw(operands: Operands, segments: Sequence[LoRASegment], x: Tensor) -> Tensor:
    """The mask bits of all linears; tokens without an adapter keep everything."""
    positions, (tokens, columns) = operands.positions, x.shape
    if len(positions) != tokens:
        positions = positions + torch.arange(tokens)
    bits = torch.full((len(operands.keys), tokens, word_count(columns)), -1, dtype=torch.int32)
    for index, row in enumerate(zip(operands.thresholds.tolist(), operands.keys.tolist(), strict=True)):
        for segment in segments:
            threshold, key = (values[segment.adapter] for values in row)
            rows = slice(segment.start, segment.stop)
            words = words_of_threshold(key % (1 << 64), positions[rows], columns, threshold)
            bits[index, rows] = words.to(torch.int32)  # wraps: the same 32 bits
    return bits


def _masks(bits: Tensor, index: int, segments: Sequence[LoRASegment], columns: int) -> list[Tensor | None]:
    if not bits.numel():
        return [None] * len(segments)
    return [unpack(bits[index, segment.start : segment.stop], columns) for segment in segments]


def _adapters(operands: Operands, settings: Settings, index: int, weights: Tensors) -> list[LoRAAdapter]:
    """The adapters of one linear, from their stacked factors; with their whole factor as scaling."""
    a, b, rows = operands.a, operands.b, len(weights[index])
    first = sum(len(weight) * rank for weight, rank in zip(weights[:index], settings.ranks, strict=False))
    offsets = operands.rank_offsets[index].tolist()
    return [
        LoRAAdapter(
            a[start:stop],
            b[first + rows * (start - offsets[0]) : first + rows * (stop - offsets[0])].view(rows, stop - start),
            scale,
        )
        for (start, stop), scale in zip(pairwise(offsets), operands.scales[index].tolist(), strict=True)
    ]
