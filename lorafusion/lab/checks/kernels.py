"""The LoRA linear against float64: outputs and gradients by the plain formula and autograd, masks by their definition.

The measure is the root mean square error over that of plain PyTorch in the same dtype, and how far the LoRA term's size
is off: an error along the term, such as a wrong scale, hides in the first beside the base's product.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fused_lora import AdapterTable, LoRAAdapter, LoRABatch, LoRASegment, lora_linears, ops
from fused_lora.linear import operator_arguments
from fused_lora.philox import unpack
from lorafusion.lab.checks.verdicts import Verdict
from lorafusion.lab.definitions import keep_mask_of_key
from lorafusion.lab.experiments.kernel_suite import KernelSuite
from lorafusion.lab.experiments.kernel_times import require_device

# Of eager's root mean square error. Kernels add in float32, in another order, and round once where eager rounds twice;
# in float32 itself they add one after the other what a library adds in pieces (5.0 was the worst on an H200).
MOST_ERROR = {torch.float32: 6.0, torch.float16: 1.5, torch.bfloat16: 1.5}
# Of the LoRA term's size: some hundred thousand elements' rounding errors cancel, a wrong scale does not.
MOST_SCALE_ERROR = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 5e-3}


@dataclass(frozen=True)
class Problem:
    """A LoRA linear with all that its forward and backward pass need. x [M, K], weight [N, K], dy [M, N]."""

    x: Tensor
    weight: Tensor
    dy: Tensor
    adapters: Sequence[LoRAAdapter]
    segments: Sequence[LoRASegment]
    positions: Tensor

    def to(self, dtype: torch.dtype) -> Problem:
        adapters = [replace(one, a=one.a.to(dtype), b=one.b.to(dtype)) for one in self.adapters]
        tensors = {"x": self.x.to(dtype), "weight": self.weight.to(dtype), "dy": self.dy.to(dtype)}
        return replace(self, adapters=adapters, **tensors)


def verify(suite: KernelSuite, name: str) -> Verdict:
    """All cases of a kernel suite's `verify`: one adapter, and five of mixed rank, dropout and length."""
    require_device(suite)
    device, dtype = torch.device(suite.device), getattr(torch, suite.dtype)
    worst: dict[str, float] = {}
    wrong, of_masks = 0, "elements of dropout masks that are not those of their definition"
    for inputs, outputs in suite.verify.shapes:
        for tokens in suite.verify.tokens:
            for rank in suite.verify.ranks:
                for mixed in (False, True):
                    problem = random_problem(inputs, outputs, tokens, rank, mixed, device, dtype, suite.seed)
                    for key, value in errors(problem).items():
                        worst[key] = max(worst.get(key, 0.0), value)
                    wrong += wrong_mask_elements(problem)
    scale, of_size = worst.pop("LoRA term"), "LoRA term of y: relative error of its size"
    figures = {f"{key}: error over plain PyTorch's": value for key, value in worst.items()}
    return Verdict(
        check="kernels",
        passed=all(value <= MOST_ERROR[dtype] for value in worst.values())
        and scale <= MOST_SCALE_ERROR[dtype]
        and wrong == 0,
        statement=f"fused_lora in {suite.dtype} on {suite.device} ({name}): outputs and gradients as close to float64 "
        "as plain PyTorch's in the same dtype, with the same masks",
        figures={**figures, of_size: scale, of_masks: wrong},
        limits=dict.fromkeys(figures, MOST_ERROR[dtype]) | {of_size: MOST_SCALE_ERROR[dtype], of_masks: 0},
    )


