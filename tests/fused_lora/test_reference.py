"""The LoRA linear's reference against autograd, against itself in other batches, and against bad arguments."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from fused_lora import LoRAAdapter, LoRASegment, keep_mask, lora_linear, ops
from fused_lora.reference import draw_masks, lora_backward, lora_forward

M, K, N = 23, 13, 17
SEGMENTS = (LoRASegment(0, 6, 0), LoRASegment(6, 7, 2), LoRASegment(7, 7, 1), LoRASegment(9, 20, 1))


def tensors(dtype=torch.float64, seed=0):
    """x, weight, bias, positions, and three adapters of mixed rank, scaling and dropout; tokens 7-8 and 20-22 bare."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    adapters = [
        LoRAAdapter(normal(rank, K).requires_grad_(), normal(N, rank).requires_grad_(), scaling, dropout, key)
        for rank, scaling, dropout, key in ((1, 2.0, 0.0, 11), (5, 0.25, 0.3, 22), (16, 1 / math.sqrt(16), 0.75, 33))
    ]
    positions = torch.arange(M) * 3 + 2**33
    return normal(M, K).requires_grad_(), normal(N, K), normal(N), positions, adapters


def naive(x, weight, bias, adapters, segments, positions, training=True):
    """The definition, left to autograd."""
    parts = [F.linear(x, weight, bias)]
    for segment in segments:
        adapter, tokens = adapters[segment.adapter], slice(segment.start, segment.stop)
        inside = x[tokens]
        if training:
            keep = keep_mask(adapter.key, positions[tokens], x.shape[1], adapter.dropout)
            inside = inside * keep / (1 - adapter.dropout)
        term = adapter.scaling * (inside @ adapter.a.to(x.dtype).T @ adapter.b.to(x.dtype).T)
        parts.append(F.pad(term, (0, 0, segment.start, len(x) - segment.stop)))
    return sum(parts)


def gradients(function, dy, x, weight, bias, positions, adapters, segments=SEGMENTS, training=True):
    y = function(x, weight, bias, adapters, segments, positions, training)
    factors = {f"{name}{i}": getattr(a, name) for i, a in enumerate(adapters) for name in "ab"}
    used = {"x": x} | factors
    grads = torch.autograd.grad(y, list(used.values()), dy, allow_unused=True)
    return {"y": y, **{f"d{name}": grad for name, grad in zip(used, grads, strict=True)}}


def random_like(shape, dtype=torch.float64, seed=9):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("with_bias", [True, False])
def test_forward_and_gradients_equal_autograd_of_the_definition(training, with_bias):
    x, weight, bias, positions, adapters = tensors()
    arguments = (random_like((M, N)), x, weight, bias if with_bias else None, positions, adapters)
    ours = gradients(lora_linear, *arguments, training=training)
    theirs = gradients(naive, *arguments, training=training)
    for name, expected in theirs.items():
        torch.testing.assert_close(ours[name], expected, rtol=1e-12, atol=1e-12, msg=name)


