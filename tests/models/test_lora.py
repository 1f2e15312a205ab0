"""LoRA kinds on a decoder layer: a gated MLP computed with its gate is the MLP that it was, and keeps less."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lorafusion.config import read_model
from lorafusion.data.packing import AdapterSegment, PackedBatch, SampleBorders
from lorafusion.models import lora
from lorafusion.models.stage import build_stage, is_gated_mlp
from lorafusion.workload import ALL_LINEAR, Job, Sample

TINY = read_model("tiny")
QWEN = TINY.model_copy(update={"architecture": "qwen2"})
TOKENS = 24


def job(index=0, modules=ALL_LINEAR, dropout=0.2):
    return Job(
        name=f"job-{index}", dataset="none", rank=4 + index, alpha=8, epochs=1, dropout=dropout, target_modules=modules,
        learning_rate=1e-4, seed=index, global_batch_size=1, samples=(Sample(0, 2),),
    )  # fmt: skip


def layer(jobs, config=TINY, dtype=torch.float64, checkpointing=False, kind=lora.fused, prepare=lambda stage: None):
    """A stage of one decoder layer with adapters that are not zero, ready to run."""
    stage = build_stage(config, index=1, count=config.num_hidden_layers, device=torch.device("cpu"), dtype=dtype,
                        seed=1, checkpointing=checkpointing)  # fmt: skip
    prepare(stage)
    active = lora.inject_adapters(stage, jobs, dtype, kind)
    for index, parameter in enumerate(one for one in stage.parameters() if one.requires_grad):
        nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(index))
    places = torch.arange(TOKENS)
    borders = SampleBorders.of((9, TOKENS - 9), places.device)
    spans = ((0, TOKENS, 0),) if len(jobs) == 1 else ((0, 9, 1), (9, TOKENS, 0))
    none = places.new_empty(0)
    segments = tuple(AdapterSegment(*span, 0) for span in spans)
    active.batch = PackedBatch(none, places[None], none, none.float(), places, borders, segments)
    return stage, active


def results(stage, active):
    """y and the gradients of x and of the adapters; and what the layer keeps for its backward pass."""
    kept = []
    x = torch.randn(1, TOKENS, TINY.hidden_size, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    x = x.to(next(stage.parameters()).dtype).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda one: kept.append(one) or one, lambda one: one):
        y = stage(x, active.batch.position_ids, active.batch.borders)
    factors = [one for one in stage.parameters() if one.requires_grad]
    return [y, *torch.autograd.grad(y.square().sum(), [x, *factors])], kept


def own_forward(stage):
    return "forward" in vars(stage.model.layers["1"].mlp)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("jobs", [(job(),), (job(), job(1, ("q_proj", "down_proj")))], ids=["one", "two"])
@pytest.mark.parametrize("config", [TINY, QWEN], ids=["llama", "qwen2"])
def test_a_gated_mlp_is_the_mlp_without_its_product(config, jobs, checkpointing, monkeypatch):
    with_gate = layer(jobs, config, checkpointing=checkpointing)
    assert own_forward(with_gate[0])
    ours, our_kept = results(*with_gate)
    monkeypatch.setattr(lora, "is_gated_mlp", lambda module: False)
    without = layer(jobs, config, checkpointing=checkpointing)
    assert not own_forward(without[0])
    expected, kept = results(*without)
    for one, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)
    if not checkpointing:
        wide = (TOKENS, TINY.intermediate_size)
        counts = [len({one.data_ptr() for one in some if one.shape[-2:] == wide}) for some in (our_kept, kept)]
        assert counts == [2, 4]  # gate and up; without: silu(gate) and the product, too


@pytest.mark.parametrize("modules", [("gate_proj", "up_proj"), ("q_proj",)])
def test_without_an_adapter_on_its_down_projection_an_mlp_stays(modules):
    assert not own_forward(layer((job(modules=modules),))[0])


def test_another_activation_stays():
    def with_tanh(stage):
        stage.model.layers["1"].mlp.act_fn = nn.Tanh()

    stage, active = layer((job(),), prepare=with_tanh)
    assert not own_forward(stage)
    ours, _ = results(stage, active)
    silu, _ = results(*layer((job(),)))
    assert not torch.allclose(ours[0], silu[0])


def test_what_a_gated_mlp_is():
    stage = build_stage(TINY, index=0, count=1, device=torch.device("cpu"), dtype=torch.float32, seed=1)
    assert sum(is_gated_mlp(module) for module in stage.modules()) == TINY.num_hidden_layers


def test_the_fused_kind_equals_peft_without_dropout():
    jobs = (job(dropout=0.0),)
    for ours, expected in zip(*(results(*layer(jobs, kind=kind))[0] for kind in (lora.fused, lora.peft)), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9)
