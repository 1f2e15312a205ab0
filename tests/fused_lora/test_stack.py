"""Stacked adapters: the same results bit for bit, gradients in the same memory, and parameters that are its views."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from fused_lora import (
    AdapterStack,
    AdapterTable,
    LoRAAdapter,
    LoRABatch,
    LoRASegment,
    lora_gated_linear,
    lora_linears,
)

TOKENS, COLUMNS = 12, 19
ROWS = (9, 16, 5)
SEGMENTS = {
    1: (LoRASegment(1, 9, 0),),
    3: (LoRASegment(0, 3, 1), LoRASegment(3, 3, 0), LoRASegment(4, 9, 0), LoRASegment(9, 10, 2)),
    5: (LoRASegment(0, 4, 4), LoRASegment(4, 5, 2), LoRASegment(5, 12, 0)),  # 1 and 3 have no tokens
}
CASES = {
    "one linear": ((2, 5, 1),),
    "one adapter": ((3,),),
    "one adapter on two of three linears": ((3,), (0,), (7,)),
    "mixed ranks, an adapter on one of two linears": ((2, 5, 1), (0, 3, 4)),
    "three linears, one without adapters": ((2, 5, 1), (0, 0, 0), (1, 0, 17)),
    "five adapters, two without tokens": ((1, 2, 3, 4, 5), (5, 4, 3, 2, 1)),
    "nobody with tokens has factors": ((0, 2, 0, 1, 0),),
}


def adapters(ranks, dtype=torch.float64, dropout=0.4):
    """[P][G] of the ranks, whose factors are parameters; None for rank 0."""
    generator = torch.Generator().manual_seed(len(ranks))

    def parameter(*shape):
        return nn.Parameter(torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype))

    return [
        [
            LoRAAdapter(parameter(rank, COLUMNS), parameter(rows, rank), 0.5 + place, dropout * (place % 2), 7 + place)
            if rank
            else None
            for place, rank in enumerate(row)
        ]
        for row, rows in zip(ranks, ROWS, strict=False)
    ]


def factors(rows):
    return [factor for row in rows for one in row if one is not None for factor in (one.a, one.b)]


def arguments(ranks, dtype=torch.float64, gated=False):
    """What the functions take but for the adapters, and dys."""
    generator = torch.Generator().manual_seed(17)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    count = len(ranks)
    batch = LoRABatch.of(SEGMENTS[len(ranks[0])], torch.arange(TOKENS) + 2**33 - 5)
    inputs = [normal(TOKENS, COLUMNS).requires_grad_() for _ in range(1 + gated)]
    weights, biases = [normal(rows, COLUMNS) for rows in ROWS[:count]], [normal(ROWS[0]), None, normal(ROWS[2])][:count]
    return inputs, weights, biases, batch, [normal(TOKENS, rows) for rows in ROWS[:count]]


def outputs(inputs, weights, biases, rows, batch, **options):
    """y of each linear; of one linear of a gate where there are two inputs."""
    if len(inputs) == 1:
        return lora_linears(*inputs, weights, biases, rows, batch, **options)
    alone = rows if isinstance(rows, AdapterStack) else rows[0]
    return [lora_gated_linear(*inputs, weights[0], biases[0], alone, batch, **options)]


def results(given, rows, parameters, **options):
    """The outputs and all gradients, by a backward pass that adds them to `grad`."""
    inputs, weights, biases, batch, dys = given
    for one in inputs:
        one.grad = None
    ys = outputs(inputs, weights, biases, rows, batch, **options)
    torch.autograd.backward(ys, dys)
    return [*ys, *(one.grad for one in inputs), *(one.grad for one in parameters)]


def assert_equal(found, expected):
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)


@pytest.mark.parametrize("options", [{}, {"training": False}, {"keep_bits": False}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("name", list(CASES))
def test_results_are_those_of_the_adapters_apart(name, gated, dtype, options):
    ranks = CASES[name][:1] if gated else CASES[name]
    given, apart = arguments(ranks, dtype, gated), adapters(ranks, dtype)
    expected = results(given, apart, factors(apart), **options)
    stacked = adapters(ranks, dtype)
    found = results(given, AdapterStack(stacked), factors(stacked), **options)
    assert_equal(found, expected)
    for one, other in zip(factors(stacked), factors(apart), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("count", [1, 3])
def test_float32_factors_of_a_16_bit_input(count):
    ranks = CASES["three linears, one without adapters"][:count]
    given, apart, stacked = arguments(ranks, torch.bfloat16), *(adapters(ranks, torch.float32) for _ in range(2))
    found = results(given, AdapterStack(stacked), factors(stacked))
    assert_equal(found, results(given, apart, factors(apart)))
    assert [one.dtype for one in found] == [torch.bfloat16] * (count + 1) + [torch.float32] * len(factors(apart))


def test_the_leaves_hold_all_factors_in_the_operators_order():
    rows = adapters(CASES["mixed ranks, an adapter on one of two linears"])
    parts = [one for row in rows for one in row if one is not None]
    expected = torch.cat([one.a for one in parts]), torch.cat([one.b.flatten() for one in parts])
    stack = AdapterStack(rows)
    assert_equal([stack.a.detach(), stack.b.detach()], [one.detach() for one in expected])
    assert stack.a.is_leaf
    assert stack.b.is_leaf
    assert (len(stack), stack.rows, stack.table.ranks) == (2, ROWS[:2], ((2, 5, 1), (0, 3, 4)))


def storages(tensors):
    return {one.untyped_storage().data_ptr() for one in tensors}


@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize("gated", [False, True])
def test_gradients_are_added_in_the_same_memory(gated, recomputed):
    """Also where the forward pass runs again in the backward pass."""
    ranks = CASES["five adapters, two without tokens"][: 1 if gated else 2]
    given, rows = arguments(ranks, gated=gated), adapters(ranks)
    inputs, weights, biases, batch, dys = given
    stack = AdapterStack(rows)
    leaves, parameters = (stack.a, stack.b), factors(rows)
    assert storages(parameters) == storages(leaves)
    memory = storages(one.grad for one in leaves)
    assert storages(one.grad for one in parameters) == memory
    assert not any(one.grad.any() for one in parameters)
    function = partial(checkpoint, outputs, use_reentrant=False) if recomputed else outputs
    for _ in range(2):
        torch.autograd.backward(function(inputs, weights, biases, stack, batch), dys)
        assert storages(one.grad for one in (*leaves, *parameters)) == memory
    once = results(given, apart := adapters(ranks), factors(apart))[-len(parameters) :]
    assert_equal([one.grad for one in parameters], [2 * one for one in once])


@pytest.mark.parametrize("settings", [{"foreach": True}, {"fused": True}, {"foreach": False}], ids=str)
def test_training_goes_as_with_the_adapters_apart(settings):
    """Each adapter with an optimizer of its own, at its own times, and a batch without one of them."""
    ranks = CASES["mixed ranks, an adapter on one of two linears"]
    inputs, weights, biases, batch, dys = arguments(ranks)
    without = LoRABatch.of([LoRASegment(0, 5, 2), LoRASegment(5, 12, 1)], torch.arange(TOKENS))
    ends = []
    for stacked in (False, True):
        rows = adapters(ranks)
        given = AdapterStack(rows) if stacked else rows
        own = [factors([[one] for row in rows if (one := row[place]) is not None]) for place in range(3)]
        optimizers = [torch.optim.AdamW(one, lr=0.1, **settings) for one in own]
        ys = []
        for one, stepping in ((batch, (0,)), (without, (1, 2)), (batch, (0, 1, 2)), (batch, ())):
            ys = lora_linears(*inputs, weights, biases, given, one)
            torch.autograd.backward(ys, dys)
            for place in stepping:
                optimizers[place].step()
                optimizers[place].zero_grad(set_to_none=False)
        ends.append([*ys, *factors(rows), *(one.grad for one in factors(rows))])
    assert_equal(*ends)
    assert not torch.equal(ends[0][2], adapters(ranks)[0][0].a)


def test_an_adapter_without_tokens_may_be_stepped_before_the_backward_pass():
    """As in a pipeline, where one adapter's step comes between the passes of a microbatch of others."""
    ranks = CASES["five adapters, two without tokens"]
    (given, rows), (other, apart) = ((arguments(ranks), adapters(ranks)) for _ in range(2))
    stack = AdapterStack(rows)
    ys = outputs(*given[:3], stack, given[3])
    with torch.no_grad():
        for row in rows:
            row[1].a.add_(1.0)
            row[1].b.mul_(3.0)
    torch.autograd.backward(ys, given[4])
    expected = results(other, apart, factors(apart))
    assert_equal([*ys, given[0][0].grad, *(one.grad for one in factors(rows))], expected)


