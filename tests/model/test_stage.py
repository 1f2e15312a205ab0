"""A stage is the Hugging Face model, cut: same logits, same weights however it is cut, only its own parameters."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from lorafusion.core.config import read_model
from lorafusion.core.schema import UserError
from lorafusion.data.packing import SampleBorders
from lorafusion.model.stage import build_stage, hf_config
from lorafusion.planning.partition import layer_range

TINY = read_model("tiny")
QWEN = TINY.model_copy(
    update={"architecture": "qwen2", "hidden_size": 48, "num_attention_heads": 3, "num_key_value_heads": 1}
)
LENGTHS = (7, 1, 12, 4)


def stages(config, count, **options):
    options = {"device": torch.device("cpu"), "dtype": torch.float32, "seed": 3} | options
    return [build_stage(config, index=index, count=count, **options) for index in range(count)]


def packed(vocab):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocab, (1, sum(LENGTHS)), generator=generator)
    position_ids = torch.cat([torch.arange(length) for length in LENGTHS])[None]
    return ids, position_ids, SampleBorders.of(LENGTHS, ids.device)


def through(parts, ids, position_ids, borders):
    x = ids
    for stage in parts:
        x = stage(x, position_ids, borders)
    return x


@pytest.mark.parametrize("config", [TINY, QWEN], ids=["llama", "qwen2"])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_stages_compute_what_transformers_computes_sample_by_sample(config, count, tmp_path):
    """Packed samples in a cut model, against each sample alone through the whole model from the same checkpoint."""
    reference_config = hf_config(config)
    reference_config._attn_implementation = "eager"
    torch.manual_seed(0)
    reference = AutoModelForCausalLM.from_config(reference_config).eval()
    reference.save_pretrained(tmp_path)
    ids, position_ids, borders = packed(config.vocab_size)
    parts = stages(config.model_copy(update={"weights": str(tmp_path)}), count)
    logits = parts[-1].lm_head(through(parts, ids, position_ids, borders))
    with torch.no_grad():
        for sample, begin in zip(ids[0].split(LENGTHS), borders.offsets, strict=False):
            alone = reference(sample[None]).logits[0]
            ours = logits[0, begin : begin + len(sample)]
            torch.testing.assert_close(ours, alone, rtol=1e-4, atol=1e-5)


def test_random_weights_do_not_depend_on_the_cut():
    whole = dict(stages(TINY, 1)[0].named_parameters())
    cut = {name: value for stage in stages(TINY, 3) for name, value in stage.named_parameters()}
    assert cut.keys() == whole.keys()
    assert all(torch.equal(cut[name], whole[name]) for name in whole)
    other = dict(stages(TINY, 1, seed=4)[0].named_parameters())
    assert not torch.equal(other["lm_head.weight"], whole["lm_head.weight"])


def test_a_stage_holds_its_own_layers_only():
    first, middle, last = stages(TINY, 3)
    assert [list(stage.model.layers) for stage in (first, middle, last)] == [["0", "1"], ["2"], ["3"]]
    assert hasattr(first.model, "embed_tokens")
    assert not hasattr(middle.model, "embed_tokens")
    assert not hasattr(first, "lm_head")
    assert last.lm_head.weight.shape == (512, 64)


def test_everything_is_frozen_and_in_the_asked_dtype_but_the_rotary_frequencies():
    stage = stages(TINY, 1, dtype=torch.bfloat16)[0]
    assert all(not parameter.requires_grad for parameter in stage.parameters())
    assert {parameter.dtype for parameter in stage.parameters()} == {torch.bfloat16}
    assert stage.rotary.inv_freq.dtype == torch.float32


def test_checkpointing_changes_nothing_but_memory():
    ids, position_ids, borders = packed(TINY.vocab_size)
    grads = []
    for checkpointing in (False, True):
        stage = stages(TINY, 1, checkpointing=checkpointing)[0]
        weight = stage.model.layers["0"].self_attn.q_proj.weight.requires_grad_()
        stage(ids, position_ids, borders).square().mean().backward()
        grads.append(weight.grad)
    assert torch.equal(*grads)


@pytest.mark.parametrize(
    ("model", "count", "sizes"),
    [("tiny", 1, [4]), ("tiny", 4, [1] * 4), ("llama-3.1-8b", 4, [9, 9, 8, 6]), ("qwen2.5-32b", 3, [22, 22, 20])],
)
def test_layers_are_split_so_that_the_slowest_stage_is_fast(model, count, sizes):
    """The head counts as layers: on Llama-3.1-8B it costs 2.4 of them."""
    config = read_model(model)
    ranges = [layer_range(config, index, count) for index in range(count)]
    assert [last - first for first, last in ranges] == sizes
    assert [first for first, _ in ranges[1:]] == [last for _, last in ranges[:-1]]
    assert (ranges[0][0], ranges[-1][1]) == (0, config.num_hidden_layers)


def test_more_stages_than_layers_is_refused():
    with pytest.raises(UserError, match="5 stages, but the model has 4 layers; each stage needs one"):
        layer_range(TINY, 0, 5)


def test_a_checkpoint_of_other_dimensions_is_refused(tmp_path):
    AutoModelForCausalLM.from_config(hf_config(QWEN)).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"has shape \(48, 48\), the model expects \(64, 64\)"):
        stages(TINY.model_copy(update={"weights": str(tmp_path)}), 1)


def test_a_folder_without_weights_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"no model\.safetensors\.index\.json and no model\.safetensors"):
        stages(TINY.model_copy(update={"weights": str(tmp_path)}), 1)


def test_a_hub_that_cannot_be_reached_is_one_line(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="^[^\n]*neither a local folder nor to be had from the hub[^\n]*$"):
        stages(TINY.model_copy(update={"weights": "nobody/nothing"}), 1)


def test_large_models_match_their_published_sizes():
    """Parameter counts of the Hugging Face model cards, without allocating anything."""
    from lorafusion.model.stage import Stage

    for name, billions in (("llama-3.1-8b", 8.03), ("qwen2.5-32b", 32.76), ("llama-3.1-70b", 70.55)):
        stage = Stage(read_model(name), 0, 1)
        assert sum(parameter.numel() for parameter in stage.parameters()) / 1e9 == pytest.approx(billions, abs=0.01)


@pytest.mark.parametrize("checkpointing", [0.0, 1.0])
@pytest.mark.parametrize(("index", "count"), [(0, 1), (0, 2), (1, 2), (0, 4)])
def test_the_first_layers_alone_do_what_all_layers_do(index, count, checkpointing):
    """As on a stage of many layers, one has no gradient for its input where that is the embedding's, and one has."""
    stage = stages(TINY, count, checkpointing=checkpointing)[index]
    layers = list(stage.model.layers.values())
    for layer in layers:
        layer.self_attn.o_proj.weight.requires_grad_()
    ids, position_ids, borders = packed(TINY.vocab_size)
    x = ids if index == 0 else torch.randn(1, sum(LENGTHS), TINY.hidden_size)
    whole = stage(x, position_ids, borders)
    seen = []
    for layer in layers:
        layer.register_forward_pre_hook(lambda layer, inputs: seen.append((layer, inputs[0].requires_grad)))
    with stage.first_layers_alone():
        stage(x if index == 0 else x.requires_grad_(), position_ids, borders).sum().backward()
    assert dict(seen) == dict(zip(layers, [index > 0, True], strict=False))
    assert torch.equal(stage(x, position_ids, borders), whole)
