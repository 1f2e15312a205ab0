"""mLoRA's LoRA: one custom backward pass for all adapters of a linear equals autograd through PEFT's own modules, one
adapter after another, with the same dropout masks."""

from __future__ import annotations

import warnings
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from peft import inject_adapter_in_model
from torch import nn
from torch.utils.checkpoint import checkpoint

from baselines.mlora.lora import _BatchLoRA, _Part, looped
from lorafusion.core.workload import Job, Sample
from lorafusion.data.packing import AdapterSegment
from lorafusion.model.lora import ActiveBatch, StageLinear, peft_config

TOKENS, INPUTS, OUTPUTS = 21, 10, 7
NAME = "model.layers.0.self_attn.q_proj"


def job(index, dropout=0.3, modules=("q_proj",), **changes):
    return Job(
        name=f"job-{index}", dataset="none", rank=2 + index, alpha=5.0, dropout=dropout, target_modules=modules,
        global_batch_size=1, samples=(Sample(0, 2),), **changes,
    )  # fmt: skip


JOBS = (job(0), job(1, dropout=0.0), job(2, dropout=0.6, rslora=True), job(3, modules=("o_proj",)))
SEGMENTS = {
    "one adapter": [(0, TOKENS, 0)],
    "without dropout": [(0, TOKENS, 1)],
    "all, in any order": [(0, 4, 2), (4, 13, 0), (13, TOKENS, 1)],
    "tokens without an adapter between": [(3, 9, 0), (11, 20, 2)],
    "a single token": [(20, TOKENS, 2), (0, 20, 1)],
    "an adapter that this linear does not have": [(0, 6, 0), (6, 15, 3), (15, TOKENS, 2)],
    "that one alone": [(0, TOKENS, 3)],
    "none": [],
}
cases = pytest.mark.parametrize("segments", SEGMENTS.values(), ids=SEGMENTS)


class Attention(nn.Module):
    def __init__(self, bias):
        super().__init__()
        self.q_proj, self.o_proj = nn.Linear(INPUTS, OUTPUTS, bias), nn.Linear(OUTPUTS, INPUTS, bias)


