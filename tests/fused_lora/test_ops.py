"""The operators as PyTorch sees them: schema, fake tensors, autograd and `torch.compile`; and linears that share x."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from itertools import chain

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from fused_lora import AdapterTable, LoRAAdapter, LoRABatch, LoRASegment, linear, lora_linear, lora_linears, ops

pytestmark = pytest.mark.usefixtures("nothing_compiled")
TOKENS, COLUMNS = 11, 37
CPU = torch.device("cpu")
SEGMENTS = (LoRASegment(0, 3, 1), LoRASegment(3, 3, 0), LoRASegment(4, 9, 0), LoRASegment(9, 10, 2))
RANKS = ((2, 5, 1), (0, 3, 4), (1, 0, 17))  # of three adapters on up to three linears
ROWS = (9, 16, 5)


def linears(count=1, dropout=0.4, dtype=torch.float64, factor_dtype=None, segments=SEGMENTS, one_position=False):
    """Arguments of `lora_linears`, as a dictionary."""
    generator = torch.Generator().manual_seed(count)

    def normal(*shape, to=dtype):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(to)

    kind = factor_dtype or dtype
    adapters = [
        [
            LoRAAdapter(normal(rank, COLUMNS, to=kind), normal(rows, rank, to=kind), 0.5 + place, dropout, 99 + place)
            if rank
            else None
            for place, rank in enumerate(ranks)
        ]
        for ranks, rows in zip(RANKS[:count], ROWS, strict=False)
    ]
    for factor in factors(adapters):
        factor.requires_grad_()
    positions = torch.tensor([2**33 - 5]) if one_position else torch.arange(TOKENS) + 2**33 - 5
    return {
        "x": normal(TOKENS, COLUMNS).requires_grad_(),
        "weights": [normal(rows, COLUMNS) for rows in ROWS[:count]],
        "biases": [normal(ROWS[0]), None, normal(ROWS[2])][:count],
        "adapters": adapters,
        "batch": LoRABatch.of(segments, positions),
    }


def factors(adapters):
    return [factor for one in chain.from_iterable(adapters) if one is not None for factor in (one.a, one.b)]


def results(arguments, **options):
    """Outputs and all gradients, in a list."""
    ys = lora_linears(**arguments, **options)
    dys = [torch.linspace(-1, 2, y.numel(), dtype=torch.float64).to(y.dtype).view_as(y) for y in ys]
    return [*ys, *torch.autograd.grad(ys, [arguments["x"], *factors(arguments["adapters"])], dys)]


def assert_close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-13)


def operator_arguments(masked=True, keep_bits=True, **changes):
    """What `lora_linears` passes to the operator."""
    arguments = linears(**changes)
    adapters = arguments["adapters"]
    table = AdapterTable.of(adapters, CPU)
    operands, settings = linear.operator_arguments(adapters, arguments["batch"], table, masked)
    a, b = (factor.detach().requires_grad_() for factor in (operands.a, operands.b))
    biases = [torch.empty(0, dtype=torch.float64) if bias is None else bias for bias in arguments["biases"]]
    return *operands._replace(a=a, b=b), *settings, [arguments["x"]], arguments["weights"], biases, keep_bits


CASES = {
    "one linear": {},
    "one linear, no dropout": {"masked": False},
    "one linear, masks drawn again, one position": {"keep_bits": False, "one_position": True},
    "two linears, an adapter on one of them": {"count": 2},
    "two linears, masks drawn again": {"count": 2, "keep_bits": False},
    "three linears, one position": {"count": 3, "one_position": True},
    "three linears, no dropout": {"count": 3, "masked": False, "keep_bits": False},
    "no segment with an adapter": {"segments": [LoRASegment(0, TOKENS, -1)]},
}


@pytest.mark.parametrize("name", list(CASES))
def test_opcheck_of_the_forward_operator(name):
    torch.library.opcheck(torch.ops.fused_lora.linear.default, operator_arguments(**CASES[name]))


@pytest.mark.parametrize("wants", [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("name", list(CASES))
def test_opcheck_of_the_backward_operator(name, wants):
    arguments = tree_map_only(torch.Tensor, torch.Tensor.detach, operator_arguments(**CASES[name]))
    ys, s, bits = ops.linear(*arguments)
    *shared, inputs, weights, _, _ = arguments
    backward = (*shared, ys, inputs, weights, s, bits, list(wants))
    # The operator has no derivative, and says so: asked for in test_reference.py.
    utilities = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(torch.ops.fused_lora.linear_backward.default, backward, test_utils=utilities)


@pytest.mark.parametrize("name", list(CASES))
def test_fake_results_have_the_shapes_and_dtypes_of_real_ones(name):
    arguments = operator_arguments(**CASES[name])
    real = ops.linear(*arguments)
    with FakeTensorMode() as mode:
        fake = ops.linear(*tree_map_only(torch.Tensor, mode.from_tensor, arguments))
    for one, other in zip(tree_leaves(fake), tree_leaves(real), strict=True):
        assert (one.shape, one.dtype, one.stride()) == (other.shape, other.dtype, other.stride())


class Seen(TorchDispatchMode):
    """Notes which operators of ours are called."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "fused_lora":
            self.names.append(function._opname)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("options", [{}, {"training": False}, {"keep_bits": False}])