def test_the_limits_of_a_stack_are_told():
    """Gradients that are None would be left out by optimizers, and not come back."""
    ranks = CASES["one linear"]
    given, rows = arguments(ranks), adapters(ranks)
    stack = AdapterStack(rows)
    results(given, stack, factors(rows))
    torch.optim.AdamW(factors([[rows[0][2]]])).zero_grad(set_to_none=True)
    with pytest.raises(RuntimeError, match=r"^adapters: expected gradients zeroed in place \(set_to_none=False\)"):
        results(given, stack, factors(rows))


@pytest.mark.usefixtures("nothing_compiled")
@pytest.mark.parametrize("gated", [False, True])
def test_compiled_equals_eager(gated):
    ranks = CASES["mixed ranks, an adapter on one of two linears"][: 1 if gated else 2]
    found = []
    for one in (outputs, torch.compile(outputs, fullgraph=True, backend="aot_eager")):
        inputs, weights, biases, batch, dys = arguments(ranks, gated=gated)
        rows = adapters(ranks)
        stack = AdapterStack(rows)
        memory = storages([stack.a.grad, stack.b.grad])
        for _ in range(2):
            ys = one(inputs, weights, biases, stack, batch)
            torch.autograd.backward(ys, dys)
        assert storages(factor.grad for factor in factors(rows)) == memory
        found.append([*ys, *(one.grad for one in inputs), *(factor.grad for factor in factors(rows))])
    assert_equal(*found)


