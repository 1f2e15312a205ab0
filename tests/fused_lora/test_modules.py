"""`LoRALinear` against PEFT's initial weights, `lora_linear` and itself; and inputs that several linears share."""

from __future__ import annotations

import copy
import io
import math

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from fused_lora import LoRAAdapter, LoRABatch, LoRALinear, LoRASegment, LoRASettings, lora_linear, mask_key
from fused_lora.modules import SharedInput, whole_batch

TOKENS, COLUMNS, ROWS = 10, 24, 17
SETTINGS = (LoRASettings(4, 8.0, 0.5, seed=1), LoRASettings(16, 4.0, 0.2, rslora=True, seed=2), LoRASettings(1, 3.0))


def made(settings=SETTINGS, bias=True, dtype=torch.float64, columns=COLUMNS, rows=ROWS, name="linear"):
    """A LoRALinear whose b is not zero."""
    torch.manual_seed(5)
    linear = LoRALinear(nn.Linear(columns, rows, bias=bias, dtype=dtype), settings, name)
    for b in linear.lora_b:
        nn.init.normal_(b)
    return linear


def random_input(*shape, dtype=torch.float64, seed=6):
    return torch.randn(*(shape or (TOKENS, COLUMNS)), generator=torch.Generator().manual_seed(seed), dtype=dtype)


def adapters_of(linear):
    pairs = zip(linear.lora_a, linear.lora_b, linear.settings, linear.keys, strict=True)
    return [LoRAAdapter(a, b, one.scaling, one.dropout, key) for a, b, one, key in pairs]


@pytest.mark.parametrize(("rslora", "scaling"), [(False, 0.5), (True, 2.0)])
def test_the_scaling_is_pefts(rslora, scaling):
    from peft import LoraConfig
    from peft.tuners.lora import Linear

    assert LoRASettings(16, 8.0, rslora=rslora).scaling == scaling
    config = LoraConfig(r=16, lora_alpha=8.0, use_rslora=rslora)
    theirs = Linear(nn.Linear(3, 3), "default", config=config, r=16, lora_alpha=8.0)
    assert theirs.scaling == {"default": scaling}


def test_initial_factors_are_distributed_as_pefts():
    """Kaiming-uniform with a = sqrt(5) is uniform within 1 / sqrt(K); b is zero."""
    linear = LoRALinear(nn.Linear(400, 7), [LoRASettings(64, 1.0)])
    a, bound = linear.lora_a[0].double(), 1 / math.sqrt(400)
    assert 0.99 * bound < a.abs().max() <= bound
    assert a.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02)
    assert a.mean().abs().item() < 4 * bound / math.sqrt(3 * a.numel())
    assert not linear.lora_b[0].any()


def test_initial_factors_depend_on_the_seed_and_the_name_alone():
    def initial(seed, name):
        torch.rand(3)  # whatever else drew random numbers
        return LoRALinear(nn.Linear(8, 5), [LoRASettings(2, 1.0, seed=seed)], name).lora_a[0]

    assert torch.equal(initial(1, "q"), initial(1, "q"))
    assert not torch.equal(initial(1, "q"), initial(2, "q"))
    assert not torch.equal(initial(1, "q"), initial(1, "k"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_the_base_is_frozen_and_factors_have_its_dtype(dtype):
    linear = LoRALinear(nn.Linear(8, 5, dtype=dtype), SETTINGS)
    trained = {name for name, parameter in linear.named_parameters() if parameter.requires_grad}
    assert trained == {f"lora_{kind}.{index}" for kind in "ab" for index in range(3)}
    assert {parameter.dtype for parameter in linear.parameters()} == {dtype}
    assert [a.shape for a in linear.lora_a] == [(4, 8), (16, 8), (1, 8)]
    assert [b.shape for b in linear.lora_b] == [(5, 4), (5, 16), (5, 1)]


def test_at_first_the_adapter_adds_nothing():
    linear, x = LoRALinear(nn.Linear(COLUMNS, ROWS), SETTINGS), random_input(dtype=torch.float32)
    assert torch.equal(linear(x), linear.base(x))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(TOKENS, COLUMNS), (2, 5, COLUMNS), (COLUMNS,)])
def test_without_a_batch_all_tokens_are_the_first_adapters(shape, bias, training):
    linear, x = made(bias=bias).train(training), random_input(*shape)
    tokens = x.numel() // COLUMNS
    torch.manual_seed(7)
    y = linear(x)
    torch.manual_seed(7)
    positions = torch.randint(1 << 62, (1,)) + torch.arange(tokens)
    segments = [LoRASegment(0, tokens, 0)]
    weight, bias = linear.base.weight, linear.base.bias
    expected = lora_linear(x, weight, bias, adapters_of(linear), segments, positions, training)
    assert y.shape == (*shape[:-1], ROWS)
    torch.testing.assert_close(y, expected, rtol=1e-13, atol=1e-13)


