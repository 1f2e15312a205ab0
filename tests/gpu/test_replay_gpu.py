"""Calls that are done again from a record (`fused_lora.gpu.host.replay`) give the bits that Triton's launches give."""

from __future__ import annotations

import pytest
import torch

from fused_lora import LoRALinear, LoRASettings
from fused_lora.gpu.host import choices
from fused_lora.gpu.host.calls import launcher, launching
from fused_lora.gpu.host.replay import Plan
from tests.fused_lora.gpu.replayed import CASES, MORE_CASES

GPU = torch.device("cuda")


def flat(results):
    parts, *rest = results
    return [*parts, *rest]


@pytest.mark.parametrize("name", CASES | MORE_CASES)
def test_bits_are_the_same(name):
    """Also where the memory of results held something else before."""
    case = (CASES | MORE_CASES)[name]
    ours = torch.cuda.get_device_capability() == choices.OWN_CAPABILITY
    if case.gemm == choices.OWN and not ours:
        pytest.skip("our GEMM is for sm_90")
    with launching(choose=case.choose, remembers=False):
        calls = case.calls(GPU)
        expected = [flat(call()) for call in calls]
    with launching(choose=case.choose):
        for call, wanted in zip(calls, expected, strict=True):
            for _ in range(4):
                results = flat(call())
                for result, other in zip(results, wanted, strict=True):
                    torch.testing.assert_close(result, other, rtol=0, atol=0, equal_nan=True)
                    result.fill_(77)
        assert not ours or all(isinstance(plan, Plan) for plan in launcher().plans.values())


@pytest.fixture
def linear():
    """A linear, and its pass: from nothing to y and the gradients of x and of the factors."""
    torch.manual_seed(0)
    layer = LoRALinear(torch.nn.Linear(256, 192), [LoRASettings(16, 16.0, 0.5)]).to(GPU, torch.bfloat16)
    torch.nn.init.normal_(layer.lora_b[0])
    x = torch.randn(300, 256, device=GPU, dtype=torch.bfloat16, requires_grad=True)
    dy = torch.randn(300, 192, device=GPU, dtype=torch.bfloat16)

    def run():
        y = layer(x)
        return [y, *torch.autograd.grad(y, [x, *layer.lora_a, *layer.lora_b], dy)]

    return run


def seeded(run):
    torch.manual_seed(1)
    results = [tensor.detach().clone() for tensor in run()]
    torch.cuda.synchronize()
    return results


def test_on_another_stream_and_in_a_graph(linear):
    with launching(remembers=False):
        expected = seeded(linear)
    with launching():
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for _ in range(3):
                for result, other in zip(seeded(linear), expected, strict=True):
                    assert torch.equal(result, other)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = linear()
        torch.manual_seed(1)
        graph.replay()
        torch.cuda.synchronize()
        first = [tensor.clone() for tensor in results]
        graph.replay()
        assert all(tensor.isfinite().all() for tensor in first)
        assert not torch.equal(first[0], results[0])  # masks are new ones


def test_no_more_memory(linear):
    peaks = []
    for remembers in (False, True):
        with launching(remembers=remembers):
            for _ in range(3):
                torch.cuda.reset_peak_memory_stats()
                linear()
            peaks.append(torch.cuda.max_memory_allocated())
    assert peaks[1] <= peaks[0]
