"""The CUDA implementation of `fused_lora::linear` and its gradients: which kernels run, in which order, on what memory.

Nothing here waits for the GPU or copies to it: grids come from shapes that the host knows, and what depends on where
segments begin is found by the kernels.

Numbers that follow from a batch's tokens (rows, segments, tiles) are not specialised: Triton would compile a kernel for
each combination of those that are one, or multiples of 16, and batches of many lengths meet them all. On a new machine
the few batches of three short plans of Llama-3.1-8B compiled for nearly three minutes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fused_lora.adapters import Operands, Settings, Tensors
from fused_lora.gpu.host.calls import Call, aligned
from fused_lora.gpu.host.choices import draws_while_projecting
from fused_lora.gpu.host.gating import gate, gate_backward
from fused_lora.gpu.host.gemms import input_product, output
from fused_lora.gpu.host.passes import (
    draw_masks,
    input_parts,
    input_pass,
    mask_and_project,
    new_bits,
    output_pass,
    project_masked,
)
from fused_lora.gpu.host.replay import remembered


@remembered
def forward(
    operands: Operands, settings: Settings, inputs: Tensors, weights: Tensors, biases: Tensors, keep_bits: bool
) -> tuple[list[Tensor], Tensor, Tensor]:
    """y of each linear, s and the mask bits: see `fused_lora.ops`."""
    x = inputs[0]
    if len(inputs) > 1:
        x = gate(*inputs, x.new_empty(x.shape))
    call = Call(operands, settings, x, weights)
    s = x.new_empty(call.linears, call.tokens, call.width)
    ys = [x.new_empty(call.tokens, weight.shape[0]) for weight in weights]
    bits = project(call, s)
    if call.tokens:
        for linear in range(call.linears):
            output(call, linear, s, biases[linear], ys[linear])
    return ys, s, bits if keep_bits else _no_bits(x)


@remembered
def backward(
    operands: Operands,
    settings: Settings,
    dys: Tensors,
    inputs: Tensors,
    weights: Tensors,
    s: Tensor,
    bits: Tensor,
    wanted: Sequence[bool],
) -> tuple[list[Tensor], Tensor, Tensor]:
    """The gradients of the inputs, da and db: see `fused_lora.ops`."""
    wants_inputs, wants_factors = wanted
    gated = len(inputs) > 1
    x = inputs[0].new_empty(inputs[0].shape) if gated else inputs[0]
    call = Call(operands, settings, x, weights)
    if call.masked and not bits.numel():
        bits = draw_masks(call)
    gradients = [tensor.new_empty(tensor.shape if wants_inputs else 0) for tensor in inputs]
    da, db = call.factor_gradients(wants_factors)
    if not call.tokens:
        return gradients, da.zero_(), db.zero_()
    ds = torch.empty_like(s)
    for linear in range(call.linears):
        output_pass(call, linear, dys[linear], s, ds, db)
    if gated:
        _gated_input_gradients(call, inputs, x, dys, ds, bits, gradients, da)
    else:
        input_gradients(call, dys, ds, bits, gradients[0] if wants_inputs else None, da if wants_factors else None)
    return gradients, da, db


def input_gradients(call: Call, dys: Tensors, ds: Tensor, bits: Tensor, dx: Tensor | None, da: Tensor | None) -> None:
    """Fill dx and da, where they are wanted.

    The tiles of dx are seldom a multiple of the multiprocessors. Those that are left make da meanwhile, and all of them
    what remains of it in the end: our GEMM lets the pass over x begin beside it. On a second stream either could begin
    first, and a pass that did took all multiprocessors.
    """
    groups = call.groups()
    concurrent = dx is not None and da is not None and len(groups) == 1
    # Before the GEMM: memory that its launch gives back must not be written while it runs.
    early = input_parts(call, groups[0]) if concurrent else None
    if dx is not None:
        for group in groups:
            concurrent = input_product(call, group, dys, ds, bits, dx, concurrent)
    if da is not None:
        for group in groups:
            parts = input_parts(call, group) if early is None else early
            input_pass(call, group, ds, bits, parts, da, concurrent)


def _gated_input_gradients(
    call: Call, inputs: Tensors, h: Tensor, dys: Tensors, ds: Tensor, bits: Tensor, gradients: Tensors, da: Tensor
) -> None:
    """Fill the gradients of gate and up, and da, unless they are empty, for a linear of h.

    h was not kept. Its memory takes dh first: when that is used up, h is computed there, and the pass over it follows.
    """
    [group] = call.groups()
    if gradients[0].numel():
        input_product(call, group, dys, ds, bits, h)
        gate_backward(*inputs, h, *gradients)
    else:
        gate(*inputs, h)
    if da.numel():
        call.x = aligned(h)
        input_pass(call, group, ds, bits, input_parts(call, group), da)


def project(call: Call, s: Tensor) -> Tensor:
    """Fill s; the mask bits, int32 [P, tokens, words], or an empty tensor without masks."""
    groups = call.groups()
    at_once = all(
        draws_while_projecting(group.stop - group.start, call.max_rank, call.bits, call.target) for group in groups
    )
    if not call.masked:
        bits = _no_bits(call.x)
    elif at_once:
        bits = new_bits(call)
    else:
        bits = draw_masks(call)
    for group in groups if call.tokens else ():
        (mask_and_project if at_once else project_masked)(call, group, bits, s)
    return bits


def _no_bits(x: Tensor) -> Tensor:
    return x.new_empty(0, dtype=torch.int32)
