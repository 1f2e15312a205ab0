"""The gated linear and Liger's norms and activations on a GPU: against float64, in graphs, and what a layer keeps."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fused_lora import LoRABatch, lora_gated_linear
from fused_lora.reference import draw_masks, gated, gated_backward, lora_backward, lora_forward
from lorafusion.lab.checks.kernels import MOST_ERROR, random_problem
from lorafusion.lab.experiments import EXPERIMENTS
from lorafusion.lab.experiments.implementations import Builder, Setting, Subject
from lorafusion.lab.experiments.kernel_times import existing
from lorafusion.lab.experiments.timing import own_stream, prepared
from lorafusion.lab.operators import saved_bytes

GPU = torch.device("cuda")
# in, out, tokens, rank. Never a single token of rank 1, whose one number is as wrong as luck has it.
SHAPES = [(512, 384, 1024, 16), (1027, 515, 777, 5), (96, 1000, 33, 40), (256, 136, 6, 16), (256, 136, 70, 1)]


def reference(problem, up):
    """y, and the gradients of gate, up and the factors of adapters with tokens, in the problem's dtype."""
    p, h = problem, gated(problem.x, up)
    masks = draw_masks(p.adapters, p.segments, p.positions, h.shape[1])
    y, s = lora_forward(h, p.weight, None, p.adapters, p.segments, masks)
    dh, da, db = lora_backward(p.dy, h, p.weight, s, p.adapters, p.segments, masks)
    return [y, *gated_backward(p.x, up, dh), torch.cat(da), torch.cat([one.T for one in db])]


def kernels(problem, up, keep_bits=True):
    p, gate = problem, problem.x.detach().requires_grad_()
    up = up.detach().requires_grad_()
    adapters = [
        replace(one, a=one.a.detach().requires_grad_(), b=one.b.detach().requires_grad_()) for one in p.adapters
    ]
    batch = LoRABatch.of(p.segments, p.positions)
    y = lora_gated_linear(gate, up, p.weight, None, adapters, batch, keep_bits=keep_bits)
    y.backward(p.dy)
    factors = torch.cat([one.a.grad for one in adapters]), torch.cat([one.b.grad.T for one in adapters])
    return [y.detach(), gate.grad, up.grad, *factors]


@pytest.mark.parametrize("mixed", [False, True], ids=["one adapter", "five adapters"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", SHAPES)
def test_as_close_to_float64_as_eager(shape, dtype, mixed):
    problem = random_problem(*shape, mixed, GPU, dtype, seed=1)
    up = random_problem(*shape, mixed, GPU, dtype, seed=2).x
    exact = reference(problem.to(torch.float64), up.double())
    eager, ours, again = reference(problem, up), kernels(problem, up), kernels(problem, up, keep_bits=False)
    slack = 1.5 if problem.x.numel() < 2**18 else 1.0
    for name, *found in zip(("y", "dgate", "dup", "da", "db"), exact, eager, ours, again, strict=True):
        wanted, theirs, mine, drawn = found
        own, allowed = ((one.double() - wanted).square().mean().sqrt() for one in (mine, theirs))
        floor = torch.finfo(dtype).eps / 2 * wanted.square().mean().sqrt()
        assert own <= MOST_ERROR[dtype] * slack * torch.maximum(allowed, floor), name
        assert torch.equal(mine, drawn), name


def subject(implementation: str, adapters: int, liger: bool, model="llama-3.1-8b", tokens=2048) -> Subject:
    """A decoder layer of the suite for GPUs."""
    bench = EXPERIMENTS["kernels"].point("h200", f"layer~{model}/rank~16/dropout~0.1").subject
    bench = bench.model_copy(update={"block": bench.block.model_copy(update={"liger": liger})})
    case = next(
        case for case in bench.cases(tokens) if (case.implementation, case.adapters) == (implementation, adapters)
    )
    return Builder(bench, Setting(GPU, torch.bfloat16, 1)).build(case)


@pytest.mark.parametrize(("implementation", "adapters"), [("frozen", 0), ("fused", 1), ("fused-multi", 4)])
def test_liger_changes_no_gradient_in_eager_mode_or_in_a_graph(implementation, adapters):
    """Its backward passes write in place: not over what a replay or a second pass needs."""
    plain = subject(implementation, adapters, liger=False)
    expected = [plain.forward().detach(), *plain.both()]
    lean, got = subject(implementation, adapters, liger=True), []
    dy = lean.dy.clone()
    with own_stream(GPU):
        replay = prepared(lambda: got.append([lean.forward().detach(), *lean.both()]), GPU)
        rounds = [got[0]]
        for _ in range(2):
            replay()
            torch.cuda.synchronize()
            rounds.append([one.clone() for one in got[-1]])
    assert torch.equal(lean.dy, dy)
    for found in rounds:
        for ours, theirs in zip(found, expected, strict=True):
            assert (ours - theirs).float().norm() <= 2e-2 * theirs.float().norm()


def test_a_layer_keeps_at_most_three_fifths_of_what_pefts_keeps():
    kept = {}
    for implementation in ("peft-bf16", "fused"):
        one = subject(implementation, 1, liger=True)
        kept[implementation] = saved_bytes(one.forward, existing(one))
    assert kept["fused"] <= 0.6 * kept["peft-bf16"], kept
