"""A PEFT model with the kernels under it computes what PEFT computes, is trained and saved as before."""

from __future__ import annotations

import copy
from contextlib import contextmanager

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import fused_lora.peft as fused
from fused_lora import LoRABatch, keep_mask, mask_key, patch, unpatch

POSITION = 2**40 + 17
LAYERS, TOKENS = 2, 9
ATTENTION, MLP = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
IDS = torch.randint(64, (2, TOKENS), generator=torch.Generator().manual_seed(3))


def base_model(dtype=torch.float32, **settings):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 56, "num_attention_heads": 4, "num_key_value_heads": 2}
    sizes |= {"num_hidden_layers": LAYERS, "vocab_size": 64, "max_position_embeddings": 64}
    return LlamaForCausalLM(LlamaConfig(**(sizes | settings))).to(dtype)


def with_adapter(model, p=0.0, seed=1, **settings):
    """The model with PEFT's adapter on all linears of all layers, b not being zero; in training mode."""
    settings = {"r": 4, "lora_alpha": 8, "target_modules": [*ATTENTION, *MLP]} | settings
    model = get_peft_model(model, LoraConfig(lora_dropout=p, task_type="CAUSAL_LM", **settings))
    randomise(model, seed)
    return model.train()


def randomise(model, seed):
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter.data, std=0.1, generator=generator)


def lora_layers(model):
    return {name: layer for name, layer in model.named_modules() if hasattr(layer, "lora_dropout")}


def step(model, seed=5, **arguments):
    """Loss, and gradients by name."""
    model.zero_grad()
    torch.manual_seed(seed)
    loss = model(input_ids=IDS, labels=IDS, **arguments).loss
    loss.backward()
    return {"loss": loss.detach()} | {
        name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None
    }


def assert_same(found, expected, tolerance=2e-6):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        scale = value.abs().max().item()
        torch.testing.assert_close(found[name], value, rtol=0, atol=tolerance * max(scale, 1e-3), msg=name)


class OurDropout(nn.Module):
    """Takes the place of PEFT's dropout, with the mask that the kernels draw."""

    def __init__(self, name, p):
        super().__init__()
        self.key, self.p = mask_key(0, 0, name), p

    def forward(self, x):
        tokens = x.numel() // x.shape[-1]
        mask = keep_mask(self.key, POSITION + torch.arange(tokens), x.shape[-1], self.p)
        return x * mask.view(x.shape) / (1 - self.p)


