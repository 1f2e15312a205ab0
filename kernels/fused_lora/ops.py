"""The LoRA linear as PyTorch operators, forward and backward: what autograd, `torch.compile` and fake tensors know.

`fused_lora::linear` computes P linears that share their input, for G adapters; `fused_lora::linear_backward` all of its
gradients. On a CPU they run the reference, on a GPU the Triton kernels. Arguments are as `lora_linears` makes them:

    x [M, K]; weights P times [N_p, K]; biases P times [N_p], empty where there is none
    a [R, K]: the adapters' a stacked, linear after linear. b [sum of N_p R_p]: each [N_p, r] flat, in the same order
    scales [P, G], thresholds, keys, rank_offsets: as in `AdapterTable`, scales being factors or scalings
    offsets, adapters, positions: as in `LoRABatch`
    ranks: R_p, the rows of a that each linear has. max_rank: of any adapter
    masked: is there dropout? keep_bits: keep the mask for the backward pass, or draw it again there?

and the results beside y are what the backward pass needs: s [P, M, rank_width(max_rank)], of which an adapter fills as
many columns as its rank and zeros beyond, and the mask bits, int32 [P, M, word_count(K)].

`fused_lora::gated_linear` is one linear of h = silu(gate) * up, which keeps gate and up [M, K], that the linears before
it hand over anyway, and not h: the backward pass computes h again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fused_lora.adapters import LoRAAdapter, LoRABatch, rank_width
from fused_lora.philox import unpack, word_count, words_of_threshold
from fused_lora.reference import gated, gated_backward, lora_backward, lora_forward


@torch.library.custom_op("fused_lora::linear", mutates_args=(), device_types="cpu")
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
    """y of each linear, s and the mask bits: on a CPU, by the reference."""
    segments = LoRABatch(offsets, adapters, positions).segments()
    bits = _draw(x, thresholds, keys, segments, positions) if masked else _no_bits(x)
    s = x.new_zeros(len(weights), x.shape[0], rank_width(max_rank))
    ys = []
    for index, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        own = _adapters(index, weights, a, b, scales, rank_offsets, ranks)
        bias = bias if bias.numel() else None
        y, projected = lora_forward(x, weight, bias, own, segments, _masks(bits, index, segments, x.shape[1]))
        for segment, part in zip(segments, projected, strict=True):
            s[index, segment.start : segment.stop, : part.shape[1]] = part
        ys.append(y)
    return ys, s, bits if keep_bits else _no_bits(x)


@linear.register_fake
def _(x, weights, biases, a, b, scales, thresholds, keys, rank_offsets, offsets, adapters, positions, *settings):
    ys = [x.new_empty(x.shape[0], weight.shape[0]) for weight in weights]
    return ys, *_fake_kept(x, len(weights), *settings)


@torch.library.custom_op("fused_lora::linear_backward", mutates_args=(), device_types="cpu")
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
    """dx [M, K], da as a and db as b; empty where not wanted. On a CPU, by the reference."""
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


@linear_backward.register_fake
def _(dys, x, weights, a, b, *rest):
    wants_x, wants_factors = rest[-2:]
    return *_fake_gradients(wants_x, x), *_fake_gradients(wants_factors, a, b)


def _setup_context(ctx, inputs, output) -> None:
    x, weights, _, a, b, *tables = inputs[:12]
    ctx.ranks, ctx.max_rank, ctx.masked, _ = inputs[12:]
    ys, s, bits = output
    ctx.count = len(weights)
    # Neither s nor the bits are results to differentiate: a second derivative through them would be silently wrong.
    ctx.mark_non_differentiable(s, bits)
    ctx.set_materialize_grads(False)  # zeros as large as s and the bits would be made at each call
    ctx.save_for_backward(x, a, b, *tables, s, bits, *weights)


def _backward(ctx, dys, _s, _bits):
    x, a, b, *rest = ctx.saved_tensors
    tables, (s, bits), weights = rest[:7], rest[7:9], rest[9:]
    dys = [
        x.new_zeros(x.shape[0], weight.shape[0]) if dy is None else dy.contiguous()
        for dy, weight in zip(dys, weights, strict=True)
    ]
    wants_x, wants_factors = ctx.needs_input_grad[0], any(ctx.needs_input_grad[3:5])
    with torch.autocast(x.device.type, enabled=False):  # a backward pass under autocast computes as the forward did
        dx, da, db = linear_backward(
            dys, x, weights, a, b, *tables, s, bits, ctx.ranks, ctx.max_rank, ctx.masked, wants_x, wants_factors
        )
    none = [None] * ctx.count
    gradients = (dx if wants_x else None, none, none, da if wants_factors else None, db if wants_factors else None)
    return (*gradients, *[None] * 11)


linear.register_autograd(_backward, setup_context=_setup_context)


# Triton launches on the current device, which need not be the tensors'.
@linear.register_kernel("cuda")
def _(x, *arguments):
    from fused_lora.gpu import launch

    with torch.cuda.device_of(x):
        return launch.forward(x, *arguments)


@linear_backward.register_kernel("cuda")
def _(dys, x, *arguments):
    from fused_lora.gpu import launch

    with torch.cuda.device_of(x):
        return launch.backward(dys, x, *arguments)


@torch.library.custom_op("fused_lora::gated_linear", mutates_args=(), device_types="cpu")
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
    """y, s and the mask bits of one linear of h: on a CPU, by the reference."""
    tables = (scales, thresholds, keys, rank_offsets, offsets, adapters, positions)
    settings = (ranks, max_rank, masked, keep_bits)
    h = gated(gate.contiguous(), up.contiguous())
    [y], s, bits = linear(h, [weight], [bias], a, b, *tables, *settings)
    return y, s, bits


@gated_linear.register_fake
def _(gate, up, weight, bias, a, b, scales, thresholds, keys, rank_offsets, offsets, adapters, positions, *settings):
    return gate.new_empty(gate.shape[0], weight.shape[0]), *_fake_kept(gate, 1, *settings)


@torch.library.custom_op("fused_lora::gated_linear_backward", mutates_args=(), device_types="cpu")
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
    """dgate and dup [M, K], da as a and db as b; empty where not wanted. On a CPU, by the reference."""
    tables = (scales, thresholds, keys, rank_offsets, offsets, adapters, positions)
    settings = (ranks, max_rank, masked, wants_inputs, wants_factors)
    gate, up = gate.contiguous(), up.contiguous()
    dh, da, db = linear_backward([dy], gated(gate, up), [weight], a, b, *tables, s, bits, *settings)
    if not wants_inputs:
        return gate.new_empty(0), gate.new_empty(0), da, db
    return *gated_backward(gate, up, dh), da, db


@gated_linear_backward.register_fake
def _(dy, gate, up, weight, a, b, *rest):
    wants_inputs, wants_factors = rest[-2:]
    return *_fake_gradients(wants_inputs, gate, up), *_fake_gradients(wants_factors, a, b)


def _setup_gated_context(ctx, inputs, output) -> None:
    gate, up, weight, _, a, b, *tables = inputs[:13]
    ctx.ranks, ctx.max_rank, ctx.masked, _ = inputs[13:]
    _, s, bits = output
    ctx.mark_non_differentiable(s, bits)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(gate, up, weight, a, b, *tables, s, bits)


def _gated_backward(ctx, dy, _s, _bits):
    if dy is None:
        return (None,) * 17
    wants_inputs, wants_factors = any(ctx.needs_input_grad[:2]), any(ctx.needs_input_grad[4:6])
    settings = (ctx.ranks, ctx.max_rank, ctx.masked, wants_inputs, wants_factors)
    with torch.autocast(dy.device.type, enabled=False):
        dgate, dup, da, db = gated_linear_backward(dy.contiguous(), *ctx.saved_tensors, *settings)
    inputs = (dgate, dup) if wants_inputs else (None, None)
    return (*inputs, None, None, *((da, db) if wants_factors else (None, None)), *[None] * 11)


gated_linear.register_autograd(_gated_backward, setup_context=_setup_gated_context)


@gated_linear.register_kernel("cuda")
def _(gate, *arguments):
    from fused_lora.gpu import gating

    with torch.cuda.device_of(gate):
        return gating.forward(gate, *arguments)


@gated_linear_backward.register_kernel("cuda")
def _(dy, *arguments):
    from fused_lora.gpu import gating

    with torch.cuda.device_of(dy):
        return gating.backward(dy, *arguments)


def _fake_kept(
    x: Tensor, linears: int, ranks: Sequence[int], max_rank: int, masked: bool, keep_bits: bool
) -> tuple[Tensor, Tensor]:
    """s and the mask bits in the shapes that they would have."""
    tokens, columns = x.shape
    shape = (linears, tokens, word_count(columns))
    bits = x.new_empty(shape, dtype=torch.int32) if masked and keep_bits else _no_bits(x)
    return x.new_empty(linears, tokens, rank_width(max_rank)), bits


def _fake_gradients(wanted: bool, *tensors: Tensor) -> list[Tensor]:
    return [one.new_empty(one.shape if wanted else 0) for one in tensors]


def _no_bits(x: Tensor) -> Tensor:
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
