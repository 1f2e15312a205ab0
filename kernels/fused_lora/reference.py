"""The LoRA linear for several adapters in plain PyTorch, forward and backward: readable, and right on any device.

The graph is cut at s = dropout(x) a^T, as in LoRAFusion (arXiv 2510.00206, graph splitting): x, s and nothing else of
the size of x is kept for the backward pass; the mask is drawn again. For segment i with adapter i:

    forward    s = m(x) a^T         y  = x w^T + bias + c s b^T
    backward   ds = c dy b          db = c dy^T s      da = ds^T m(x)      dx = dy w + m^T(ds a)

where m(x) = mask * x / (1 - p), and m^T applies the same mask and factor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from fused_lora.philox import check_key, drop_threshold, keep_mask


@dataclass(frozen=True)
class LoRASegment:
    """The tokens [start, stop) of a batch that belong to one adapter; `adapter` is its index."""

    start: int
    stop: int
    adapter: int


@dataclass(frozen=True, eq=False)
class LoRAAdapter:
    """One adapter of a linear: a [r, K], b [N, r]; scaling is alpha/r or alpha/sqrt(r); key from `mask_key`."""

    a: torch.Tensor
    b: torch.Tensor
    scaling: float
    dropout: float = 0.0
    key: int = 0


def lora_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    adapters: Sequence[LoRAAdapter],
    segments: Sequence[LoRASegment],
    positions: torch.Tensor,
    training: bool = True,
) -> torch.Tensor:
    """y [M, N] with gradients for x and the adapters; weight and bias are frozen.

    x [M, K]; weight [N, K]; bias [N] or None; segments in order and apart, tokens in none of them get the base linear
    alone; positions int64 [M], each token's place in its adapter's own stream. Adapters may have another floating dtype
    than x: products are computed in x's, gradients come in the adapter's. Scaling and 1 / (1 - p) are Python floats,
    never rounded to x's dtype. An adapter without tokens gets no gradient. Differentiable once.
    Raises ValueError naming the argument, what was found and what was expected.
    """
    _check(x, weight, bias, adapters, segments, positions)
    factors = [factor for adapter in adapters for factor in (adapter.a, adapter.b)]
    return _LoRALinear.apply(x, weight, bias, positions, tuple(adapters), tuple(segments), training, *factors)


def lora_forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    adapters: Sequence[LoRAAdapter],
    segments: Sequence[LoRASegment],
    positions: torch.Tensor,
    training: bool = True,
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """y [M, N], and s [tokens, r] of each segment. Arguments as in `lora_linear`."""
    y = F.linear(x, weight, bias)
    projected = []
    for segment in segments:
        adapter, tokens = adapters[segment.adapter], slice(segment.start, segment.stop)
        keep = _keep(adapter, positions[tokens], x.shape[1], training)
        s = _dropout(x[tokens], keep, adapter.dropout) @ adapter.a.to(x.dtype).T
        y[tokens] += adapter.scaling * (s @ adapter.b.to(x.dtype).T)
        projected.append(s)
    return y, projected


def lora_backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    projected: Sequence[torch.Tensor],
    adapters: Sequence[LoRAAdapter],
    segments: Sequence[LoRASegment],
    positions: torch.Tensor,
    training: bool = True,
    input_gradient: bool = True,
    factor_gradients: Sequence[tuple[bool, bool]] | None = None,
) -> tuple[torch.Tensor | None, list[torch.Tensor | None], list[torch.Tensor | None]]:
    """dx [M, K] (None unless `input_gradient`), and da [r, K], db [N, r] of each adapter (None without tokens).

    dy [M, N]; projected from `lora_forward`; factor_gradients: whether each adapter's da and db are wanted, all of them
    if None; the other arguments as in `lora_linear`.
    """
    wanted = factor_gradients or [(True, True)] * len(adapters)
    dx = dy @ weight if input_gradient else None
    da: list[torch.Tensor | None] = [None] * len(adapters)
    db: list[torch.Tensor | None] = [None] * len(adapters)
    for segment, s in zip(segments, projected, strict=True):
        if segment.start == segment.stop:
            continue
        index, tokens = segment.adapter, slice(segment.start, segment.stop)
        adapter, (wants_a, wants_b) = adapters[index], wanted[index]
        if wants_b:
            db[index] = _added(db[index], adapter.scaling * (dy[tokens].T @ s), adapter.b.dtype)
        if not wants_a and dx is None:
            continue
        ds = adapter.scaling * (dy[tokens] @ adapter.b.to(dy.dtype))
        keep = _keep(adapter, positions[tokens], x.shape[1], training)
        if wants_a:
            da[index] = _added(da[index], ds.T @ _dropout(x[tokens], keep, adapter.dropout), adapter.a.dtype)
        if dx is not None:
            dx[tokens] += _dropout(ds @ adapter.a.to(dy.dtype), keep, adapter.dropout)
    return dx, da, db


class _LoRALinear(torch.autograd.Function):
    """Saves x and each segment's s; the adapters' factors are arguments so that autograd sees them."""

    @staticmethod
    def forward(ctx, x, weight, bias, positions, adapters, segments, training, *factors):
        y, projected = lora_forward(x, weight, bias, adapters, segments, positions, training)
        ctx.save_for_backward(x, weight, positions, *factors, *projected)
        ctx.settings = [(adapter.scaling, adapter.dropout, adapter.key) for adapter in adapters]
        ctx.segments, ctx.training = segments, training
        return y

    # Once: s is saved as a constant, and a second derivative would silently miss the part that goes through it.
    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, weight, positions, *rest = ctx.saved_tensors
        count = len(ctx.settings)
        factors, projected = rest[: 2 * count], rest[2 * count :]
        adapters = [
            LoRAAdapter(factors[2 * index], factors[2 * index + 1], *settings)
            for index, settings in enumerate(ctx.settings)
        ]
        wants_x, wants_factors = ctx.needs_input_grad[0], ctx.needs_input_grad[7:]
        wanted = list(zip(wants_factors[::2], wants_factors[1::2], strict=True))
        dx, da, db = lora_backward(
            dy, x, weight, projected, adapters, ctx.segments, positions, ctx.training, wants_x, wanted
        )
        gradients = [gradient for pair in zip(da, db, strict=True) for gradient in pair]
        return (dx, None, None, None, None, None, None, *gradients)


def _keep(adapter: LoRAAdapter, positions: torch.Tensor, columns: int, training: bool) -> torch.Tensor | None:
    """The adapter's mask for these tokens; None where nothing is dropped."""
    if not training or adapter.dropout == 0:
        return None
    return keep_mask(adapter.key, positions, columns, adapter.dropout)