@pytest.mark.parametrize("count", [1, 3])
def test_eager_mode_without_the_operators_gives_what_they_give(count, options):
    """Which are called where a mode wants to see them."""
    arguments = linears(count)
    plain = results(arguments, **options)
    with Seen() as seen:
        found = results(arguments, **options)
    assert seen.names == ["linear", "linear_backward"]
    assert all(torch.equal(one, other) for one, other in zip(found, plain, strict=True))


def test_what_eager_mode_keeps_for_the_backward_pass_is_what_the_operator_keeps():
    kept = []
    for mode in (nullcontext(), Seen()):
        sizes = []
        kept.append(sizes)
        hooks = torch.autograd.graph.saved_tensors_hooks(lambda one, sizes=sizes: sizes.append(one.shape), lambda _: _)
        with mode, hooks:
            lora_linears(**linears(2))
    assert kept[0] == kept[1]


def test_fake_tensors_without_their_mode_go_to_the_operator():
    arguments = linears(2)
    table = AdapterTable.of(arguments["adapters"], CPU)
    with FakeTensorMode() as mode:
        fake = tree_map_only(torch.Tensor, mode.from_tensor, {**arguments, "batch": None, "adapters": None})
        rows = [
            [one and replace(one, a=mode.from_tensor(one.a), b=mode.from_tensor(one.b)) for one in row]
            for row in arguments["adapters"]
        ]
        batch = LoRABatch(*map(mode.from_tensor, vars(arguments["batch"]).values()))
        table = replace(
            table, **{name: mode.from_tensor(one) for name, one in vars(table).items() if torch.is_tensor(one)}
        )
    ys = lora_linears(**(fake | {"adapters": rows, "batch": batch}), table=table)
    assert [(type(y), y.shape) for y in ys] == [(FakeTensor, (TOKENS, rows)) for rows in ROWS[:2]]


@pytest.mark.parametrize("options", [{}, {"training": False}, {"keep_bits": False}])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_compiled_equals_eager(count, options):
    arguments = linears(count)
    table = AdapterTable.of(arguments["adapters"], CPU)
    inputs = [arguments["x"], *factors(arguments["adapters"])]

    def function(x, batch):
        return [2 * y for y in lora_linears(**(arguments | {"x": x, "batch": batch}), **options, table=table)]

    found = []
    for one in (function, torch.compile(function, fullgraph=True, backend="aot_eager")):
        ys = one(arguments["x"], arguments["batch"])
        found.append([*ys, *torch.autograd.grad(sum(y.square().sum() for y in ys), inputs)])
    for theirs, ours in zip(*found, strict=True):
        assert torch.equal(ours, theirs)


def test_compiled_once_for_any_number_of_tokens():
    arguments, compilations = linears(2, dropout=0.3), []
    table = AdapterTable.of(arguments["adapters"], CPU)

    def backend(graph, _):
        compilations.append(graph)
        return graph

    def function(x, positions):
        batch = replace(arguments["batch"], positions=positions)
        return lora_linears(**(arguments | {"x": x, "batch": batch}), table=table)

    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=backend)
    for tokens in (TOKENS, 12, 40):
        given = torch.randn(tokens, COLUMNS, dtype=torch.float64), torch.arange(tokens)
        for ours, expected in zip(compiled(*given), function(*given), strict=True):
            assert torch.equal(ours, expected)
    assert len(compilations) == 1


@pytest.mark.parametrize("options", [{}, {"training": False}, {"keep_bits": False}])
@pytest.mark.parametrize("count", [2, 3])
def test_linears_together_equal_each_alone(count, options):
    """But for the order of sums, which a library may change with where a tensor lies."""
    arguments = linears(count)
    together = results(arguments, **options)
    ys, dx, gradients = together[:count], together[count], together[count + 1 :]
    alone_dx = 0
    for index in range(count):
        own = arguments | {name: [arguments[name][index]] for name in ("weights", "biases", "adapters")}
        y, part, *own_gradients = results(own, **options)
        assert_close(y, ys[index])
        for gradient in own_gradients:
            assert_close(gradient, gradients.pop(0))
        alone_dx += part
    assert not gradients
    assert_close(dx, alone_dx)


