"""LoRA kinds on a decoder layer: a gated MLP computed with its gate is the MLP that it was, and keeps less; and the
adapters of the kind `fused` are views of stacks."""

from __future__ import annotations

import json
import os
import stat
from dataclasses import replace

import pytest
import torch
from peft import get_peft_model_state_dict
from torch import nn

from baselines.mlora.lora import looped
from fused_lora import LoRABatch
from lorafusion.core.config import read_model
from lorafusion.core.workload import ALL_LINEAR, Job, Sample
from lorafusion.data.packing import AdapterSegment, PackedBatch, SampleBorders
from lorafusion.model import lora
from lorafusion.model.stage import build_stage, is_gated_mlp

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
    for index, parameter in enumerate(trained(stage)):
        nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(index))
    places = torch.arange(TOKENS)
    borders = SampleBorders.of((9, TOKENS - 9), places.device)
    spans = ((0, TOKENS, 0),) if len(jobs) == 1 else ((0, 9, 1), (9, TOKENS, 0))
    none = places.new_empty(0)
    segments = tuple(AdapterSegment(*span, 0) for span in spans)
    active.batch = PackedBatch(
        none, places[None], none, none.float(), borders, LoRABatch.of(segments, places), segments
    )
    return stage, active


def results(stage, active):
    """y and the gradients of x and of the adapters; and what the layer keeps for its backward pass."""
    kept = []
    x = torch.randn(1, TOKENS, TINY.hidden_size, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    x = x.to(next(stage.parameters()).dtype).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda one: kept.append(one) or one, lambda one: one):
        y = stage(x, active.batch.position_ids, active.batch.borders)
    for one in trained(stage):
        if one.grad is not None:
            one.grad.zero_()
    y.square().sum().backward()
    return [y, x.grad, *(one.grad.clone() for one in trained(stage))], kept


def trained(stage):
    return [one for one in stage.parameters() if one.requires_grad]


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


TWO = (job(), job(1, ("q_proj", "v_proj", "down_proj")))


def memory(tensors):
    return {one.untyped_storage().data_ptr() for one in tensors}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_adapters_are_views_of_stacks_whose_gradients_stay_where_they_are(checkpointing):
    stage, active = layer(TWO, checkpointing=checkpointing)
    assert len(active.stacks) == 4  # q, k and v; o; gate and up; down
    leaves = [leaf for stack in active.stacks for leaf in (stack.a, stack.b)]
    assert memory(trained(stage)) == memory(leaves)
    assert memory(one.grad for one in trained(stage)) == memory(one.grad for one in leaves)
    assert not any(one.grad.any() for one in trained(stage))
    before = [one.grad.data_ptr() for one in trained(stage)]
    x = torch.randn(1, TOKENS, TINY.hidden_size, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    once = results(stage, active)[0][2:]
    stage(x, active.batch.position_ids, active.batch.borders).square().sum().backward()
    assert [one.grad.data_ptr() for one in trained(stage)] == before
    assert memory(one.grad for one in leaves) == memory(one.grad for one in trained(stage))
    for parameter, gradient in zip(trained(stage), once, strict=True):
        assert gradient.any()
        assert torch.equal(parameter.grad, 2 * gradient)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_several_adapters_equal_mloras_one_after_another(checkpointing):
    """Without dropout, which is another there; two steps, so that what optimizers change is what is computed with."""
    jobs = tuple(job(index, one.target_modules, dropout=0.0) for index, one in enumerate(TWO))
    ends = []
    for kind in (lora.fused, looped):
        stage, active = layer(jobs, kind=kind, checkpointing=checkpointing)
        optimizers = [
            torch.optim.AdamW(lora.named_adapter_parameters(stage, one).values(), lr=0.01, fused=True) for one in jobs
        ]
        steps = []
        for _ in range(3):
            steps.append(results(stage, active)[0])
            for optimizer in optimizers:
                optimizer.step()
        assert not torch.allclose(steps[0][0], steps[2][0])
        ends.append([*sum(steps, []), *(one.detach() for one in trained(stage))])
    for ours, expected in zip(*ends, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-8, atol=1e-8)


def test_a_microbatch_names_jobs_and_those_without_tokens_get_zeros():
    stage, active = layer(TWO)
    segments = (AdapterSegment(3, TOKENS, 1, 0),)
    active.batch = replace(active.batch, segments=segments, lora=LoRABatch.of(segments, active.batch.positions))
    assert [(one.start, one.stop, one.adapter) for one in active.batch.lora.segments()] == [(3, TOKENS, 1)]
    results(stage, active)
    grown = [any(one.grad.any() for one in lora.named_adapter_parameters(stage, one).values()) for one in TWO]
    assert grown == [False, True]


def test_the_state_of_an_adapter_is_a_copy_of_what_it_is_now():
    stage, _ = layer(TWO)
    with torch.no_grad():
        for parameter in trained(stage):
            parameter.mul_(2.0)
    for one in TWO:
        kept = {name: value.clone() for name, value in lora.named_adapter_parameters(stage, one).items()}
        state = lora.adapter_state(stage, one)
        assert state.keys() == kept.keys()
        assert all(torch.equal(state[name], kept[name]) for name in kept)
        peft = get_peft_model_state_dict(stage, adapter_name=one.name)
        assert all(torch.equal(value, state[f"base_model.model.{name}"]) for name, value in peft.items())
        with torch.no_grad():
            next(iter(lora.named_adapter_parameters(stage, one).values())).zero_()
        assert all(torch.equal(state[name], kept[name]) for name in kept)
        # Sent to another process, it takes nothing else of its stack along.
        assert all(value.untyped_storage().nbytes() == value.nbytes for value in state.values())


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077])
def test_a_saved_adapter_is_the_same_from_each_process_and_for_those_to_read_that_may(tmp_path, mask):
    """A set of strings has another order in each process; safetensors makes files that only their owner can read."""
    before = os.umask(mask)
    lora.save_adapter(lora.peft_config(job()), {"x": torch.zeros(1)}, tmp_path)
    os.umask(before)
    config, weights = tmp_path / "adapter_config.json", tmp_path / "adapter_model.safetensors"
    assert json.loads(config.read_text())["target_modules"] == sorted(ALL_LINEAR)
    assert [stat.S_IMODE(path.stat().st_mode) for path in (config, weights)] == [0o666 & ~mask] * 2
