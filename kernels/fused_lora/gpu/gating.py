"""The CUDA implementation of `fused_lora::gated_linear`: h = silu(gate) * up, the linear's kernels, and all gradients.

h is not kept for the backward pass: when dh, the linear's dx, is used up, h is computed where it was, and the pass over
h for da follows. Arithmetic is in float32, and each result is rounded once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.jit import JITFunction

from fused_lora.gpu import calls, launch
from fused_lora.gpu.segments import wait_for_the_kernel_before

BLOCK = 2048  # elements of a program
WARPS = 8  # of a program: 16 bytes a thread, of elements of 16 bits


def forward(gate: Tensor, up: Tensor, weight: Tensor, bias: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """y, s and the mask bits; arguments: as `launch.forward` takes them after the biases."""
    h = gate.new_empty(gate.shape)
    _run(gate_kernel, gate.contiguous(), up.contiguous(), h)
    [y], s, bits = launch.forward(h, [weight], [bias], *arguments)
    return y, s, bits


def backward(
    dy: Tensor, gate: Tensor, up: Tensor, weight: Tensor, a: Tensor, b: Tensor, scales: Tensor, thresholds: Tensor,
    keys: Tensor, rank_offsets: Tensor, offsets: Tensor, adapters: Tensor, positions: Tensor, s: Tensor, bits: Tensor,
    ranks: Sequence[int], max_rank: int, masked: bool, wants_inputs: bool, wants_factors: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """dgate, dup, da and db: see `fused_lora.ops`."""
    gate, up, h = gate.contiguous(), up.contiguous(), gate.new_empty(gate.shape)
    call = calls.Call(h, [weight], a, b, scales, thresholds, keys, rank_offsets, offsets, adapters, positions, ranks,
                      max_rank, masked)  # fmt: skip
    if masked and not bits.numel():
        bits = launch.draw_masks(call)
    da, db = call.factor_gradients(wants_factors)
    dgate, dup = (gate.new_empty(gate.shape if wants_inputs else 0) for _ in range(2))
    if not call.tokens:
        return dgate, dup, da.zero_(), db.zero_()
    ds, alone = torch.empty_like(s), slice(0, 1)
    launch.output_pass(call, 0, dy, s, ds, db)
    if wants_inputs:
        launch.input_product(call, alone, [dy], ds, bits, h)
        _run(gate_backward_kernel, gate, up, h, dgate, dup)
    else:
        _run(gate_kernel, gate, up, h)
    if wants_factors:
        call.x = calls.aligned(h)
        launch.input_pass(call, alone, ds, bits, launch.input_parts(call, alone), da)
    return dgate, dup, da, db


def _run(kernel: JITFunction, gate: Tensor, *tensors: Tensor) -> None:
    """A kernel over all elements."""
    size = gate.numel()
    if size:
        settings = calls.overlap_of(calls.target_of(gate.device))
        kernel[(calls.cdiv(size, BLOCK),)](gate, *tensors, size, BLOCK=BLOCK, num_warps=WARPS, **settings)


@triton.jit
def _places(size, BLOCK: tl.constexpr):
    """This program's elements, and which of them there are; a tensor may have more than 2^31."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    return place, place < size


@triton.jit
def gate_kernel(gate, up, h, size, BLOCK: tl.constexpr, OVERLAP: tl.constexpr):
    """h of gate and up, all contiguous, of `size` elements."""
    wait_for_the_kernel_before(OVERLAP)
    place, inside = _places(size, BLOCK)
    x = tl.load(gate + place, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(h + place, (x * tl.sigmoid(x) * u).to(h.dtype.element_ty), mask=inside)


@triton.jit
def gate_backward_kernel(gate, up, dh, dgate, dup, size, BLOCK: tl.constexpr, OVERLAP: tl.constexpr):
    """dgate and dup of dh, over which h is then written; all contiguous, of `size` elements."""
    wait_for_the_kernel_before(OVERLAP)
    place, inside = _places(size, BLOCK)
    x = tl.load(gate + place, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + place, mask=inside, other=0.0).to(tl.float32)
    d = tl.load(dh + place, mask=inside, other=0.0).to(tl.float32)
    share = tl.sigmoid(x)
    tl.store(dgate + place, (d * u * share * (1.0 + x * (1.0 - share))).to(dgate.dtype.element_ty), mask=inside)
    tl.store(dup + place, (d * x * share).to(dup.dtype.element_ty), mask=inside)
    tl.store(dh + place, (x * share * u).to(dh.dtype.element_ty), mask=inside)