def _dropout(x: torch.Tensor, keep: torch.Tensor | None, p: float) -> torch.Tensor:
    """mask * x / (1 - p); x itself without a mask."""
    return x if keep is None else torch.where(keep, x * (1.0 / (1.0 - p)), 0.0)


def _added(total: torch.Tensor | None, part: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    part = part.to(dtype)
    return part if total is None else total + part


def _check(x, weight, bias, adapters, segments, positions) -> None:
    """Raise ValueError, one line, for arguments that do not fit each other."""
    _expect("x", x, 2, "[M, K]")
    _expect("weight", weight, 2, "[N, K]")
    tokens, columns, rows = x.shape[0], x.shape[1], weight.shape[0]
    _expect_like("weight", weight, x, (rows, columns))
    if bias is not None:
        _expect_like("bias", bias, x, (rows,))
    if positions.dtype != torch.int64 or positions.shape != (tokens,) or positions.device != x.device:
        found = f"{positions.dtype} {list(positions.shape)} on {positions.device}"
        raise ValueError(f"positions: expected torch.int64 [{tokens}] on {x.device}, found {found}")
    for index, adapter in enumerate(adapters):
        _check_adapter(f"adapters[{index}]", adapter, x, rows)
    end = 0
    for index, segment in enumerate(segments):
        if not 0 <= segment.adapter < len(adapters):
            wanted = f"an adapter in [0, {len(adapters)})"
            raise ValueError(f"segments[{index}]: expected {wanted}, found {segment.adapter}")
        if not end <= segment.start <= segment.stop <= tokens:
            span = f"[{segment.start}, {segment.stop})"
            raise ValueError(f"segments[{index}]: expected a span within [{end}, {tokens}), in order, found {span}")
        end = segment.stop


def _check_adapter(name: str, adapter: LoRAAdapter, x: torch.Tensor, rows: int) -> None:
    _expect(f"{name}.a", adapter.a, 2, "[r, K]")
    _expect(f"{name}.b", adapter.b, 2, "[N, r]")
    rank = adapter.a.shape[0]
    if rank < 1:
        raise ValueError(f"{name}.a: expected a rank of at least 1, found {list(adapter.a.shape)}")
    _expect_like(f"{name}.a", adapter.a, x, (rank, x.shape[1]), dtype=False)
    _expect_like(f"{name}.b", adapter.b, x, (rows, rank), dtype=False)
    try:
        drop_threshold(adapter.dropout)
        check_key(adapter.key)
    except ValueError as error:
        raise ValueError(f"{name}.{error}") from None


def _expect(name: str, tensor: torch.Tensor, dimensions: int, form: str) -> None:
    if tensor.dim() != dimensions or not tensor.is_floating_point():
        found = f"{tensor.dtype} {list(tensor.shape)}"
        raise ValueError(f"{name}: expected floating point {form}, found {found}")


def _expect_like(name, tensor, x, shape, dtype=True) -> None:
    if tensor.shape != shape or tensor.device != x.device or (dtype and tensor.dtype != x.dtype):
        wanted = f"{x.dtype if dtype else 'floating point'} {list(shape)} on {x.device}"
        found = f"{tensor.dtype} {list(tensor.shape)} on {tensor.device}"
        raise ValueError(f"{name}: expected {wanted}, found {found}")
