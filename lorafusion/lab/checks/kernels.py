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

    def leaves(self) -> Problem:
        """The same with an input and factors that autograd gives gradients."""
        adapters = [
            replace(item, a=item.a.detach().requires_grad_(), b=item.b.detach().requires_grad_())
            for item in self.adapters
        ]
        return replace(self, x=self.x.detach().requires_grad_(), adapters=adapters)

    def results(self, y: Tensor) -> dict[str, Tensor]:
        """y, dx, and da and db of each adapter with tokens, for a y that was computed from leaves."""
        y.backward(self.dy)
        used = sorted({segment.adapter for segment in self.segments if segment.start < segment.stop})
        da, db = ([getattr(self.adapters[i], name).grad for i in used] for name in ("a", "b"))
        return {"y": y.detach(), "dx": self.x.grad, "da": torch.cat(da), "db": torch.cat(db, dim=1)}


def check_suite(suite: Suite) -> tuple[Verdict, list[Curve]]:
    """The check of the entry of configs/kernels.yaml that has the suite's name."""
    return verify(EXPERIMENTS["kernels"].entry_of(suite.name), suite.name), []


def verify(suite: KernelSuite, name: str) -> Verdict:
    """All cases of a kernel suite's `verify`: one adapter, and five of mixed rank, dropout and length."""
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
    p = problem.leaves()
    y = p.x @ p.weight.T
    for segment, mask in zip(p.segments, masks(p), strict=True):
        tokens, adapter = slice(segment.start, segment.stop), p.adapters[segment.adapter]
        s = (p.x[tokens] * mask) @ adapter.a.T * (adapter.scaling / (1 - adapter.dropout))
        y = torch.cat([y[: segment.start], y[tokens] + s @ adapter.b.T, y[segment.stop :]])
    return p.results(y)


def masks(problem: Problem) -> list[Tensor]:
    """Each segment's mask by its definition: bool [tokens, columns]."""
    first, columns = int(problem.positions[0]), problem.x.shape[1]
    pairs = [(segment, problem.adapters[segment.adapter]) for segment in problem.segments]
    return [
        keep_mask_of_key(adapter.key, adapter.dropout, first + segment.start, segment.stop - segment.start, columns)
        .to(problem.x.device)
        for segment, adapter in pairs
    ]  # fmt: skip


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
    p = problem.leaves()
    table, batch = AdapterTable.of([p.adapters], p.x.device), LoRABatch.of(p.segments, p.positions)
    [y] = lora_linears(p.x, [p.weight], [None], [p.adapters], batch, table=table)
    return p.results(y)
