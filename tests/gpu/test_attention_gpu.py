"""cuDNN's attention over packed samples, against float64 and against FlashAttention-2's error."""

from __future__ import annotations

import pytest
import torch

from lorafusion.data.packing import SampleBorders
from lorafusion.model.attention import BACKENDS, packed_attention, prepared
from lorafusion.model.cudnn_attention import Heads, why_not

GPU = torch.device("cuda")
ODD = (1, 127, 128, 129, 1, 300, 64, 63, 2)
MICROBATCHES = {"odd": ODD, "whole": (777,), "single tokens": (1,) * 5, "many": (17, 1, 40) * 30}


@pytest.fixture(autouse=True)
def _has_cudnn():
    if reason := why_not(GPU, torch.bfloat16, Heads(8, 2, 128)):
        pytest.skip(f"cuDNN's attention: {reason}")


@pytest.fixture
def deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def leaves_of(heads, tokens, seed=0):
    """Queries, keys, values [1, H, T, D], and the gradient of the result [1, T, H, D]."""
    generator = torch.Generator(GPU).manual_seed(seed)
    shapes = [(1, count, tokens, heads.size) for count in (heads.queries, heads.keys, heads.keys)]
    shapes.append((1, tokens, heads.queries, heads.size))
    return [torch.randn(shape, device=GPU, generator=generator).bfloat16() for shape in shapes]


def results(backend, heads, borders, tensors):
    """The result, and the gradients of queries, keys and values."""
    *leaves, gradient = tensors
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    borders = prepared(borders, backend, heads, leaves[0][0])
    out, _ = packed_attention(torch.nn.Module(), *leaves, None, borders=borders, scaling=heads.size**-0.5)
    return [out.detach(), *torch.autograd.grad(out, leaves, gradient)]


def exact(heads, lengths, tensors):
    """The same in float64, one sample after another."""
    *leaves, gradient = (tensor.double() for tensor in tensors)
    leaves = [leaf.requires_grad_() for leaf in leaves]
    samples = zip(*(leaf.split(lengths, dim=2) for leaf in leaves), strict=True)
    outputs = [
        torch.nn.functional.scaled_dot_product_attention(
            *sample, is_causal=True, scale=heads.size**-0.5, enable_gqa=True
        )
        for sample in samples
    ]
    out = torch.cat(outputs, dim=2).transpose(1, 2)
    return [out.detach(), *torch.autograd.grad(out, leaves, gradient)]


@pytest.mark.parametrize("size", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("lengths", MICROBATCHES.values(), ids=list(MICROBATCHES))
def test_its_error_is_that_of_flash_attention(size, lengths):
    heads, borders = Heads(8, 2, size), SampleBorders.of(lengths, GPU)
    tensors = leaves_of(heads, sum(lengths))
    both = [results(backend, heads, borders, tensors) for backend in BACKENDS]
    for name, ours, flash, reference in zip(
        ("out", "dq", "dk", "dv"), *both, exact(heads, lengths, tensors), strict=True
    ):
        error, allowed = ((run.double() - reference).square().mean().sqrt() for run in (ours, flash))
        assert error <= 1.5 * allowed, f"{name}: {error:.3g} against {allowed:.3g} of FlashAttention-2"


@pytest.mark.parametrize(("queries", "keys"), [(4, 4), (40, 8), (8, 1)])
def test_heads_share_keys(queries, keys):
    heads, borders = Heads(queries, keys, 128), SampleBorders.of(ODD, GPU)
    tensors = leaves_of(heads, sum(ODD))
    for ours, reference in zip(results("cudnn", heads, borders, tensors), exact(heads, ODD, tensors), strict=True):
        assert (ours.double() - reference).norm() <= 1e-2 * reference.norm()


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("size", [64, 80, 96, 128, 256])
def test_the_bits_are_the_same_each_time(size):
    heads, borders = Heads(8, 2, size), SampleBorders.of(ODD, GPU)
    tensors = leaves_of(heads, sum(ODD))
    first = results("cudnn", heads, borders, tensors)
    for _ in range(3):
        assert all(map(torch.equal, first, results("cudnn", heads, borders, tensors)))


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("spoilt", range(4), ids=["query", "key", "value", "gradient"])
def test_what_is_no_number_in_a_sample_stays_in_it(value, spoilt):
    lengths, heads, bad = (100, 200, 150, 77, 300), Heads(8, 2, 128), slice(300, 450)
    borders, tensors = SampleBorders.of(lengths, GPU), leaves_of(heads, sum(lengths))
    clean = results("cudnn", heads, borders, tensors)
    rows = tensors[spoilt].squeeze(0) if spoilt == 3 else tensors[spoilt][0].transpose(0, 1)
    rows[bad] = value
    for place, (ours, expected) in enumerate(zip(results("cudnn", heads, borders, tensors), clean, strict=True)):
        ours, expected = (run if place == 0 else run.transpose(1, 2) for run in (ours, expected))
        for part in (slice(0, bad.start), slice(bad.stop, None)):
            assert torch.equal(ours[:, part], expected[:, part]), place


@pytest.mark.usefixtures("deterministic")
def test_a_graph_serves_other_borders():
    """Captured with some samples, replayed with others within its bounds."""
    heads, lengths, others = Heads(8, 2, 128), (300, 1, 200, 523), (64, 64, 1, 129, 300, 466)
    tensors, samples = leaves_of(heads, 1024), 8

    def padded(sizes):
        borders = SampleBorders.of((*sizes, *[0] * (samples - len(sizes))), GPU)
        return SampleBorders(borders.offsets, (), 600)

    static, stream = padded(lengths), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        results("cudnn", heads, static, tensors)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        captured = results("cudnn", heads, static, tensors)
    for sizes in (others, lengths):
        static.offsets.copy_(padded(sizes).offsets)
        graph.replay()
        assert all(map(torch.equal, captured, results("cudnn", heads, padded(sizes), tensors)))
        for ours, reference in zip(captured, exact(heads, sizes, tensors), strict=True):
            assert (ours.double() - reference).norm() <= 1e-2 * reference.norm()