def test_a_stack_made_in_inference_mode_serves_training():
    ranks = CASES["one linear"]
    given, rows, apart = arguments(ranks), adapters(ranks), adapters(ranks)
    with torch.inference_mode():
        stack = AdapterStack(rows)
    assert_equal(results(given, stack, factors(rows)), results(given, apart, factors(apart)))


def changed(place, **changes):
    """Two adapters on two linears, one of which is changed."""
    rows = adapters(((2, 5), (3, 4)))
    linear, index = place
    rows[linear][index] = replace(rows[linear][index], **changes)
    return rows


TIED = nn.Parameter(torch.zeros(3, COLUMNS, dtype=torch.float64))
BAD = {
    "another dtype": (
        lambda: changed((1, 0), b=nn.Parameter(torch.zeros(16, 3))),
        r"adapters\[1\]\[0\].b: expected torch.float64 \[16, 3\] on cpu, as the first, found torch.float32 \[16, 3\]",
    ),
    "another device": (
        lambda: changed((0, 1), a=nn.Parameter(torch.zeros(5, COLUMNS, dtype=torch.float64, device="meta"))),
        rf"adapters\[0\]\[1\].a: expected .* on cpu, as the first, found torch.float64 \[5, {COLUMNS}\] on meta",
    ),
    "other columns": (
        lambda: changed((1, 1), a=nn.Parameter(torch.zeros(4, COLUMNS + 1, dtype=torch.float64))),
        rf"adapters\[1\]\[1\].a: expected torch.float64 \[4, {COLUMNS}\] on cpu, as the first, found",
    ),
    "other rows": (
        lambda: changed((1, 1), b=nn.Parameter(torch.zeros(9, 4, dtype=torch.float64))),
        r"adapters\[1\]\[1\].b: expected torch.float64 \[16, 4\] on cpu, as the first, found torch.float64 \[9, 4\]",
    ),
    "other ranks of a and b": (
        lambda: changed((0, 0), a=nn.Parameter(torch.zeros(1, COLUMNS, dtype=torch.float64))),
        r"adapters\[0\]\[0\].b: expected torch.float64 \[9, 1\] on cpu, as the first, found torch.float64 \[9, 2\]",
    ),
    "no parameter": (
        lambda: changed((0, 0), a=torch.zeros(2, COLUMNS)),
        r"adapters\[0\]\[0\].a: expected a floating point Parameter that is trained, found Tensor of torch.float32",
    ),
    "a frozen one": (
        lambda: changed((0, 0), b=nn.Parameter(torch.zeros(9, 2), requires_grad=False)),
        r"adapters\[0\]\[0\].b: expected a floating point Parameter that is trained, found Parameter",
    ),
    "one dimension": (
        lambda: changed((0, 1), a=nn.Parameter(torch.zeros(COLUMNS))),
        r"adapters\[0\]\[1\].a: expected \[r, K\], found Parameter of torch.float32",
    ),
    "a factor that is given twice": (
        lambda: [[LoRAAdapter(TIED, nn.Parameter(torch.zeros(9, 3, dtype=torch.float64)), 1.0)] for _ in range(2)],
        r"adapters\[1\]\[0\].a: expected one of its own, found adapters\[0\]\[0\].a",
    ),
    "a bad dropout": (lambda: changed((1, 1), dropout=1.5), r"adapters\[1\].dropout: expected"),
    "linears of other numbers of adapters": (
        lambda: [*adapters(((2, 5),)), *adapters(((3,),))],
        r"adapters: expected as many for each linear, found \[2, 1\]",
    ),
    "none": (lambda: [[None, None]], "adapters: expected one with factors, found none"),
    "no linear": (list, "adapters: expected one with factors, found none"),
}


