"""Patched linears while others handle the model: copied, pickled, hooked, switched, unpatched."""

from __future__ import annotations

import copy
import io
from contextlib import nullcontext

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, ModelHook, add_hook_to_module, remove_hook_from_module
from peft import LoraConfig, get_peft_model
from torch import nn
from torch._subclasses import FakeTensorMode

from fused_lora import patch, unpatch

WIDTH, TOKENS = 12, 5
NAMES = ("q_proj", "k_proj", "v_proj", "o_proj")


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        for name in NAMES:
            setattr(self, name, nn.Linear(WIDTH, WIDTH))

    def forward(self, x):
        return self.o_proj(torch.tanh(self.q_proj(x)) * self.k_proj(x) + self.v_proj(x))


def adapted(p=0.0):
    """A small PEFT model in training mode, b not being zero."""
    torch.manual_seed(0)
    config = LoraConfig(r=3, lora_dropout=p, target_modules=list(NAMES), init_lora_weights=False)
    return get_peft_model(Attention(), config).train()


def layers(model):
    return [getattr(model.base_model.model, name) for name in NAMES]


def an_input(dtype=torch.float32):
    return torch.randn(TOKENS, WIDTH, generator=torch.Generator().manual_seed(1), dtype=dtype)


def results(model, x):
    """Output and gradients."""
    model.zero_grad()
    y = model(x)
    y.float().square().sum().backward()
    return [y.detach(), *(one.grad.clone() for one in model.parameters() if one.requires_grad)]


def assert_close(found, expected):
    """To float32's rounding of the largest element: sums nearly cancel, and where in memory parameters lie decides how
    they are rounded."""
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=2e-6 * float(other.abs().max()))


