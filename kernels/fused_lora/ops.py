"""The LoRA linear as PyTorch operators, forward and backward: what autograd, `torch.compile` and fake tensors know.

`fused_lora::linear` computes P linears that share their input, for G adapters; `fused_lora::linear_backward` all of its
gradients. On a CPU they run the reference (in `cpu`), on a GPU the Triton kernels. Arguments are as `lora_linears`
makes them:

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

`run_linear` and `run_gated_linear` are how they are called. In eager mode these go to the kernels through an autograd
function of their own: what PyTorch does around an operator with lists of tensors takes the host 0.2 ms in each pass of
q, k and v, as long as all that the kernels want of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.library import CustomOpDef
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from fused_lora import cpu
from fused_lora.adapters import rank_width
from fused_lora.philox import word_count

KERNELS: dict[tuple[CustomOpDef, str], Callable] = {}  # what computes an operator, by type of device


def _operator(name: str, on_cpu: Callable, on_gpu: Callable) -> CustomOpDef:
    made = torch.library.custom_op(f"fused_lora::{name}", on_cpu, mutates_args=(), device_types="cpu")
    made.register_kernel("cuda")(on_gpu)
    KERNELS[made, "cpu"], KERNELS[made, "cuda"] = on_cpu, on_gpu
    return made


def _kernel(operator: CustomOpDef, x: Tensor) -> Callable | None:
    """What computes an operator for x, where nothing but eager mode wants to see it: no compiler, and no mode or
    tensors of another kind, such as fake ones."""
    if torch.compiler.is_compiling() or is_in_torch_dispatch_mode() or type(x) not in (Tensor, torch.nn.Parameter):
        return None
    return KERNELS.get((operator, x.device.type))


def run_linear(x: Tensor, *arguments: Any) -> list[Tensor]:
    """The y of `fused_lora::linear`, by the shortest way."""
    with without_autocast(x):
        if _kernel(linear, x):
            return list(_Linear.apply(x, *arguments)[:-2])
        return linear(x, *arguments)[0]


def run_gated_linear(gate: Tensor, *arguments: Any) -> Tensor:
    """The y of `fused_lora::gated_linear`, by the shortest way."""
    with without_autocast(gate):
        return (_GatedLinear.apply if _kernel(gated_linear, gate) else gated_linear)(gate, *arguments)[0]


def without_autocast(x: Tensor) -> AbstractContextManager:
    """The operators' dtypes are those of their arguments: autocast would change them inside."""
    device = x.device.type
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


# Triton launches on the current device, which need not be the tensors'.
def _linear_on_gpu(x, *arguments):
    from fused_lora.gpu import launch

    with torch.cuda.device_of(x):
        return launch.forward(x, *arguments)


linear = _operator("linear", cpu.linear, _linear_on_gpu)


@linear.register_fake
def _(x, weights, biases, a, b, scales, thresholds, keys, rank_offsets, offsets, adapters, positions, *settings):
    ys = [x.new_empty(x.shape[0], weight.shape[0]) for weight in weights]
    return ys, *_fake_kept(x, len(weights), *settings)


def _linear_backward_on_gpu(dys, x, *arguments):
    from fused_lora.gpu import launch

    with torch.cuda.device_of(x):
        return launch.backward(dys, x, *arguments)


linear_backward = _operator("linear_backward", cpu.linear_backward, _linear_backward_on_gpu)


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
    with without_autocast(x):  # a backward pass under autocast computes as the forward did
        dx, da, db = _backward_of(linear_backward, x)(
            dys, x, weights, a, b, *tables, s, bits, ctx.ranks, ctx.max_rank, ctx.masked, wants_x, wants_factors
        )
    none = [None] * ctx.count
    gradients = (dx if wants_x else None, none, none, da if wants_factors else None, db if wants_factors else None)
    return (*gradients, *[None] * 11)


def _backward_of(operator: CustomOpDef, x: Tensor) -> Callable:
    """With gradients enabled it must be the operator, which refuses to be differentiated once more."""
    return (None if torch.is_grad_enabled() else _kernel(operator, x)) or operator


linear.register_autograd(_backward, setup_context=_setup_context)


class _Linear(torch.autograd.Function):
    """`fused_lora::linear` in eager mode: from its arguments to the y, s and the mask bits."""

    @staticmethod
    def forward(ctx, *inputs):
        output = KERNELS[linear, inputs[0].device.type](*inputs)
        _setup_context(ctx, inputs, output)
        ys, s, bits = output
        return (*ys, s, bits)

    @staticmethod
    def backward(ctx, *gradients):
        *dys, ds, dbits = gradients
        dx, _, _, *others = _backward(ctx, dys, ds, dbits)
        return (dx, None, None, *others)


def _gated_linear_on_gpu(gate, *arguments):
    from fused_lora.gpu import gating

    with torch.cuda.device_of(gate):
        return gating.forward(gate, *arguments)


gated_linear = _operator("gated_linear", cpu.gated_linear, _gated_linear_on_gpu)


@gated_linear.register_fake
def _(gate, up, weight, bias, a, b, scales, thresholds, keys, rank_offsets, offsets, adapters, positions, *settings):
    return gate.new_empty(gate.shape[0], weight.shape[0]), *_fake_kept(gate, 1, *settings)


def _gated_linear_backward_on_gpu(dy, *arguments):
    from fused_lora.gpu import gating

    with torch.cuda.device_of(dy):
        return gating.backward(dy, *arguments)


gated_linear_backward = _operator("gated_linear_backward", cpu.gated_linear_backward, _gated_linear_backward_on_gpu)


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
    with without_autocast(dy):
        backward = _backward_of(gated_linear_backward, dy)
        dgate, dup, da, db = backward(dy.contiguous(), *ctx.saved_tensors, *settings)
    inputs = (dgate, dup) if wants_inputs else (None, None)
    return (*inputs, None, None, *((da, db) if wants_factors else (None, None)), *[None] * 11)


gated_linear.register_autograd(_gated_backward, setup_context=_setup_gated_context)


class _GatedLinear(torch.autograd.Function):
    """`fused_lora::gated_linear` in eager mode."""

    @staticmethod
    def forward(ctx, *inputs):
        output = KERNELS[gated_linear, inputs[0].device.type](*inputs)
        _setup_gated_context(ctx, inputs, output)
        return output

    @staticmethod
    def backward(ctx, *gradients):
        return _gated_backward(ctx, *gradients)


def _fake_kept(
    x: Tensor, linears: int, ranks: Sequence[int], max_rank: int, masked: bool, keep_bits: bool
) -> tuple[Tensor, Tensor]:
    """s and the mask bits in the shapes that they would have."""
    tokens, columns = x.shape
    shape = (linears, tokens, word_count(columns))
    bits = x.new_empty(shape, dtype=torch.int32) if masked and keep_bits else cpu.no_bits(x)
    return x.new_empty(linears, tokens, rank_width(max_rank)), bits


def _fake_gradients(wanted: bool, *tensors: Tensor) -> list[Tensor]:
    return [one.new_empty(one.shape if wanted else 0) for one in tensors]
