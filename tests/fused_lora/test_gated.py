"""The gated linear: y and gradients against plain PyTorch, what PyTorch sees of its operators, and what it keeps."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses import FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map_only

from fused_lora import AdapterTable, LoRAAdapter, LoRABatch, LoRASegment, linear, lora_gated_linear, lora_linears, ops
from fused_lora.reference import gated, gated_backward

pytestmark = pytest.mark.usefixtures("nothing_compiled")
TOKENS, COLUMNS, ROWS = 11, 37, 9
CPU = torch.device("cpu")
SEGMENTS = (LoRASegment(0, 3, 1), LoRASegment(3, 3, 0), LoRASegment(4, 9, 0), LoRASegment(9, 10, 2))
RANKS = (2, 5, 0)


def arguments(dtype=torch.float64, dropout=0.4, bias=True, segments=SEGMENTS, one_position=False):
    """Arguments of `lora_gated_linear`, as a dictionary."""
    generator = torch.Generator().manual_seed(3)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    adapters = [
        LoRAAdapter(
            normal(rank, COLUMNS).requires_grad_(),
            normal(ROWS, rank).requires_grad_(),
            0.5 + place,
            dropout,
            99 + place,
        )
        if rank
        else None
        for place, rank in enumerate(RANKS)
    ]
    positions = torch.tensor([2**33 - 5]) if one_position else torch.arange(TOKENS) + 2**33 - 5
    return {
        "gate": (3 * normal(TOKENS, COLUMNS)).requires_grad_(),
        "up": normal(TOKENS, COLUMNS).requires_grad_(),
        "weight": normal(ROWS, COLUMNS),
        "bias": normal(ROWS) if bias else None,
        "adapters": adapters,
        "batch": LoRABatch.of(segments, positions),
    }


def leaves(given):
    factors = [factor for one in given["adapters"] if one is not None for factor in (one.a, one.b)]
    return [given["gate"], given["up"], *factors]


def results(function, given, **options):
    """y and all gradients, in a list."""
    y = function(**given, **options)
    dy = torch.linspace(-1, 2, y.numel(), dtype=torch.float64).to(y.dtype).view_as(y)
    return [y, *torch.autograd.grad(y, leaves(given), dy)]


def plain(gate, up, weight, bias, adapters, batch, **options):
    """The definition, its gate left to autograd."""
    return lora_linears(F.silu(gate) * up, [weight], [bias], [adapters], batch, **options)[0]


@pytest.mark.parametrize("options", [{}, {"training": False}, {"keep_bits": False}])
@pytest.mark.parametrize("setting", [{}, {"bias": False, "dropout": 0.0}, {"one_position": True}])
def test_y_and_gradients_equal_the_definition(setting, options):
    given = arguments(**setting)
    for ours, expected in zip(
        results(lora_gated_linear, given, **options), results(plain, given, **options), strict=True
    ):
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)


def test_the_gates_derivatives_are_those_of_finite_differences():
    given = arguments(dropout=0.0)

    def function(gate, up):
        return lora_gated_linear(**(given | {"gate": gate, "up": up}))

    assert torch.autograd.gradcheck(function, (given["gate"], given["up"]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_each_result_is_rounded_once(dtype):
    gate, up, dh = (torch.randn(40, 33, generator=torch.Generator().manual_seed(i)).to(dtype) for i in range(3))
    wide = [one.float() for one in (gate, up, dh)]
    assert torch.equal(gated(gate, up), gated(*wide[:2]).to(dtype))
    for ours, exact in zip(gated_backward(gate, up, dh), gated_backward(*wide), strict=True):
        assert torch.equal(ours, exact.to(dtype))
    given = arguments(dtype)
    h = gated(given["gate"].detach(), given["up"].detach())
    [y] = lora_linears(h, [given["weight"]], [given["bias"]], [given["adapters"]], given["batch"])
    assert torch.equal(lora_gated_linear(**given), y)


def test_gradients_of_large_gates_are_finite():
    gate = torch.tensor([[-1e4, -200.0, -90.0, 0.0, 90.0, 1e4]], dtype=torch.bfloat16)
    for one in (gated(gate, gate), *gated_backward(gate, gate, gate)):
        assert one.isfinite().all()


@pytest.mark.parametrize("keep_bits", [True, False])
def test_h_is_not_kept(keep_bits):
    given, kept = arguments(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda one: kept.append(one) or one, lambda one: one):
        lora_gated_linear(**given, keep_bits=keep_bits)
    large = [one for one in kept if one.is_floating_point() and one.shape == given["gate"].shape]
    assert {one.data_ptr() for one in large} == {given["gate"].data_ptr(), given["up"].data_ptr()}
    words = [one for one in kept if one.dtype == torch.int32 and one.numel() == TOKENS * 2]
    assert len(words) == keep_bits


def test_only_the_gradients_that_are_wanted():
    given = arguments()
    all_of_them = dict(zip(map(id, leaves(given)), results(lora_gated_linear, given)[1:], strict=True))
    for frozen in (leaves(given)[:2], leaves(given)[2:]):
        for one in leaves(given):
            one.requires_grad_(all(one is not other for other in frozen))
        wanted = [one for one in leaves(given) if one.requires_grad]
        y = lora_gated_linear(**given)
        dy = torch.linspace(-1, 2, y.numel(), dtype=torch.float64).view_as(y)
        for one, gradient in zip(wanted, torch.autograd.grad(y, wanted, dy), strict=True):
            assert torch.equal(gradient, all_of_them[id(one)])


def test_any_leading_dimensions_and_strides():
    given = arguments()
    both = torch.stack([given["gate"], given["up"]], -1).detach()
    strided = given | {
        "gate": both[None, ..., 0].requires_grad_(),
        "up": both[None, ..., 1].requires_grad_(),
    }
    found, expected = results(lora_gated_linear, strided), results(lora_gated_linear, given)
    for ours, one in zip(found, expected, strict=True):
        torch.testing.assert_close(ours.view(one.shape), one, rtol=1e-13, atol=1e-13)


def test_without_adapters_it_is_the_base_linear():
    given = arguments()
    y = F.linear(F.silu(given["gate"]) * given["up"], given["weight"], given["bias"])
    none = LoRABatch.of([], torch.arange(TOKENS))
    for change in (
        {"adapters": [None] * 3},
        {"batch": none},
        {"batch": LoRABatch.of([LoRASegment(0, 11, -1)], none.positions)},
    ):
        torch.testing.assert_close(lora_gated_linear(**(given | change)), y, rtol=1e-13, atol=1e-13)


def test_no_tokens():
    given = arguments() | {"batch": LoRABatch.of([LoRASegment(0, 0, 1)], torch.arange(0))}
    given |= {name: torch.empty(2, 0, COLUMNS, dtype=torch.float64, requires_grad=True) for name in ("gate", "up")}
    y, dgate, dup, *factors = results(lora_gated_linear, given)
    assert (y.shape, dgate.shape, dup.shape) == ((2, 0, ROWS), (2, 0, COLUMNS), (2, 0, COLUMNS))
    assert not any(one.any() for one in factors)


BAD = {
    "gate is integer": ({"gate": torch.zeros(TOKENS, COLUMNS, dtype=torch.int32)}, "gate: expected floating point"),
    "up has another shape": (
        {"up": torch.zeros(TOKENS, COLUMNS - 1, dtype=torch.float64)},
        rf"up: expected torch.float64 \[{TOKENS}, {COLUMNS}\] on cpu, found torch.float64 \[{TOKENS}, {COLUMNS - 1}\]",
    ),
    "up has another dtype": ({"up": torch.zeros(TOKENS, COLUMNS)}, "up: expected torch.float64"),
    "weight does not fit gate": (
        {"weight": torch.zeros(ROWS, 8, dtype=torch.float64)},
        "weight: expected torch.float64",
    ),
    "bias has another length": ({"bias": torch.zeros(2, dtype=torch.float64)}, rf"bias: expected .* \[{ROWS}\]"),
    "an adapter's b does not fit": (
        {"adapters": [LoRAAdapter(torch.zeros(2, COLUMNS), torch.zeros(8, 2), 1.0)]},
        rf"adapters\[0\].b: expected floating point \[{ROWS}, 2\]",
    ),
    "positions have another length": (
        {"batch": LoRABatch.of(SEGMENTS, torch.arange(TOKENS - 1))},
        rf"positions: expected torch.int64 \[{TOKENS}\]",
    ),
    "the table is of other ranks": (
        {"table": AdapterTable.of([[LoRAAdapter(torch.zeros(1, COLUMNS), torch.zeros(ROWS, 1), 1.0)]], CPU)},
        r"table: expected one of ranks \(\(2, 5, 0\),\), found",
    ),
}


@pytest.mark.parametrize("name", list(BAD))
def test_a_bad_argument_is_named(name):
    change, message = BAD[name]
    with pytest.raises(ValueError, match=f"^{message}"):
        lora_gated_linear(**(arguments() | change))


def operator_arguments(masked=True, keep_bits=True, bias=True, **changes):
    """What `lora_gated_linear` passes to the operator."""
    given = arguments(bias=bias, **changes)
    adapters = [given["adapters"]]
    table = AdapterTable.of(adapters, CPU)
    operands, settings = linear.operator_arguments(adapters, given["batch"], table, masked)
    a, b = (factor.detach().requires_grad_() for factor in (operands.a, operands.b))
    biases = [given["bias"] if bias else torch.empty(0, dtype=torch.float64)]
    inputs = [given["gate"], given["up"]]
    return *operands._replace(a=a, b=b), *settings, inputs, [given["weight"]], biases, keep_bits


CASES = {
    "masks kept": {},
    "no dropout, no bias": {"masked": False, "bias": False},
    "masks drawn again, one position": {"keep_bits": False, "one_position": True},
}


@pytest.mark.parametrize("name", list(CASES))
def test_opcheck_of_the_forward_operator(name):
    torch.library.opcheck(torch.ops.fused_lora.linear.default, operator_arguments(**CASES[name]))


@pytest.mark.parametrize("wants", [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("name", list(CASES))
def test_opcheck_of_the_backward_operator(name, wants):
    given = tree_map_only(torch.Tensor, torch.Tensor.detach, operator_arguments(**CASES[name]))
    ys, s, bits = ops.linear(*given)
    *shared, inputs, weights, _, _ = given
    backward = (*shared, ys, inputs, weights, s, bits, list(wants))
    utilities = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(torch.ops.fused_lora.linear_backward.default, backward, test_utils=utilities)


@pytest.mark.parametrize("name", list(CASES))
def test_fake_results_have_the_shapes_and_dtypes_of_real_ones(name):
    given = operator_arguments(**CASES[name])
    real = ops.linear(*given)
    with FakeTensorMode() as mode:
        fake = ops.linear(*tree_map_only(torch.Tensor, mode.from_tensor, given))
    for one, other in zip(tree_leaves(fake), tree_leaves(real), strict=True):
        assert (one.shape, one.dtype, one.stride()) == (other.shape, other.dtype, other.stride())


@pytest.mark.parametrize("options", [{}, {"training": False}, {"keep_bits": False}])
def test_compiled_equals_eager(options):
    given = arguments()
    table = AdapterTable.of([given["adapters"]], CPU)

    def function(gate, up, batch):
        return 2 * lora_gated_linear(**(given | {"gate": gate, "up": up, "batch": batch}), **options, table=table)

    found = []
    for one in (function, torch.compile(function, fullgraph=True, backend="aot_eager")):
        y = one(given["gate"], given["up"], given["batch"])
        found.append([y, *torch.autograd.grad(y.square().sum(), leaves(given))])
    for theirs, ours in zip(*found, strict=True):
        assert torch.equal(ours, theirs)


def test_autocast_does_not_reach_into_the_operator():
    given = arguments(torch.float32)
    expected = results(lora_gated_linear, given)
    with torch.autocast("cpu", torch.bfloat16):
        found = results(lora_gated_linear, given)
    for ours, one in zip(found, expected, strict=True):
        assert torch.equal(ours, one)


def test_float32_factors_of_a_16_bit_input():
    """Products as with factors in the inputs' dtype, gradients in float32."""
    narrow = arguments(torch.bfloat16)
    wide = narrow | {
        "adapters": [
            one and replace(one, a=one.a.detach().float().requires_grad_(), b=one.b.detach().float().requires_grad_())
            for one in narrow["adapters"]
        ]
    }
    for index, pair in enumerate(
        zip(results(lora_gated_linear, wide), results(lora_gated_linear, narrow), strict=True)
    ):
        assert pair[0].dtype == (torch.bfloat16 if index <= 2 else torch.float32)
        assert torch.equal(pair[0].bfloat16(), pair[1])