@pytest.mark.parametrize("name", list(BAD))
def test_what_cannot_be_stacked_is_named(name):
    make, message = BAD[name]
    rows = make()
    before = [one.data_ptr() for one in factors(rows)]
    with pytest.raises(ValueError, match=f"^{message}") as caught:
        AdapterStack(rows)
    assert "\n" not in str(caught.value)
    assert [one.data_ptr() for one in factors(rows)] == before


BAD_CALLS = {
    "another number of linears": (
        {"weights": [torch.zeros(9, COLUMNS, dtype=torch.float64)], "biases": [None]},
        "weights, biases, adapters: expected one entry for each linear, found 1, 1 and 2",
    ),
    "other rows": (
        {"weights": [torch.zeros(rows, COLUMNS, dtype=torch.float64) for rows in (9, 8)], "biases": [None, None]},
        r"weights\[1\]: expected 16 rows, as the stack's b have, found 8",
    ),
    "other columns": (
        {
            "x": torch.zeros(TOKENS, 5, dtype=torch.float64),
            "weights": [torch.zeros(rows, 5, dtype=torch.float64) for rows in ROWS[:2]],
        },
        r"the stack's a: expected floating point \[15, 5\] on cpu, found",
    ),
    "a table of its own": (
        {"table": AdapterTable.of(adapters(((2, 5, 1), (0, 3, 4))), torch.device("cpu"))},
        "table: expected None, since a stack of adapters has its own",
    ),
}


@pytest.mark.parametrize("name", list(BAD_CALLS))
def test_a_call_that_does_not_fit_the_stack_is_named(name):
    change, message = BAD_CALLS[name]
    ranks = CASES["mixed ranks, an adapter on one of two linears"]
    [x], weights, biases, batch, _ = arguments(ranks)
    call = {"x": x, "weights": weights, "biases": biases, "adapters": AdapterStack(adapters(ranks)), "batch": batch}
    with pytest.raises(ValueError, match=f"^{message}"):
        lora_linears(**(call | change))