def test_a_batch_of_several_adapters():
    linear, x = made(), random_input()
    segments = [LoRASegment(0, 3, 2), LoRASegment(4, 8, 0), LoRASegment(8, 10, 1)]
    positions = torch.arange(TOKENS) + 3
    y = linear(x, LoRABatch.of(segments, positions))
    expected = lora_linear(x, linear.base.weight, linear.base.bias, adapters_of(linear), segments, positions)
    torch.testing.assert_close(y, expected, rtol=1e-13, atol=1e-13)
    assert torch.equal(y[3], linear.base(x)[3])


def test_masks_are_new_at_each_call_and_obey_the_seed():
    linear, x = made(), random_input()
    runs = []
    for _ in range(2):
        torch.manual_seed(1)
        runs.append([linear(x), linear(x)])
    assert not torch.equal(*runs[0])
    assert all(torch.equal(first, second) for first, second in zip(*runs, strict=True))
    assert torch.equal(linear.eval()(x), linear(x))


def test_linears_of_other_names_drop_other_elements_at_the_same_position():
    x = random_input()
    outputs = []
    for name in ("q_proj", "k_proj"):
        linear = made(name=name)
        for index, a in enumerate(made().lora_a):  # the same factors
            linear.lora_a[index].data.copy_(a)
        torch.manual_seed(3)
        outputs.append(linear(x))
    assert not torch.equal(*outputs)
    assert made(name="q_proj").keys == [mask_key(one.seed, 0, "q_proj") for one in SETTINGS]


def test_positions_are_drawn_from_all_that_leave_room_for_tokens():
    batch = whole_batch(torch.zeros(3, 4, 5))
    assert batch.segments() == [LoRASegment(0, 12, 0)]
    assert batch.positions.shape == (1,)
    drawn = torch.cat([whole_batch(torch.zeros(2, 5)).positions for _ in range(200)])
    assert len(drawn.unique()) == 200
    assert 0 <= drawn.min() < 2**58 < 2**61 < drawn.max() < 2**62


def test_a_state_dict_goes_there_and_back():
    first, second = made(), LoRALinear(nn.Linear(COLUMNS, ROWS, dtype=torch.float64), SETTINGS)
    state = first.state_dict()
    assert set(state) == {"base.weight", "base.bias", *(f"lora_{kind}.{index}" for kind in "ab" for index in range(3))}
    second.load_state_dict(state)
    x = random_input()
    assert torch.equal(first.eval()(x), second.eval()(x))


def test_a_copy_and_another_dtype_are_independent():
    linear, x = made(), random_input()
    linear(x)
    other = copy.deepcopy(linear).float()
    assert other(x.float()).dtype == torch.float32
    other.lora_b[0].data.zero_()
    assert not torch.equal(linear.eval()(x), linear.base(x))


def test_a_pickled_module_is_the_same():
    linear, x = made(), random_input()
    linear(x)
    file = io.BytesIO()
    torch.save(linear, file)
    file.seek(0)
    other = torch.load(file, weights_only=False, map_location="meta")  # nothing that was kept knows the old device
    other = other.to_empty(device="cpu")
    other.load_state_dict(linear.state_dict())
    assert torch.equal(other.eval()(x), linear.eval()(x))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16])
def test_autocast_acts_as_on_a_linear(x_dtype, bias):
    """Products in its dtype, of a base and factors in float32."""
    linear = made([LoRASettings(4, 8.0)], bias, torch.float32)
    x = random_input(dtype=torch.float32).to(x_dtype).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y, plain = linear(x), linear.base(x)
        expected = plain + 2 * (x.bfloat16() @ linear.lora_a[0].T) @ linear.lora_b[0].T
    assert y.dtype == plain.dtype == torch.bfloat16
    assert (y - expected).float().norm() < 0.01 * expected.float().norm()
    dx, da = torch.autograd.grad(y.float().sum(), [x, linear.lora_a[0]])
    assert (dx.dtype, da.dtype) == (x_dtype, torch.float32)