def pickled(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("pending", [False, True])
@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
def test_a_copy_computes_with_its_own_parameters(computed, copied, pending):
    """Also one that is made when q has been asked for and k and v not yet: their outputs belong to a graph."""
    model, x = adapted(), an_input()
    patch(model)
    expected = results(model, x)
    if pending:
        layers(model)[0](x)
    other = copied(model)
    for parameter in model.parameters():
        parameter.data.zero_()
    computed.clear()
    assert_close(results(other, x), expected)
    assert computed == [3, 1]
    assert unpatch(model) == unpatch(other) == len(NAMES)
    assert_close(results(other, x), expected)
    assert len(patch(other).patched) == len(NAMES)


def test_a_copy_is_without_what_waits_and_the_model_keeps_it(computed):
    model, x = adapted(), an_input()
    patch(model)
    q, k, _, _ = layers(model)
    q(x)
    copied_k = layers(copy.deepcopy(model))[1]
    k(x)
    assert computed == [3]
    copied_k(x)
    assert computed == [3, 3]


def switched(layer):
    layer.update_layer("second", 2, 8, config=LoraConfig(r=2, init_lora_weights=False))
    layer.set_adapter("second")


def scaled(layer):
    layer.scale_layer(0.25)


def without_dropout(layer):
    layer.lora_dropout["default"].p = 0.0


@pytest.mark.parametrize("change", [switched, scaled, without_dropout])
def test_an_adapter_that_is_changed_between_siblings_is_seen(change):
    model, x = adapted(0.5), an_input()
    patch(model)
    q, k, v, _ = layers(model)
    q(x)
    for layer in (k, v):
        without_dropout(layer)
        change(layer)
    found = [k(x), v(x)]
    unpatch(model)
    assert_close(found, [k(x), v(x)])


PARTS = {
    "base": lambda layer: layer.base_layer,
    "a": lambda layer: layer.lora_A["default"],
    "b": lambda layer: layer.lora_B["default"],
    "dropout": lambda layer: layer.lora_dropout["default"],
}


class Doubled(ModelHook):
    def post_forward(self, module, output):
        return 2 * output


WATCHERS = {
    "forward pre-hook": lambda part: part.register_forward_pre_hook(lambda _, arguments: (2 * arguments[0],)),
    "forward hook": lambda part: part.register_forward_hook(lambda _, arguments, output: 2 * output),
    "backward pre-hook": lambda part: part.register_full_backward_pre_hook(lambda _, dy: (2 * dy[0],)),
    "backward hook": lambda part: part.register_full_backward_hook(lambda _, dx, dy: (2 * dx[0],)),
    "accelerate's": lambda part: add_hook_to_module(part, Doubled()),
}


@pytest.mark.parametrize("before", [True, False], ids=["before patch", "after patch"])
@pytest.mark.parametrize("watcher", list(WATCHERS))
@pytest.mark.parametrize("part", list(PARTS))
def test_a_layer_whose_parts_have_hooks_is_left_to_peft(computed, part, watcher, before):
    theirs, model, x = adapted(), adapted(), an_input().requires_grad_()
    WATCHERS[watcher](PARTS[part](layers(theirs)[1]))
    if before:
        WATCHERS[watcher](PARTS[part](layers(model)[1]))
    summary = patch(model)
    if not before:
        WATCHERS[watcher](PARTS[part](layers(model)[1]))
    assert_close(results(model, x), results(theirs, x))
    if before:
        [(name, reason)] = summary.skipped.items()
        assert name.endswith("k_proj")
        assert "has hooks" in reason
    assert computed == ([2, 1] if before else [1, 1, 1])


def test_weights_that_accelerate_offloads(computed):
    """They are on the meta device but for the time of their module's call."""
    model, x = adapted(), an_input()
    expected = model(x)
    patch(model)
    for part in (PARTS["base"], PARTS["a"]):
        add_hook_to_module(part(layers(model)[3]), AlignDevicesHook("cpu", offload=True))
    assert layers(model)[3].base_layer.weight.is_meta
    assert_close(model(x), expected)
    assert computed == [3]


def test_a_forward_that_others_replaced_stays():
    """The layer's own, before patching or after."""
    model, x = adapted(), an_input()
    expected = layers(model)[3](x)
    first, *_, last = layers(model)
    add_hook_to_module(first, Doubled())
    summary = patch(model)
    assert list(summary.skipped.values()) == ["its forward was replaced, as by accelerate's hooks"]
    add_hook_to_module(last, Doubled())
    assert_close(last(x), 2 * expected)
    assert unpatch(model) == len(NAMES) - 1
    assert_close(last(x), 2 * expected)
    remove_hook_from_module(last)
    assert_close(last(x), expected)


def test_unpatch_gives_everything_back():
    model, x = adapted(), an_input()
    before, state = results(model, x), [set(layer.__dict__) for layer in layers(model)]
    assert len(patch(model).patched) == len(NAMES)
    assert unpatch(model) == len(NAMES)
    assert [set(layer.__dict__) for layer in layers(model)] == state
    torch.testing.assert_close(results(model, x), before, rtol=0, atol=0)
    assert unpatch(model) == 0


def test_patching_twice_changes_nothing():
    model = adapted()
    patch(model)
    forwards = [layer.forward for layer in layers(model)]
    again = patch(model)
    assert (again.patched, again.groups, again.skipped) == ([], [], {})
    assert [layer.forward for layer in layers(model)] == forwards


def test_a_lora_layer_itself_is_refused():
    message = "model: expected one that contains LoRA layers, found such a layer, a Linear"
    with pytest.raises(ValueError, match=message):
        patch(layers(adapted())[0])


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("whole", [True, False], ids=["model", "adapters"])
def test_float64_is_left_to_peft(computed, whole, autocast):
    model, x = adapted(), an_input(torch.float64 if whole else torch.float32)
    for name, parameter in model.named_parameters():
        if whole or "lora_" in name:
            parameter.data = parameter.data.double()
    patch(model)
    with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
        found, _ = results(model, x), unpatch(model)
        torch.testing.assert_close(found, results(model, x), rtol=0, atol=0)
    assert computed == []


def test_an_autocast_dtype_that_the_kernels_do_not_know_is_left_to_peft(computed, monkeypatch):
    model, x = adapted(), an_input()
    expected = model(x)
    patch(model)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: True)
    monkeypatch.setattr(torch, "get_autocast_dtype", lambda device: torch.float8_e5m2)
    assert torch.equal(model(x), expected)
    assert computed == []


def test_what_a_fake_run_left_behind_does_not_meet_real_tensors(computed):
    """And the other way round."""
    model, x = adapted(0.5), an_input()
    patch(model)
    for _ in range(2):
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            fake = model(mode.from_tensor(x))
        assert fake.shape == (TOKENS, WIDTH)
        assert all(type(one) is torch.Tensor for one in results(model, x))
    assert computed == [3, 1] * 4


def test_a_linear_of_a_group_that_the_loss_does_not_use_has_zeros_as_gradients():
    """As `patch` says; PEFT has none."""
    model, x = adapted(), an_input()
    patch(model)
    q, k, v, _ = layers(model)
    outputs = [layer(x) for layer in (q, k, v)]
    outputs[0].sum().backward()
    assert [layer.lora_B["default"].weight.grad.any().item() for layer in (q, k, v)] == [True, False, False]
