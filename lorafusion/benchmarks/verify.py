"""The LoRA linear against float64: outputs and gradients, with the same dropout masks.

The measure is the root mean square error over that of plain PyTorch in the same dtype, and how far the LoRA term's size
is off: an error along the term, such as a wrong scale, hides in the first beside the base's product.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fused_lora import AdapterTable, LoRAAdapter, LoRABatch, LoRASegment, lora_linears
from fused_lora.reference import draw_masks, lora_backward, lora_forward
from lorafusion.benchmarks.measure import require_device
from lorafusion.benchmarks.suite import KernelSuite
from lorafusion.verdicts import Verdict

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
    for inputs, outputs in suite.verify.shapes:
        for tokens in suite.verify.tokens:
            for rank in suite.verify.ranks:
                for mixed in (False, True):
                    problem = random_problem(inputs, outputs, tokens, rank, mixed, device, dtype, suite.seed)
                    for key, value in errors(problem).items():
                        worst[key] = max(worst.get(key, 0.0), value)
    scale, of_size = worst.pop("LoRA term"), "LoRA term of y: relative error of its size"
    figures = {f"{key}: error over plain PyTorch's": value for key, value in worst.items()}
    return Verdict(
        check="kernels",
        passed=all(value <= MOST_ERROR[dtype] for value in worst.values()) and scale <= MOST_SCALE_ERROR[dtype],
        statement=f"fused_lora in {suite.dtype} on {suite.device} ({name}): outputs and gradients as close to float64 "
        "as plain PyTorch's in the same dtype, with the same masks",
        figures={**figures, of_size: scale},
        limits=dict.fromkeys(figures, MOST_ERROR[dtype]) | {of_size: MOST_SCALE_ERROR[dtype]},
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
    """y, dx, and da and db of each adapter with tokens, by the reference in the problem's dtype."""
    p = problem
    masks = draw_masks(p.adapters, p.segments, p.positions, p.x.shape[1])
    y, projected = lora_forward(p.x, p.weight, None, p.adapters, p.segments, masks)
    dx, da, db = lora_backward(p.dy, p.x, p.weight, projected, p.adapters, p.segments, masks)
    return _named(p, y, dx, da, db)


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
