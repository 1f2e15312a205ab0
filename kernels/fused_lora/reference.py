"""The LoRA linear for several adapters in plain PyTorch, forward and backward: readable, and right on any device.

The graph is cut at s, as in LoRAFusion (arXiv 2510.00206, graph splitting): x, s and the mask are all that the backward
pass needs. For segment i of tokens with adapter i, where f = scaling / (1 - p) and m(x) = mask * x:

    forward    s  = f m(x) a^T      y  = x w^T + bias + s b^T
    backward   ds = f dy b          db = dy^T s      da = ds^T m(x)      dx = dy w + m(ds a)

f meets nothing but the small s and ds, in at least float32, so that it is never rounded to the dtype of x.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from fused_lora.adapters import LoRAAdapter, LoRASegment
from fused_lora.philox import keep_mask

Mask = torch.Tensor | None


def draw_masks(
    adapters: Sequence[LoRAAdapter],
    segments: Sequence[LoRASegment],
    positions: torch.Tensor,
    columns: int,
    training: bool = True,
) -> list[Mask]:
    """Each segment's dropout mask, bool [tokens, columns]; None where nothing is dropped.

    positions: int64 [M], each token's place in its adapter's own stream.
    """
    masks: list[Mask] = []
    for segment in segments:
        adapter = adapters[segment.adapter]
        dropped = training and adapter.dropout > 0
        tokens = positions[segment.start : segment.stop]
        masks.append(keep_mask(adapter.key, tokens, columns, adapter.dropout) if dropped else None)
    return masks


def lora_forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    adapters: Sequence[LoRAAdapter],
    segments: Sequence[LoRASegment],
    masks: Sequence[Mask],
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """y [M, N], and s [tokens, r] of each segment.

    x [M, K]; weight [N, K]; bias [N] or None; adapters with a [r, K] and b [N, r], products being computed in x's
    dtype; segments in order and apart: tokens in none of them get the base linear alone. masks: from `draw_masks`.
    """
    y = F.linear(x, weight, bias)
    projected = []
    for segment, mask in zip(segments, masks, strict=True):
        adapter, tokens = adapters[segment.adapter], slice(segment.start, segment.stop)
        s = _scaled(_masked(x[tokens], mask) @ adapter.a.to(x.dtype).T, _factor(adapter, mask))
        y[tokens] += s @ adapter.b.to(x.dtype).T
        projected.append(s)
    return y, projected


def lora_backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    projected: Sequence[torch.Tensor],
    adapters: Sequence[LoRAAdapter],
    segments: Sequence[LoRASegment],
    masks: Sequence[Mask],
) -> tuple[torch.Tensor, list[torch.Tensor], list[torch.Tensor]]:
    """dx [M, K], and da [r, K], db [N, r] of each adapter in its own dtype, zero for one without tokens.

    dy [M, N]; projected from `lora_forward`; the other arguments as there.
    """
    dx = dy @ weight
    da = [torch.zeros_like(adapter.a) for adapter in adapters]
    db = [torch.zeros_like(adapter.b) for adapter in adapters]
    for segment, s, mask in zip(segments, projected, masks, strict=True):
        adapter, tokens = adapters[segment.adapter], slice(segment.start, segment.stop)
        ds = _scaled(dy[tokens] @ adapter.b.to(dy.dtype), _factor(adapter, mask))
        da[segment.adapter] += (ds.T @ _masked(x[tokens], mask)).to(adapter.a.dtype)
        db[segment.adapter] += (dy[tokens].T @ s).to(adapter.b.dtype)
        dx[tokens] += _masked(ds @ adapter.a.to(dy.dtype), mask)
    return dx, da, db


def gated(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """h = silu(gate) * up, the input of a down projection: in at least float32, rounded once to the dtype of gate."""
    wide = torch.promote_types(gate.dtype, torch.float32)
    return (F.silu(gate.to(wide)) * up.to(wide)).to(gate.dtype)


def gated_backward(gate: torch.Tensor, up: torch.Tensor, dh: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """dgate and dup, each rounded once:

    dup = dh silu(gate)      dgate = dh up sigmoid(gate) (1 + gate (1 - sigmoid(gate)))
    """
    dtype, wide = gate.dtype, torch.promote_types(gate.dtype, torch.float32)
    gate, up, dh = (tensor.to(wide) for tensor in (gate, up, dh))
    share = gate.sigmoid()
    dgate = dh * up * share * (1 + gate * (1 - share))
    return dgate.to(dtype), (dh * gate * share).to(dtype)


def _factor(adapter: LoRAAdapter, mask: Mask) -> float:
    return adapter.scaling if mask is None else adapter.scaling / (1.0 - adapter.dropout)


def _scaled(product: torch.Tensor, factor: float) -> torch.Tensor:
    """A Python float multiplies tensors of 16 bits in float32, and the result is rounded once."""
    return product * factor


def _masked(x: torch.Tensor, mask: Mask) -> torch.Tensor:
    return x if mask is None else torch.where(mask, x, 0.0)