def test_autocast_leaves_float64_alone():
    linear, x = made().eval(), random_input()
    expected = linear(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(linear(x), expected)


class Two(nn.Module):
    """Linears one after the other, with dropout."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([made(SETTINGS[:1], columns=COLUMNS, rows=COLUMNS, name=n) for n in ("one", "two")])

    def forward(self, x):
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


def gradients(model, run, x):
    model.zero_grad()
    x = x.clone().requires_grad_()
    torch.manual_seed(11)
    run(x).square().sum().backward()
    trained = [parameter.grad for parameter in model.parameters() if parameter.requires_grad]
    return [x.grad.clone(), *(grad.clone() for grad in trained)]


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing_gives_the_same_gradients(use_reentrant):
    """The masks are drawn again as they were: their position comes from the random state that is restored."""
    model, x = Two(), random_input()
    plain = gradients(model, model, x)
    saved = gradients(model, lambda x: checkpoint(model, x, use_reentrant=use_reentrant), x)
    for ours, expected in zip(saved, plain, strict=True):
        assert torch.equal(ours, expected)


def test_compiled_equals_eager():
    torch.compiler.reset()
    model, x = Two(), random_input()
    plain = gradients(model, model, x)
    compiled = gradients(model, torch.compile(model, fullgraph=True, backend="aot_eager"), x)
    for ours, expected in zip(compiled, plain, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-13, atol=1e-13)


def test_training_after_an_evaluation_in_inference_mode():
    """What the module keeps from call to call was made in inference mode, and is saved for a backward pass."""
    model, x = Two(), random_input()
    with torch.inference_mode():
        model.eval()(x)
    gradients(model.train(), model, x)


def test_training_after_a_run_with_fake_tensors():
    model, x = Two(), random_input()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        model(mode.from_tensor(x))
    assert all(type(one) is torch.Tensor for one in gradients(model, model, x))


def test_each_call_has_a_batch_of_its_own():
    """A captured CUDA graph owns what was made in it; nobody else keeps it, or gives it up."""
    first, second = (whole_batch(torch.zeros(3, 4)) for _ in range(2))
    for name in ("offsets", "adapters", "positions"):
        one, other = getattr(first, name), getattr(second, name)
        assert one.data_ptr() != other.data_ptr()
    assert whole_batch(torch.zeros(0, 4)).offsets.tolist() == [0, 0]


class Counted:
    """Linears that share their input, and how often they were computed."""

    def __init__(self, count=3):
        self.calls = 0
        self.count = count
        self.shared = SharedInput(self.compute)

    def compute(self, x):
        self.calls += 1
        return [(index + 1) * x for index in range(self.count)]


def test_siblings_are_computed_once():
    counted, x = Counted(), random_input()
    for step in range(1, 4):
        for index in (0, 2, 1):
            assert torch.equal(counted.shared.output(index, x), (index + 1) * x)
            assert counted.calls == step


def test_another_input_is_computed_anew():
    """Also an equal one, and one for which siblings were not all asked."""
    counted, x = Counted(), random_input()
    counted.shared.output(0, x)
    other = x.clone()
    counted.shared.output(1, other)
    assert counted.calls == 2
    assert torch.equal(counted.shared.output(2, 2 * x), 6 * x)
    assert counted.calls == 3


def test_a_linear_called_twice_is_computed_twice():
    """Its masks must be new ones."""
    counted, x = Counted(), random_input()
    first, second = counted.shared.output(0, x), counted.shared.output(0, x)
    assert first is not second
    assert counted.calls == 2


def test_an_output_without_a_graph_does_not_serve_one_with():
    """Reentrant activation checkpointing computes first without gradients, then with."""
    counted, x = Counted(), random_input().requires_grad_()
    with torch.no_grad():
        assert not counted.shared.output(0, x).requires_grad
    assert counted.shared.output(1, x).requires_grad
    with torch.no_grad():
        assert not counted.shared.output(2, x).requires_grad
    assert counted.calls == 3


def test_nothing_is_kept_once_all_have_been_asked():
    counted, x = Counted(), random_input()
    for index in range(3):
        counted.shared.output(index, x)
    assert counted.shared._input is None
    assert counted.shared._outputs == []


def test_other_settings_are_computed_anew():
    counted, x = Counted(), random_input()
    counted.shared.output(0, x, "one")
    counted.shared.output(1, x, "other")
    counted.shared.output(2, x, "other")
    assert counted.calls == 2


def test_a_copy_is_without_outputs_that_wait():
    """They belong to a graph, of which PyTorch makes no copies."""
    counted, x = Counted(), random_input().requires_grad_()
    counted.shared.output(0, x)
    other = copy.deepcopy(counted)
    other.shared.output(1, x)
    counted.shared.output(1, x)
    assert (counted.calls, other.calls) == (1, 2)


def test_an_input_that_was_written_to_is_computed_again():
    """k after q, x having been changed in place between them."""
    shared = SharedInput(lambda x: [x + 1, x + 2])
    x = torch.zeros(3)
    assert torch.equal(shared.output(0, x), torch.ones(3))
    x.add_(1)
    assert torch.equal(shared.output(1, x), torch.full((3,), 3.0))