@contextmanager
def fixed_position():
    with pytest.MonkeyPatch.context() as monkeypatch:
        position = torch.tensor([POSITION])
        whole = lambda x: LoRABatch.single(x.numel() // x.shape[-1], position)  # noqa: E731
        monkeypatch.setattr(fused, "whole_batch", whole)
        yield


@pytest.mark.parametrize("group", [True, False])
@pytest.mark.parametrize("p", [0.0, 0.1, 0.6])
@pytest.mark.parametrize("biases", [True, False])
def test_loss_and_gradients_are_pefts(computed, p, group, biases):
    model = with_adapter(base_model(attention_bias=biases, mlp_bias=biases), p)
    ours = copy.deepcopy(model)
    if p:
        for name, layer in lora_layers(model).items():
            layer.lora_dropout["default"] = OurDropout(name, p)
    patch(ours, group=group)
    with fixed_position():
        found = step(ours)
    assert sorted(computed) == ([1] * 2 + [1] * 2 + [2] * 2 + [3] * 2 if group else [1] * 14)
    assert_same(found, step(model))
    assert len(found) == 1 + 2 * 7 * LAYERS


@pytest.mark.parametrize("settings", [{"use_rslora": True}, {"rank_pattern": {"k_proj": 9, "v_proj": 1}}])
def test_other_scalings_and_ranks(settings):
    model = with_adapter(base_model(), **settings)
    expected = step(model)
    patch(model)
    assert_same(step(model), expected)


def test_the_dropout_is_new_at_each_step_and_obeys_the_seed():
    model = with_adapter(base_model(), 0.5)
    patch(model)
    losses = [step(model, seed)["loss"].item() for seed in (1, 2, 1)]
    assert losses[0] == losses[2] != losses[1]


def test_the_mean_over_masks_is_pefts_mean():
    model = with_adapter(base_model(), 0.5)

    @torch.no_grad()
    def mean():
        losses = torch.stack([model(input_ids=IDS, labels=IDS).loss for _ in range(100)])
        return losses.mean(), losses.std() / len(losses) ** 0.5

    theirs, their_deviation = mean()
    patch(model)
    ours, our_deviation = mean()
    assert abs(ours - theirs) < 4 * (our_deviation**2 + their_deviation**2) ** 0.5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_adapters_in_float32_of_a_model_in_16_bits(dtype):
    """As PEFT makes them. Products are then in the model's dtype, PEFT's in float32: equal but for its rounding."""
    model = with_adapter(base_model(dtype))
    assert {layer.lora_A["default"].weight.dtype for layer in lora_layers(model).values()} == {torch.float32}
    expected = step(model)
    patch(model)
    found = step(model)
    assert {name: one.dtype for name, one in found.items()} == {name: one.dtype for name, one in expected.items()}
    assert_same(found, expected, tolerance=0.05)


def test_autocast(computed):
    model = with_adapter(base_model())
    exact = step(model)
    with torch.autocast("cpu", torch.bfloat16):
        theirs = step(model)
        patch(model)
        ours = step(model)
    assert len(computed) == 8
    for name, expected in exact.items():
        error, allowed = ((one[name] - expected).square().mean().sqrt() for one in (ours, theirs))
        assert error <= 2 * allowed + 1e-3 * expected.square().mean().sqrt(), name


def merged(model):
    model.merge_adapter()


def disabled(model):
    model.base_model.disable_adapter_layers()


def evaluated(model):
    model.eval()


def two_active(model):
    model.add_adapter("second", LoraConfig(r=3, target_modules=[*ATTENTION, *MLP]))
    randomise(model, 4)
    model.base_model.set_adapter(["default", "second"])


def base_trained(model):
    for layer in lora_layers(model).values():
        layer.base_layer.weight.requires_grad_()


def dropout_of_another_kind(model):
    for layer in lora_layers(model).values():
        layer.lora_dropout["default"] = nn.LeakyReLU(0.5)


def everything_dropped(model):
    for layer in lora_layers(model).values():
        layer.lora_dropout["default"] = nn.Dropout(1.0)


CHANGES = [merged, disabled, evaluated, two_active, base_trained, dropout_of_another_kind, everything_dropped]


@pytest.mark.parametrize("change", CHANGES)
def test_what_the_kernels_do_not_do_is_left_to_peft(computed, change):
    """Decided at each call, not when patched."""
    model = with_adapter(base_model())
    patch(model)
    change(model)
    found, _ = outputs(model), unpatch(model)
    assert torch.equal(found, outputs(model))
    assert computed == []


@pytest.mark.parametrize(
    ("settings", "skipped"),
    [({"use_dora": True}, 14), ({"lora_bias": True}, 0), ({"bias": "all"}, 0)],
    ids=["DoRA", "lora_bias", "trained biases"],
)
def test_adapters_of_other_forms_are_left_to_peft(computed, settings, skipped):
    model = with_adapter(base_model(attention_bias=True, mlp_bias=True), **settings)
    expected = step(model)
    summary = patch(model)
    assert (len(summary.patched), len(summary.skipped)) == (14 - skipped, skipped)
    assert_same(step(model), expected, tolerance=0)
    assert computed == []


def outputs(model, **arguments):
    return model(input_ids=IDS, **arguments).logits.detach()


def test_adapter_names_are_left_to_peft(computed):
    model = with_adapter(base_model())
    two_active(model)
    model.base_model.set_adapter("default")
    patch(model)
    names = ["default", "second"]
    layer, x = model.base_model.model.model.layers[0].self_attn.q_proj, torch.randn(2, 5, 32)
    mixed, alone = layer(x, adapter_names=names), layer(x)
    assert computed == [3]
    torch.testing.assert_close(mixed[0], alone[0])
    assert not torch.allclose(mixed[1], alone[1])
    whole = outputs(model.eval(), adapter_names=names)
    unpatch(model)
    assert torch.equal(whole, outputs(model, adapter_names=names))


def test_merging_and_disabling_for_a_while(computed):
    model = with_adapter(base_model())
    before, with_it = step(model), outputs(model)
    patch(model)
    model.merge_adapter()
    model.unmerge_adapter()
    with model.disable_adapter():
        assert not torch.allclose(outputs(model), with_it)
    assert computed == []
    assert_same(step(model), before, tolerance=1e-4)  # the weight was rounded
    assert len(computed) == 4 * LAYERS


def test_another_adapter_and_another_scaling_are_seen(computed):
    """Of a patched model they may change at any time."""
    model = with_adapter(base_model())
    patch(model)
    step(model)
    model.add_adapter("second", LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "up_proj"]))
    randomise(model, 9)
    model.set_adapter("second")
    model.train()
    for name, layer in lora_layers(model).items():
        if name.endswith("q_proj"):
            layer.scale_layer(0.5)
    computed.clear()
    found = step(model)
    assert computed == [1] * 2 * LAYERS  # the siblings have no second adapter
    unpatch(model)
    assert_same(found, step(model))