@pytest.mark.parametrize("training", [True, False])
def test_several_linears_equal_calls_of_lora_linear(training):
    """Which takes segments and adapters without tokens, and copies them itself."""
    arguments = linears(2)
    ys = lora_linears(**arguments, training=training)
    pairs = zip(ys, arguments["weights"], arguments["biases"], arguments["adapters"], strict=True)
    for y, weight, bias, adapters in pairs:
        place = {index: len([one for one in adapters[:index] if one is not None]) for index in range(3)}
        segments = [replace(one, adapter=place[one.adapter]) for one in SEGMENTS if adapters[one.adapter] is not None]
        present = [one for one in adapters if one is not None]
        positions = arguments["batch"].positions
        assert_close(y, lora_linear(arguments["x"], weight, bias, present, segments, positions, training))


@pytest.mark.parametrize("count", [1, 3])
def test_masks_drawn_again_are_the_masks_that_were_kept(count):
    arguments = linears(count)
    for kept, drawn in zip(results(arguments), results(arguments, keep_bits=False), strict=True):
        assert torch.equal(kept, drawn)


def test_masks_that_are_not_kept_take_no_memory():
    saved = {}
    for keep_bits in (True, False):
        sizes = saved.setdefault(keep_bits, [])
        with torch.autograd.graph.saved_tensors_hooks(lambda one, sizes=sizes: sizes.append(one.numel()), lambda _: _):
            lora_linears(**linears(2), keep_bits=keep_bits)
    assert sum(saved[True]) - sum(saved[False]) == 2 * TOKENS * 2  # words of 32 bits


@pytest.mark.parametrize("count", [1, 2])
def test_one_position_stands_for_those_that_follow_it(count):
    single, every = linears(count, one_position=True), linears(count)
    assert (len(single["batch"].positions), len(every["batch"].positions)) == (1, TOKENS)
    for found, expected in zip(results(single), results(every), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("x_dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("count", [1, 2])
def test_float32_factors_of_a_16_bit_input(count, x_dtype):
    """Products as with factors in x's dtype, gradients in float32, as PEFT's adapters want them."""
    wide = linears(count, dtype=x_dtype, factor_dtype=torch.float32)
    narrow = wide | {
        "adapters": [
            [one and replace(one, a=_rounded(one.a, x_dtype), b=_rounded(one.b, x_dtype)) for one in row]
            for row in wide["adapters"]
        ]
    }
    found, expected = results(wide), results(narrow)
    for index, (ours, one) in enumerate(zip(found, expected, strict=True)):
        assert ours.dtype == (x_dtype if index <= count else torch.float32)
        torch.testing.assert_close(ours.to(x_dtype), one, rtol=0, atol=0)


def _rounded(factor, dtype):
    return factor.detach().to(dtype).requires_grad_()


def test_autocast_does_not_reach_into_the_operator():
    arguments = linears(2, dtype=torch.float32)
    expected = results(arguments)
    with torch.autocast("cpu", torch.bfloat16):
        found = results(arguments)
    for ours, one in zip(found, expected, strict=True):
        assert ours.dtype == torch.float32
        assert torch.equal(ours, one)


@pytest.mark.parametrize("shape", [(0, COLUMNS), (2, 0, COLUMNS)])
def test_no_tokens(shape):
    arguments = linears(2) | {"x": torch.empty(shape, dtype=torch.float64, requires_grad=True)}
    arguments["batch"] = LoRABatch.of([LoRASegment(0, 0, 1)], torch.arange(0))
    ys = lora_linears(**arguments)
    assert [y.shape for y in ys] == [(*shape[:-1], rows) for rows in ROWS[:2]]
    torch.autograd.grad(sum(y.sum() for y in ys), arguments["x"])


def test_no_adapters_give_the_base_linears():
    arguments = linears(2)
    bare = [
        arguments | {"adapters": [[None] * 3, [None] * 3]},
        arguments | {"batch": LoRABatch.of([], torch.arange(TOKENS))},
        arguments | {"batch": LoRABatch.of([LoRASegment(0, TOKENS, -1)], torch.arange(TOKENS))},
    ]
    for one in bare:
        pairs = zip(lora_linears(**one), arguments["weights"], arguments["biases"], strict=True)
        assert all(torch.equal(y, F.linear(arguments["x"], weight, bias)) for y, weight, bias in pairs)


def test_a_table_made_in_inference_mode_serves_training():
    arguments = linears(2)
    with torch.inference_mode():
        table = AdapterTable.of(arguments["adapters"], CPU)
    for ours, expected in zip(results(arguments, table=table), results(arguments), strict=True):
        assert torch.equal(ours, expected)


def test_an_adapter_without_tokens_gets_zeros():
    arguments = linears(1, segments=[LoRASegment(0, TOKENS, 1)])
    _, _, *gradients = results(arguments)
    assert [gradient.any().item() for gradient in gradients] == [False, False, True, True, False, False]
