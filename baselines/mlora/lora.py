"""mLoRA's BatchLoRA: the base linear once over all tokens, then LoRA in torch's operations, adapter by adapter.

Reproduced, from `LoRAFunction` of the released code at 4abf120: one custom backward pass for all adapters of a linear,
each adapter's term added in place to the base linear's result, and each adapter's part of the input's gradient written
in place into one tensor ("graph pruning"). Not reproduced: float32 adapters (a setting of the run), a pass over the
dropped input to scale it, where here s is scaled, which is r columns wide; and two faults, a backward pass that forgets
the dropout mask, and a dropout of zero being refused.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from lorafusion.model.lora import ActiveBatch, StageLinear, each


class _Part(NamedTuple):
    """An adapter's tokens [start, stop), its scaling, and its dropout in this pass."""

    start: int
    stop: int
    scaling: float
    dropout: float


@each
def looped(linear: StageLinear, active: ActiveBatch) -> None:
    """The LoRA kind: any number of adapters in a microbatch, one after another."""
    layer = linear.layer

    def forward(x: torch.Tensor) -> torch.Tensor:
        parts, factors = [], []
        for segment in active.batch.segments:
            job = linear.jobs[segment.adapter]
            if job.name in layer.lora_A:
                dropout = job.dropout if layer.training else 0.0
                parts.append(_Part(segment.start, segment.stop, job.scaling, dropout))
                factors += [layer.lora_A[job.name].weight, layer.lora_B[job.name].weight]
        base = layer.get_base_layer()
        return _BatchLoRA.apply(x, base.weight, base.bias, parts, *factors)

    layer.forward = forward


class _BatchLoRA(torch.autograd.Function):
    """y = x w^T + bias, and for each adapter c dropout(x) a^T b^T added on its tokens. x [1, T, K], y [1, T, N]; w and
    bias are frozen; factors a [r, K], b [N, r] in turn, in whose dtype LoRA is computed: x's, or float32."""

    @staticmethod
    def forward(ctx, x, weight, bias, parts, *factors):
        y, rows = F.linear(x, weight, bias), x[0]
        kept = []
        for part, (a, b) in zip(parts, _pairs(factors), strict=True):
            dropped, mask = rows[part.start : part.stop], None
            if part.dropout:
                dropped, mask = torch.native_dropout(dropped, part.dropout, True)
            dropped = dropped.to(a.dtype)
            s = dropped @ a.T
            _add_product(y[0, part.start : part.stop], s, b.T, part.scaling)
            kept += [dropped, mask, s]
        ctx.parts, ctx.count = parts, len(factors)
        ctx.save_for_backward(weight, *factors, *kept)
        return y

    @staticmethod
    def backward(ctx, dy):
        weight, *saved = ctx.saved_tensors
        factors, kept = saved[: ctx.count], saved[ctx.count :]
        dx = dy @ weight
        gradients = []
        for index, (part, (a, b)) in enumerate(zip(ctx.parts, _pairs(factors), strict=True)):
            dropped, mask, s = kept[3 * index : 3 * index + 3]
            rows = dy[0, part.start : part.stop].to(b.dtype)
            ds = (rows @ b).mul_(part.scaling)
            gradients += [ds.T @ dropped, (rows.T @ s).mul_(part.scaling)]
            target = dx[0, part.start : part.stop]
            if mask is None:
                _add_product(target, ds, a, 1.0)
            else:
                target.add_(torch.ops.aten.native_dropout_backward(ds @ a, mask, 1 / (1 - part.dropout)))
        return dx, None, None, None, *gradients


def _add_product(target, left, right, scaling):
    """target += scaling left right, in the product's own pass where the dtypes are the same."""
    if target.dtype == left.dtype:
        target.addmm_(left, right, alpha=scaling)
    else:
        target.add_(left @ right, alpha=scaling)


def _pairs(factors):
    return zip(factors[::2], factors[1::2], strict=True)