@st.composite
def batches(draw):
    """Any sizes, adapters and segments, with gaps, empty segments and adapters in several or none of them."""
    tokens, columns, rows, count = (draw(st.integers(1, high)) for high in (12, 19, 9, 4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    adapters = []
    for _ in range(count):
        rank, p = draw(st.integers(1, 9)), draw(st.sampled_from([0.0, 0.1, 0.6]))
        a, b = normal(rank, columns).requires_grad_(), normal(rows, rank).requires_grad_()
        adapters.append(LoRAAdapter(a, b, draw(st.floats(0.1, 8)), p, draw(st.integers(0, 2**64 - 1))))
    borders = sorted(draw(st.lists(st.integers(0, tokens), max_size=8)))
    segments = [
        LoRASegment(start, stop, draw(st.integers(0, count - 1)))
        for start, stop in zip(borders[::2], borders[1::2], strict=False)
    ]
    positions = torch.randint(0, 2**40, (tokens,), generator=generator)
    x, weight = normal(tokens, columns).requires_grad_(), normal(rows, columns)
    return (normal(tokens, rows), x, weight, normal(rows), positions, adapters, segments)


@settings(deadline=None, max_examples=40)
@given(batches())
def test_any_batch_equals_autograd_of_the_definition(batch):
    ours, theirs = gradients(lora_linear, *batch), gradients(naive, *batch)
    for name, expected in theirs.items():
        if expected is None or ours[name] is None:
            # No tokens: autograd may return None, or zeros for the product of empty tensors.
            assert ours[name] is None
            assert expected is None or not expected.any()
        else:
            torch.testing.assert_close(ours[name], expected, rtol=1e-12, atol=1e-10, msg=name)


@settings(deadline=None, max_examples=40)
@given(batches())
def test_any_segment_alone_gives_what_it_gives_in_the_batch(batch):
    """Outputs and dx of each segment's tokens, and gradients of the adapters that add up."""
    dy, x, weight, bias, positions, adapters, segments = batch
    whole = gradients(lora_linear, *batch)
    sums = {}
    for segment in segments:
        tokens = slice(segment.start, segment.stop)
        own = [LoRASegment(0, segment.stop - segment.start, 0)]
        piece = x[tokens].detach().requires_grad_()
        alone = gradients(
            lora_linear, dy[tokens], piece, weight, bias, positions[tokens], [adapters[segment.adapter]], own
        )
        torch.testing.assert_close(alone["y"], whole["y"][tokens], rtol=1e-12, atol=1e-10)
        torch.testing.assert_close(alone["dx"], whole["dx"][tokens], rtol=1e-12, atol=1e-10)
        for name in ("da", "db"):
            if alone[f"{name}0"] is not None:
                sums.setdefault(f"{name}{segment.adapter}", []).append(alone[f"{name}0"])
    for index in range(len(adapters)):
        for name in (f"da{index}", f"db{index}"):
            assert (whole[name] is None) == (name not in sums)
            if name in sums:
                torch.testing.assert_close(sum(sums[name]), whole[name], rtol=1e-12, atol=1e-10, msg=name)


def test_gradcheck():
    x, weight, bias, positions, adapters = tensors()

    def function(x, *factors):
        made = [replace(adapter, a=factors[2 * i], b=factors[2 * i + 1]) for i, adapter in enumerate(adapters)]
        return lora_linear(x, weight, bias, made, SEGMENTS, positions)

    factors = [factor for adapter in adapters for factor in (adapter.a, adapter.b)]
    assert torch.autograd.gradcheck(function, (x, *factors))


def test_a_second_derivative_is_refused():
    """It would miss the part that goes through the saved s."""
    x, weight, bias, positions, adapters = tensors()
    y = lora_linear(x, weight, bias, adapters, SEGMENTS, positions)
    (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula was registered"):
        dx.sum().backward()


def test_an_adapter_without_tokens_gets_no_gradient():
    x, weight, bias, positions, adapters = tensors()
    segments = (SEGMENTS[0], LoRASegment(8, 8, 2))
    found = gradients(lora_linear, random_like((M, N)), x, weight, bias, positions, adapters, segments=segments)
    assert found["da0"] is not None
    assert found["da1"] is None
    assert found["db2"] is None


def test_an_adapter_in_two_segments_gets_the_sum():
    x, weight, bias, positions, adapters = tensors()
    segments = (LoRASegment(0, 4, 1), LoRASegment(5, 9, 1))
    arguments = (random_like((M, N)), x, weight, bias, positions, adapters)
    ours, theirs = (gradients(function, *arguments, segments=segments) for function in (lora_linear, naive))
    for name in ("da1", "db1", "dx"):
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-12, atol=1e-12, msg=name)


@pytest.mark.parametrize("training", [True, False])
def test_the_functions_of_the_reference_are_the_linear(training):
    """They take masks, not positions: the operators draw the same ones as bits."""
    x, weight, bias, positions, adapters = tensors()
    dy = random_like((M, N))
    whole = gradients(lora_linear, dy, x, weight, bias, positions, adapters, training=training)
    with torch.no_grad():
        masks = draw_masks(adapters, SEGMENTS, positions, K, training)
        assert [mask is not None for mask in masks] == [training and adapters[s.adapter].dropout > 0 for s in SEGMENTS]
        y, projected = lora_forward(x, weight, bias, adapters, SEGMENTS, masks)
        dx, da, db = lora_backward(dy, x, weight, projected, adapters, SEGMENTS, masks)
    found = {"y": y, "dx": dx} | {f"d{n}{i}": one for n, all_ in (("a", da), ("b", db)) for i, one in enumerate(all_)}
    for name, expected in whole.items():
        torch.testing.assert_close(found[name], expected, rtol=1e-14, atol=1e-14, msg=name)


def test_the_backward_function_returns_gradients_in_the_adapters_dtype():
    """Asked of the function itself: autograd would cast on its own."""
    x, weight, bias, positions, adapters = tensors(torch.bfloat16)
    adapters = [replace(adapter, a=adapter.a.detach().float(), b=adapter.b.detach().float()) for adapter in adapters]
    masks = draw_masks(adapters, SEGMENTS, positions, K)
    with torch.no_grad():
        y, projected = lora_forward(x, weight, bias, adapters, SEGMENTS, masks)
        dx, da, db = lora_backward(y, x, weight, projected, adapters, SEGMENTS, masks)
    assert {y.dtype, dx.dtype, *(s.dtype for s in projected)} == {torch.bfloat16}
    assert {gradient.dtype for gradient in (*da, *db)} == {torch.float32}


@pytest.mark.parametrize("wants_x", [True, False])
@pytest.mark.parametrize("frozen", ["", "a0 b1", "a0 b0 a1 b1 a2 b2"])
def test_backward_computes_only_what_needs_a_gradient(monkeypatch, wants_x, frozen):
    """dx alone, or the gradients of the factors alone; a frozen factor gets none in any case."""
    x, weight, bias, positions, adapters = tensors()
    found, linear_backward = [], ops.linear_backward

    def spied(*arguments):
        found.append(linear_backward(*arguments))
        return found[-1]

    monkeypatch.setattr(ops, "linear_backward", spied)
    for name in frozen.split():
        getattr(adapters[int(name[1])], name[0]).requires_grad_(False)
    y = lora_linear(x if wants_x else x.detach(), weight, bias, adapters, SEGMENTS, positions)
    factors = {f"{name}{index}": getattr(one, name) for index, one in enumerate(adapters) for name in "ab"}
    if not wants_x and len(frozen.split()) == len(factors):
        assert not y.requires_grad
        return
    y.sum().backward()
    [([dx], da, db)] = found
    wants_factors = len(frozen.split()) < len(factors)
    assert [part.numel() > 0 for part in (dx, da, db)] == [wants_x, wants_factors, wants_factors]
    assert (x.grad is not None) == wants_x
    assert [name for name, factor in factors.items() if factor.grad is None] == frozen.split()


def test_a_frozen_factor_leaves_the_other_gradients_as_they_are():
    x, weight, bias, positions, adapters = tensors()
    arguments = (random_like((M, N)), x, weight, bias, positions)
    every = gradients(lora_linear, *arguments, adapters)
    half = [replace(adapters[0], b=adapters[0].b.detach()), replace(adapters[1], a=adapters[1].a.detach()), adapters[2]]
    y = lora_linear(x, weight, bias, half, SEGMENTS, positions)
    found = torch.autograd.grad(y, [x, half[0].a, half[1].b, half[2].a, half[2].b], arguments[0])
    for gradient, name in zip(found, ("dx", "da0", "db1", "da2", "db2"), strict=True):
        assert torch.equal(gradient, every[name]), name


def test_tokens_without_an_adapter_get_the_base_linear_bitwise():
    x, weight, bias, positions, adapters = tensors()
    y, base = lora_linear(x, weight, bias, adapters, SEGMENTS, positions), F.linear(x, weight, bias)
    for bare in (slice(7, 9), slice(20, M)):
        assert torch.equal(y[bare], base[bare])
    assert torch.equal(lora_linear(x, weight, bias, [], [], positions), base)


@pytest.mark.parametrize("cut", [0, 1, 7, 12, 20, 23])
def test_two_batches_give_what_one_gives(cut):
    """However the tokens are cut in microbatches: the same outputs, and gradients that add up."""
    x, weight, bias, positions, adapters = tensors()
    dy = random_like((M, N))
    whole = gradients(lora_linear, dy, x, weight, bias, positions, adapters)
    parts = []
    for start, stop in ((0, cut), (cut, M)):
        segments = [
            LoRASegment(max(s.start, start) - start, min(s.stop, stop) - start, s.adapter)
            for s in SEGMENTS
            if max(s.start, start) < min(s.stop, stop)
        ]
        piece = x[start:stop].detach().requires_grad_()
        parts.append(
            gradients(lora_linear, dy[start:stop], piece, weight, bias, positions[start:stop], adapters, segments)
        )
    torch.testing.assert_close(torch.cat([part["y"] for part in parts]), whole["y"])
    torch.testing.assert_close(torch.cat([part["dx"] for part in parts]), whole["dx"])
    for name in ("da0", "db0", "da1", "db1", "da2", "db2"):
        torch.testing.assert_close(sum(p[name] for p in parts if p[name] is not None), whole[name], msg=name)


def test_a_token_does_not_see_its_neighbours():
    """Adapter 1's tokens alone, or among others, drop the same elements: equal but for the order of a GEMM's sums."""
    x, weight, bias, positions, adapters = tensors()
    together = lora_linear(x, weight, bias, adapters, SEGMENTS, positions)[9:20]
    alone = lora_linear(x[9:20], weight, bias, [adapters[1]], [LoRASegment(0, 11, 0)], positions[9:20])
    torch.testing.assert_close(together, alone, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("adapter_dtype", [torch.bfloat16, torch.float32])
def test_bfloat16_is_as_exact_as_eager_bfloat16(adapter_dtype):
    """Root mean square errors against float64 over ten draws, at most 1.1 times those of the definition in bfloat16."""
    squares = {}
    for seed in range(10):
        x, weight, bias, positions, adapters = tensors(torch.bfloat16, seed)
        dy = random_like((M, N), torch.bfloat16, seed + 100)
        cast, double = (
            [replace(one, a=one.a.detach().to(to).requires_grad_(), b=one.b.detach().to(to).requires_grad_())
             for one in adapters]
            for to in (adapter_dtype, torch.float64)
        )  # fmt: skip
        ours = gradients(lora_linear, dy, x, weight, bias, positions, cast)
        eager = gradients(naive, dy, x, weight, bias, positions, cast)
        wide = x.detach().double().requires_grad_()
        exact = gradients(naive, dy.double(), wide, weight.double(), bias.double(), positions, double)
        for name, expected in exact.items():
            errors = [(run[name].double() - expected).square().mean() for run in (ours, eager)]
            squares.setdefault(name, []).append(torch.stack(errors))
            if name[0] == "d":
                assert ours[name].dtype == (torch.bfloat16 if name == "dx" else adapter_dtype)
    for name, found in squares.items():
        error, allowed = torch.stack(found).mean(0).sqrt()
        assert error <= 1.1 * allowed, f"{name}: {error:.3g} against {allowed:.3g} in eager"


@pytest.mark.parametrize("adapter_dtype", [torch.bfloat16, torch.float32])
def test_bfloat16_rounds_neither_the_scaling_nor_the_keep_factor(adapter_dtype):
    """The error's component along the exact result, with no base term to hide it.

    Unbiased rounding averages out; a factor rounded to bfloat16 stays: -1.1e-3 for this scaling, -1.6e-3 for 1 / 0.9.
    """
    tokens, columns, rows, rank = 192, 160, 96, 10
    generator = torch.Generator().manual_seed(4)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).bfloat16()

    leaves, dy = [normal(tokens, columns), normal(rank, columns), normal(rows, rank)], normal(tokens, rows)
    results = []
    for function, kinds in (
        (lora_linear, (torch.bfloat16, adapter_dtype, adapter_dtype)),
        (naive, (torch.float64,) * 3),
    ):
        x, a, b = (leaf.to(kind).requires_grad_() for leaf, kind in zip(leaves, kinds, strict=True))
        adapter, segments = LoRAAdapter(a, b, 7 / rank, 0.1, 55), [LoRASegment(0, tokens, 0)]
        weight = torch.zeros(rows, columns, dtype=x.dtype)
        arguments = (dy.to(x.dtype), x, weight, None, torch.arange(tokens), [adapter], segments)
        results.append({name: value.double() for name, value in gradients(function, *arguments).items()})
    ours, exact = results
    for name, expected in exact.items():
        component = ((ours[name] - expected) * expected).sum() / expected.square().sum()
        assert abs(component) < 4e-4, f"{name}: {component:.2e}"


def test_the_expectation_over_masks_is_the_undropped_term():
    """The same tokens 4000 times, each time at other positions."""
    runs = 4000
    x, weight, bias, _, adapters = tensors()

    def output(times, training):
        segments, positions = [LoRASegment(0, M * times, 0)], torch.arange(M * times)
        y = lora_linear(x.repeat(times, 1), weight, bias, [adapters[1]], segments, positions, training)
        return y.view(times, M, N)

    with torch.no_grad():
        every, exact = output(runs, training=True), output(1, training=False)[0]
    mean, deviation = every.mean(0), every.std(0) / math.sqrt(runs)
    assert ((mean - exact).abs() <= 5.5 * deviation).all()


@pytest.mark.parametrize("shape", [(M, K), (1, M, K), (M, 1, K)])
def test_leading_dimensions_are_kept(shape):
    x, weight, bias, positions, adapters = tensors()
    flat = lora_linear(x, weight, bias, adapters, SEGMENTS, positions)
    y = lora_linear(x.view(shape), weight, bias, adapters, SEGMENTS, positions)
    assert y.shape == (*shape[:-1], N)
    assert torch.equal(y.flatten(0, -2), flat)
