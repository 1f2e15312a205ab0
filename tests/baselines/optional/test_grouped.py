"""Multi-LoRA by grouped products is mLoRA's loop over the adapters, whatever their ranks and linears."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from baselines.megatron import grouped as module
from baselines.megatron.grouped import grouped, has_grouped_gemm
from baselines.mlora.lora import looped
from fused_lora import LoRABatch
from lorafusion.core.config import read_model
from lorafusion.core.workload import ALL_LINEAR, Job, Sample, Workload
from lorafusion.data.packing import AdapterSegment, PackedBatch, SampleBorders
from lorafusion.lab.checks.comparison import LOSS_TOLERANCE, WEIGHT_TOLERANCE, PlainReference
from lorafusion.lab.checks.toy_runs import EXACT, toy_jobs, train, train_plainly
from lorafusion.lab.suite import Arrangement
from lorafusion.model import lora
from lorafusion.model.stage import build_stage

TINY = read_model("tiny")
TOKENS = 31
SPANS = {
    "all": ((0, 9, 1), (9, 20, 0), (20, TOKENS, 2)),
    "one": ((0, TOKENS, 1),),
    "two": ((0, 12, 2), (12, TOKENS, 0)),
}


def job(index, rank, modules=ALL_LINEAR, dropout=0.0):
    return Job(
        name=f"job-{index}", dataset="none", rank=rank, alpha=7 + index, dropout=dropout, target_modules=modules,
        seed=index, global_batch_size=1, samples=(Sample(0, 2),),
    )  # fmt: skip


JOBS = (job(0, 4), job(1, 11, ("q_proj", "down_proj")), job(2, 8, ("v_proj", "o_proj", "gate_proj", "up_proj")))


def layer(kind, jobs=JOBS, spans="all", dtype=torch.float64, config=TINY, checkpointing=False):
    """A decoder layer with adapters that are not zero, and a microbatch of theirs."""
    stage = build_stage(config, index=1, count=config.num_hidden_layers, device=torch.device("cpu"), dtype=dtype,
                        seed=1, checkpointing=checkpointing)  # fmt: skip
    active = lora.inject_adapters(stage, jobs, dtype, kind)
    for index, parameter in enumerate(trained(stage)):
        nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(index))
    places, segments = torch.arange(TOKENS), tuple(AdapterSegment(*span, 0) for span in SPANS.get(spans, spans))
    borders, none = SampleBorders.of((9, TOKENS - 9), places.device), places.new_empty(0)
    owners = LoRABatch.of(segments, places)
    active.batch = PackedBatch(none, places[None], none, none.float(), borders, owners, segments)
    return stage, active


def trained(stage):
    return [one for one in stage.parameters() if one.requires_grad]


def results(stage, active):
    """y and the gradients of x and of the adapters; zeros where there is none."""
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(1, TOKENS, TINY.hidden_size, generator=generator, dtype=torch.float64)
    x = x.to(next(stage.parameters()).dtype).requires_grad_()
    y = stage(x, active.batch.position_ids, active.batch.borders)
    y.square().sum().backward()
    return [y, x.grad, *(torch.zeros_like(one) if one.grad is None else one.grad for one in trained(stage))]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("spans", list(SPANS))
def test_it_is_the_loop_over_the_adapters(spans, checkpointing):
    pairs = zip(
        results(*layer(grouped, spans=spans, checkpointing=checkpointing)),
        results(*layer(looped, spans=spans)),
        strict=True,
    )
    for ours, expected in pairs:
        torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_torchs_grouped_product_does_the_same_forward_and_backward(dtype, monkeypatch):
    """What a GPU computes with, here on the CPU, where torch has it, too; the loop stands beside it."""
    expected = results(*layer(grouped, dtype=dtype))
    calls = []
    monkeypatch.setattr(module, "has_grouped_gemm", lambda x, weights: calls.append(weights.shape) or True)
    found = results(*layer(grouped, dtype=dtype))
    assert len(calls) == 2 * len(ALL_LINEAR)
    assert all(size % 8 == 0 for shape in calls for size in shape[1:])
    for ours, other in zip(found, expected, strict=True):
        error = (ours.double() - other.double()).norm() / other.double().norm().clamp_min(1e-9)
        assert error < (1e-5 if dtype == torch.float32 else 2e-2)


def test_the_cpu_and_other_dtypes_have_the_loop():
    x, weights = torch.zeros(8, 16, dtype=torch.bfloat16), torch.zeros(2, 16, 8, dtype=torch.bfloat16)
    assert not has_grouped_gemm(x, weights)
    assert not has_grouped_gemm(x.float(), weights.float())


def test_each_adapter_has_its_own_dropout(monkeypatch):
    """Against dropout that is a fixed function of the rate, by linear: torch's is asked for each adapter's own rate."""
    jobs = (job(0, 4, dropout=0.25), job(1, 4, ("q_proj",), dropout=0.5), job(2, 4, ("q_proj",)))
    asked = []
    monkeypatch.setattr(module.F, "dropout", lambda x, rate: asked.append((len(x), rate)) or x * (1 - rate))
    stage, active = layer(grouped, jobs)
    results(stage, active)
    # Adapter 1 has the first 9 tokens, 0 the next 11, 2 the others, without dropout; on q_proj all of them are.
    assert asked.count((9, 0.5)) == 1
    assert asked.count((11, 0.25)) == len(ALL_LINEAR)
    assert len(asked) == 1 + len(ALL_LINEAR)
    asked.clear()
    stage.eval()
    results(stage, active)
    assert asked == []


def test_equal_rates_are_one_dropout_of_all_tokens(monkeypatch):
    asked = []
    monkeypatch.setattr(module.F, "dropout", lambda x, rate: asked.append((len(x), rate)) or x)
    results(*layer(grouped, tuple(job(index, 4, dropout=0.1) for index in range(3))))
    assert asked == [(TOKENS, 0.1)] * len(ALL_LINEAR)


def test_tokens_without_a_segment_are_refused():
    with pytest.raises(ValueError, match="expected segments end to end over 31 tokens"):
        results(*layer(grouped, spans=((0, 9, 1), (12, TOKENS, 0))))


@pytest.mark.usefixtures("forked_runs")
@pytest.mark.parametrize("arrangement", ["1x1", "2x1"])
def test_the_system_trains_what_plain_training_trains(arrangement):
    jobs = toy_jobs(dropout=0.0)
    found = train(Workload(name="toy", jobs=jobs), "grouped-mm", Arrangement.read(arrangement))
    plain = train_plainly(jobs, EXACT, "float64")
    loss, weight = PlainReference(plain, None).errors(found, jobs)
    assert loss <= LOSS_TOLERANCE
    assert weight <= WEIGHT_TOLERANCE