def test_a_dropout_that_is_turned_off_is_seen():
    model = with_adapter(base_model(), 0.5)
    patch(model)
    step(model)
    for layer in lora_layers(model).values():
        layer.lora_dropout["default"].p = 0.0
    found = step(model)
    unpatch(model)
    assert_same(found, step(model))


def test_the_summary():
    model = with_adapter(base_model(), target_modules=[*ATTENTION, *MLP, "embed_tokens", "lm_head"])
    summary = patch(model)
    assert len(summary.patched) == 7 * LAYERS + 1
    assert [[name.split(".")[-1] for name in names] for names in summary.groups] == [
        ["q_proj", "k_proj", "v_proj"], ["gate_proj", "up_proj"]
    ] * LAYERS  # fmt: skip
    assert list(summary.skipped) == ["base_model.model.model.embed_tokens"]
    assert str(summary).splitlines() == [
        "fused_lora: 15 LoRA linears patched, 10 of them in 4 groups that share their input; 1 left to PEFT",
        "  1 x peft.tuners.lora.layer.Embedding is no plain LoRA linear",
    ]
    assert patch(with_adapter(base_model()), group=False).groups == []


def test_siblings_that_have_no_adapter_are_no_group(computed):
    model = with_adapter(base_model(), target_modules=["q_proj", "v_proj", "gate_proj"])
    expected = step(model)
    assert [len(names) for names in patch(model).groups] == [2] * LAYERS
    assert_same(step(model), expected)
    assert sorted(computed) == [1, 1, 2, 2]


def test_a_trained_adapter_is_saved_and_loaded_as_pefts(tmp_path):
    model = with_adapter(base_model(), 0.1)
    patch(model)
    before = {name: one.clone() for name, one in model.state_dict().items()}
    train(model, 3)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base_model(), tmp_path)
    theirs, ours = loaded.state_dict(), model.state_dict()
    assert theirs.keys() == ours.keys() == before.keys()
    for name, value in theirs.items():
        assert torch.equal(value, ours[name])
        assert torch.equal(value, before[name]) != ("lora_" in name)
    assert torch.equal(outputs(loaded.eval()), outputs(model.eval()))


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("p", [0.0, 0.4])
def test_gradient_checkpointing_gives_the_same_gradients(computed, p, use_reentrant):
    model = with_adapter(base_model(), p)
    model.enable_input_require_grads()
    patch(model)
    expected = step(model)
    once = computed.copy()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    assert_same(step(model), expected, tolerance=0)
    assert len(computed) == 3 * len(once)


def test_compiled_without_graph_breaks():
    torch.compiler.reset()
    model = with_adapter(base_model(num_hidden_layers=1))
    expected = step(model)
    patch(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    found = step(compiled)
    assert_same({name.removeprefix("_orig_mod."): one for name, one in found.items()}, expected)


def train(model, steps):
    """Losses of steps of AdamW on one batch."""
    torch.manual_seed(8)
    optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=2e-2)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_training_converges_as_with_peft():
    """Without dropout the same losses, with it similar ones: the masks are others."""
    finals = {}
    for p in (0.0, 0.1):
        theirs, model = (with_adapter(base_model(initializer_range=0.2), p, r=8) for _ in range(2))
        patch(model)
        finals[p] = train(model, 30), train(theirs, 30)
    ours, expected = finals[0.0]
    assert ours == pytest.approx(expected, rel=1e-3)
    ours, expected = finals[0.1]
    assert ours[-1] < 0.2 * ours[0]
    assert sum(ours[-5:]) == pytest.approx(sum(expected[-5:]), rel=0.3)
