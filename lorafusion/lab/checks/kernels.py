"""Check: the LoRA linear against float64. Outputs and gradients by the plain formula and autograd, masks by their
definition.

The measure is the root mean square error over that of plain PyTorch in the same dtype, and how far the LoRA term's size
is off: an error along the term, such as a wrong scale, hides in the first beside the base's product.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product

import torch
from torch import Tensor

from fused_lora import AdapterTable, LoRAAdapter, LoRABatch, LoRASegment, lora_linears, ops
from fused_lora.linear import operator_arguments
from fused_lora.philox import unpack
from lorafusion.lab.checks.verdicts import Curve, Evidence, Verdict
from lorafusion.lab.definitions import keep_mask_of_key
from lorafusion.lab.experiments import EXPERIMENTS
from lorafusion.lab.experiments.experiment import require_device
from lorafusion.lab.experiments.kernel_suite import KernelSuite
from lorafusion.lab.suite import Suite

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
        adapters = [replace(item, a=item.a.to(dtype), b=item.b.to(dtype)) for item in self.adapters]
        tensors = {"x": self.x.to(dtype), "weight": self.weight.to(dtype), "dy": self.dy.to(dtype)}
        return replace(self, adapters=adapters, **tensors)


def check_suite(suite: Suite) -> tuple[Verdict, list[Curve]]:
    """The check of the entry of configs/kernels.yaml that has the suite's name."""
    return verify(EXPERIMENTS["kernels"].entry_of(suite.name), suite.name), []


def verify(suite: KernelSuite, name: str) -> Verdict:
    """All cases of a kernel suite's `verify`: one adapter, and five of mixed rank, dropout and length."""
    require_device(suite, f"configs/kernels.yaml: {name}")
    device, dtype = torch.device(suite.device), getattr(torch, suite.dtype)
    worst: dict[str, float] = {}
    wrong = 0
    cases = product(suite.verify.shapes, suite.verify.tokens, suite.verify.ranks, (False, True))
    for (inputs, outputs), tokens, rank, mixed in cases:
        problem = random_problem(inputs, outputs, tokens, rank, mixed, device, dtype, suite.seed)
        for key, error in errors(problem).items():
            worst[key] = max(worst.get(key, 0.0), error)
        wrong += wrong_mask_elements(problem)
    scale, evidence = worst.pop("LoRA term"), Evidence()
    for key, error in worst.items():
        evidence.add(f"{key}: error over plain PyTorch's", error, MOST_ERROR[dtype])
    evidence.add("LoRA term of y: relative error of its size", scale, MOST_SCALE_ERROR[dtype])
    evidence.add("elements of dropout masks that are not those of their definition", wrong, 0)
    return evidence.verdict(
        "kernels",
        f"fused_lora in {suite.dtype} on {suite.device} ({name}): outputs and gradients as close to float64 "
        "as plain PyTorch's in the same dtype, with the same masks",
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
    ratios = {}
    for key, right in exact.items():
        error, allowed = ((result[key].double() - right).square().mean().sqrt() for result in (ours, eager))
        # Sums of few elements may be exact in eager mode: less than half a unit in the last place is no error.
        floor = torch.finfo(problem.x.dtype).eps / 2 * right.square().mean().sqrt()
        ratios[key] = float(error / torch.maximum(allowed, floor)) if floor > 0 else float(error > 0) * float("inf")
    base = problem.x.double() @ problem.weight.double().T
    term = exact["y"] - base
    # Along the term, over the tokens that have one.
    size = ((ours["y"].double() - base) * term).sum() / term.square().sum()
    return ratios | {"LoRA term": abs(float(size - 1))}


def reference(problem: Problem) -> dict[str, Tensor]:
    """y, dx, and da and db of each adapter with tokens: the plain formula in the problem's dtype, its gradients by
    autograd, with masks from `lorafusion.lab.definitions`. Nothing of it is the code that is verified."""
    p = problem
    x = p.x.detach().requires_grad_()
    factors = [(item.a.detach().requires_grad_(), item.b.detach().requires_grad_()) for item in p.adapters]
    y = x @ p.weight.T
    for segment, mask in zip(p.segments, masks(p), strict=True):
        tokens, adapter = slice(segment.start, segment.stop), p.adapters[segment.adapter]
        a, b = factors[segment.adapter]
        s = (x[tokens] * mask) @ a.T * (adapter.scaling / (1 - adapter.dropout))
        y = torch.cat([y[: segment.start], y[tokens] + s @ b.T, y[segment.stop :]])
    y.backward(p.dy)
    return _named(p, y.detach(), x.grad, [a.grad for a, _ in factors], [b.grad for _, b in factors])


def masks(problem: Problem) -> list[Tensor]:
    """Each segment's mask by its definition: bool [tokens, columns]."""
    first, columns = int(problem.positions[0]), problem.x.shape[1]

    def mask_of(segment: LoRASegment) -> Tensor:
        adapter, tokens = problem.adapters[segment.adapter], segment.stop - segment.start
        mask = keep_mask_of_key(adapter.key, adapter.dropout, first + segment.start, tokens, columns)
        return mask.to(problem.x.device)

    return [mask_of(segment) for segment in problem.segments]


def wrong_mask_elements(problem: Problem) -> int:
    """How many elements of the masks that the kernels draw are not those of their definition."""
    p = problem
    table, batch = AdapterTable.of([p.adapters], p.x.device), LoRABatch.of(p.segments, p.positions)
    arguments = operator_arguments([p.adapters], batch, table, training=True)
    _, _, bits = ops.KERNELS[ops.linear, p.x.device.type](*arguments, [p.x], [p.weight], [p.x.new_empty(0)], True)
    drawn = unpack(bits[0], p.x.shape[1])
    return sum(
        int((drawn[segment.start : segment.stop] != mask).sum())
        for segment, mask in zip(p.segments, masks(p), strict=True)
    )


def kernels(problem: Problem) -> dict[str, Tensor]:
    """The same by `lora_linears`."""
    p = problem
    x = p.x.detach().requires_grad_()
    adapters = [
        replace(item, a=item.a.detach().requires_grad_(), b=item.b.detach().requires_grad_()) for item in p.adapters
    ]
    table, batch = AdapterTable.of([adapters], x.device), LoRABatch.of(p.segments, p.positions)
    [y] = lora_linears(x, [p.weight], [None], [adapters], batch, table=table)
    y.backward(p.dy)
    return _named(p, y.detach(), x.grad, [item.a.grad for item in adapters], [item.b.grad for item in adapters])


def _named(problem: Problem, y: Tensor, dx: Tensor, da: list[Tensor], db: list[Tensor]) -> dict[str, Tensor]:
    used = sorted({segment.adapter for segment in problem.segments if segment.start < segment.stop})
    return {"y": y, "dx": dx, "da": torch.cat([da[i] for i in used]), "db": torch.cat([db[i].T for i in used]).T}