def linear_of(kind=looped, bias=True):
    """A linear in which three of the four jobs have adapters that are not zero, with a kind's forward; and the batch
    that it reads."""
    torch.manual_seed(1)
    attention = Attention(bias).double().requires_grad_(False)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config` attribute")
        for one in JOBS:
            inject_adapter_in_model(peft_config(one), attention, adapter_name=one.name)
    layer = attention.q_proj
    for module in (layer.lora_A, layer.lora_B):
        module.double().requires_grad_(True)
    for parameter in (*layer.lora_A.parameters(), *layer.lora_B.parameters()):
        nn.init.normal_(parameter)
    assert list(layer.lora_A) == ["job-0", "job-1", "job-2"]
    active = ActiveBatch()
    kind([StageLinear(layer, NAME, JOBS, attention)], active)
    return layer.train(), active


def one_after_another(linears, active):
    """PEFT's modules and the plain sum; nothing is written in place and autograd does the rest."""
    for linear in linears:
        layer = linear.layer

        def forward(x, layer=layer):
            terms = []
            for segment in active.batch.segments:
                name = JOBS[segment.adapter].name
                if name in layer.lora_A:
                    dropped = layer.lora_dropout[name](x[:, segment.start : segment.stop])
                    term = layer.lora_B[name](layer.lora_A[name](dropped)) * layer.scaling[name]
                    terms.append(F.pad(term, (0, 0, segment.start, TOKENS - segment.stop)))
            return sum(terms, layer.base_layer(x))

        layer.forward = forward


def results(kind, segments, bias=True, training=True, recompute=False):
    """y, and the gradients of x and of all factors; None where there is none."""
    layer, active = linear_of(kind, bias)
    layer.train(training)
    active.batch = SimpleNamespace(segments=[AdapterSegment(*one, 0) for one in segments])
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(1, TOKENS, INPUTS, dtype=torch.float64, generator=generator).requires_grad_()
    upstream = torch.randn(1, TOKENS, OUTPUTS, dtype=torch.float64, generator=generator)
    torch.manual_seed(3)
    y = checkpoint(layer, x, use_reentrant=False) if recompute else layer(x)
    y.backward(upstream)
    factors = [module[name].weight for name in layer.lora_A for module in (layer.lora_A, layer.lora_B)]
    assert layer.base_layer.weight.grad is None
    return [y, x.grad, *(factor.grad for factor in factors)]


def assert_equal(ours, expected):
    for one, other in zip(ours, expected, strict=True):
        # A linear without terms of an adapter gives it nothing, which is zero.
        if one is None or other is None:
            assert one is None
            assert other is None
        else:
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@cases
def test_results_and_gradients_are_those_of_autograd(segments, bias, training, recompute):
    ours = results(looped, segments, bias, training, recompute)
    assert_equal(ours, results(one_after_another, segments, bias, training))


@cases
def test_adapters_that_are_absent_get_no_gradient(segments):
    gradients = results(looped, segments)[2:]
    present = {adapter for _, _, adapter in segments}
    for adapter in range(3):
        pair = gradients[2 * adapter : 2 * adapter + 2]
        assert all((one is not None and bool(one.any())) == (adapter in present) for one in pair)


def test_dropout_is_there_in_training_only():
    segments = SEGMENTS["all, in any order"]
    kept, dropped = (results(looped, segments, training=training) for training in (False, True))
    changed = [bool((one != other).any()) for one, other in zip(kept[0][0], dropped[0][0], strict=True)]
    assert all(changed[:4])
    assert all(changed[4:13])
    assert not any(changed[13:])  # the adapter without dropout
    assert_equal(kept, results(looped, segments, training=False))


def test_dropout_is_in_the_backward_pass():
    """The released code forgets it there, so that x has a gradient through elements that were dropped."""
    segments = [(0, TOKENS, 2)]
    through_base = results(looped, [])[1]
    trained, evaluated = (results(looped, segments, training=training)[1] for training in (True, False))
    dropped = (trained - through_base).abs() < 1e-12
    assert 0.5 < dropped.double().mean() < 0.7  # of 0.6
    assert not ((evaluated - through_base).abs() < 1e-12).any()


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_the_backward_pass_is_the_derivative_of_the_forward_pass(dropout):
    generator = torch.Generator().manual_seed(4)

    def tensor(*shape, trained=True):
        return torch.randn(*shape, dtype=torch.float64, generator=generator).requires_grad_(trained)

    parts = [_Part(1, 4, 1.5, dropout), _Part(4, 6, -0.5, 0.0)]
    weight, bias = tensor(3, 5, trained=False), tensor(3, trained=False)
    x, factors = tensor(1, 7, 5), [tensor(2, 5), tensor(3, 2), tensor(1, 5), tensor(3, 1)]

    def forward(x, *factors):
        torch.manual_seed(5)
        return _BatchLoRA.apply(x, weight, bias, parts, *factors)

    assert torch.autograd.gradcheck(forward, (x, *factors))


@pytest.mark.parametrize("dropout", [False, True])
def test_wider_adapters_are_computed_in_their_own_dtype(dropout):
    """Adapters in float32 around a linear in bfloat16: LoRA's own error is that of float32."""
    layer, active = linear_of()
    active.batch = SimpleNamespace(segments=[AdapterSegment(0, 13, 2, 0), AdapterSegment(13, TOKENS, 1, 0)])
    layer.train(dropout)
    results = []
    for base, factors in ((torch.bfloat16, torch.float32), (torch.bfloat16, torch.float64)):
        layer.get_base_layer().to(base)
        for module in (layer.lora_A, layer.lora_B):
            module.to(factors)
        x = torch.linspace(-1, 1, TOKENS * INPUTS).view(1, TOKENS, INPUTS).to(base).requires_grad_()
        layer.zero_grad()
        torch.manual_seed(3)
        y = layer(x)
        y.sum().backward()
        assert y.dtype == x.grad.dtype == base
        results.append([one.grad.clone() for one in (*layer.lora_A.parameters(), *layer.lora_B.parameters())
                        if one.grad is not None])  # fmt: skip
        assert all(one.dtype == factors for one in results[-1])
    assert len(results[0]) == 4
    for ours, exact in zip(*results, strict=True):
        assert (ours.double() - exact).norm() <= 1e-6 * exact.norm()