def random_problem(
    inputs: int, outputs: int, tokens: int, rank: int, mixed: bool, device: torch.device, dtype: torch.dtype, seed: int
) -> Problem:
    """One adapter; or five, one of them without tokens and one with a single token, and tokens without an adapter."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, generator=generator, device=device).to(dtype)

    settings = [(rank, 0.1), (1, 0.0), (rank, 0.5), (2 * rank, 0.25), (7, 0.1)] if mixed else [(rank, 0.1)]
    adapters = [
        LoRAAdapter(normal(r, inputs) * inputs**-0.5, normal(outputs, r), 1.0 + i, p, 2**63 + i)
        for i, (r, p) in enumerate(settings)
    ]
    third = tokens // 3
    segments = [LoRASegment(0, tokens, 0)]
    if mixed:
        last = max(2 * third, third + 1)
        borders = (0, third, third, third + 1, last, min(last + 5, tokens), tokens)
        owners = (0, 4, 1, 2, None, 3)
        spans = zip(borders[:-1], borders[1:], owners, strict=True)
        segments = [LoRASegment(*span) for span in spans if span[2] is not None]
    positions = torch.arange(tokens, device=device) + 2**33
    weight = normal(outputs, inputs) * inputs**-0.5
    return Problem(normal(tokens, inputs), weight, normal(tokens, outputs), adapters, segments, positions)


def errors(problem: Problem) -> dict[str, float]:
    """For each tensor the error over plain PyTorch's, and the relative error of the LoRA term's size."""
    exact, eager, ours = reference(problem.to(torch.float64)), reference(problem), kernels(problem)
    out = {}
    for key, wanted in exact.items():
        own, allowed = ((one[key].double() - wanted).square().mean().sqrt() for one in (ours, eager))
        # Sums of few elements may be exact in eager mode: less than half a unit in the last place is no error.
        floor = torch.finfo(problem.x.dtype).eps / 2 * wanted.square().mean().sqrt()
        out[key] = float(own / torch.maximum(allowed, floor)) if floor > 0 else float(own > 0) * float("inf")
    base = problem.x.double() @ problem.weight.double().T
    term = exact["y"] - base
    # Along the term, over the tokens that have one.
    out["LoRA term"] = float(((ours["y"].double() - base) * term).sum() / term.square().sum() - 1)
    out["LoRA term"] = abs(out["LoRA term"])
    return out


def reference(problem: Problem) -> dict[str, Tensor]:
    """y, dx, and da and db of each adapter with tokens: the plain formula in the problem's dtype, its gradients by
    autograd, with masks from `lorafusion.lab.definitions`. Nothing of it is the code that is verified."""
    p = problem
    x = p.x.detach().requires_grad_()
    factors = [(one.a.detach().requires_grad_(), one.b.detach().requires_grad_()) for one in p.adapters]
    y = x @ p.weight.T
    for segment, mask in zip(p.segments, masks(p), strict=True):
        tokens, adapter, (a, b) = (
            slice(segment.start, segment.stop),
            p.adapters[segment.adapter],
            factors[segment.adapter],
        )
        s = (x[tokens] * mask) @ a.T * (adapter.scaling / (1 - adapter.dropout))
        y = torch.cat([y[: segment.start], y[tokens] + s @ b.T, y[segment.stop :]])
    y.backward(p.dy)
    return _named(p, y.detach(), x.grad, [a.grad for a, _ in factors], [b.grad for _, b in factors])


def masks(problem: Problem) -> list[Tensor]:
    """Each segment's mask by its definition: bool [tokens, columns]."""
    first, columns = int(problem.positions[0]), problem.x.shape[1]
    return [
        keep_mask_of_key(one.key, one.dropout, first + segment.start, segment.stop - segment.start, columns)
        .to(problem.x.device)
        for segment in problem.segments
        for one in [problem.adapters[segment.adapter]]
    ]  # fmt: skip


def wrong_mask_elements(problem: Problem) -> int:
    """How many elements of the masks that the kernels draw are not those of their definition."""
    p = problem
    table, batch = AdapterTable.of([p.adapters], p.x.device), LoRABatch.of(p.segments, p.positions)
    arguments = operator_arguments([p.adapters], batch, table, training=True)
    _, _, bits = ops.KERNELS[ops.linear, p.x.device.type](p.x, [p.weight], [p.x.new_empty(0)], *arguments, True)
    drawn = unpack(bits[0], p.x.shape[1])
    return sum(
        int((drawn[segment.start : segment.stop] != mask).sum())
        for segment, mask in zip(p.segments, masks(p), strict=True)
    )


def kernels(problem: Problem) -> dict[str, Tensor]:
    """The same by `lora_linears`."""
    p = problem
    x = p.x.detach().requires_grad_()
    adapters = [replace(one, a=one.a.detach().requires_grad_(), b=one.b.detach().requires_grad_())
                for one in p.adapters]  # fmt: skip
    table, batch = AdapterTable.of([adapters], x.device), LoRABatch.of(p.segments, p.positions)
    [y] = lora_linears(x, [p.weight], [None], [adapters], batch, table=table)
    y.backward(p.dy)
    return _named(p, y.detach(), x.grad, [one.a.grad for one in adapters], [one.b.grad for one in adapters])


def _named(problem: Problem, y: Tensor, dx: Tensor, da: list[Tensor], db: list[Tensor]) -> dict[str, Tensor]:
    used = sorted({one.adapter for one in problem.segments if one.start < one.stop})
    return {"y": y, "dx": dx, "da": torch.cat([da[i] for i in used]), "db": torch.cat([db[i].T for i in used]).T}
