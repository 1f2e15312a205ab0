"""Proposals: memory as it was measured, capacities that fit, the fastest first, and reasons where nothing does."""

from __future__ import annotations

import pandas as pd
import pytest

from lorafusion.core.config import CONFIGS, read_model
from lorafusion.core.schema import UserError
from lorafusion.data.lengths import make_workload
from lorafusion.planning.propose import WORKSPACE, largest_capacity, propose, saved_bytes, stage_bytes
from lorafusion.planning.simulator import model_costs

GIB = 1 << 30
KERNELS = CONFIGS.parent / "results" / "reference" / "nvidia-h200" / "kernels.parquet"


@pytest.fixture(scope="module")
def workload():
    return make_workload(CONFIGS / "workloads" / "mixed.yaml", samples=64, global_batch=16, seed=1)


@pytest.mark.parametrize("model", ["llama-3.1-8b", "qwen2.5-32b", "llama-3.1-70b"])
def test_saved_bytes_are_those_that_the_h200_measured(model):
    rows = pd.read_parquet(KERNELS).query(f"model == '{model}' and implementation == 'fused' and tokens == 8192")
    (measured,) = rows.query("metric == 'saved_memory' and statistic == 'median'")["value"]
    assert saved_bytes(read_model(model)) * 8192 == pytest.approx(measured, rel=0.015)


def test_weights_are_those_of_the_model(workload):
    """70.6 billion parameters of 2 bytes over four stages, and the adapters besides."""
    config = read_model("llama-3.1-70b")
    model = model_costs(config, 4)
    bytes_ = sum(stage_bytes(config, model, stage, ()) for stage in range(4))
    assert bytes_ == pytest.approx(2 * 70.55e9, rel=0.001)
    adapters = sum(stage_bytes(config, model, stage, workload.jobs) for stage in range(4)) - bytes_
    assert adapters == pytest.approx(4 * 16 * 207.1e6, rel=0.01)  # 207 million parameters at rank 16, 16 bytes each


def test_what_is_proposed_fits_and_the_fastest_comes_first(workload):
    config, memory = read_model("llama-3.1-8b"), 80 * GIB
    choices = propose(workload, config, 4, memory)
    assert {(choice.stages, choice.data_parallel) for choice in choices} == {(1, 4), (2, 2), (4, 1)}
    assert [choice.throughput for choice in choices] == sorted((c.throughput for c in choices), reverse=True)
    for choice in choices:
        assert choice.capacity <= choice.largest_capacity
        assert WORKSPACE < choice.memory < memory
        model = model_costs(config, choice.stages)
        assert choice.largest_capacity == largest_capacity(config, model, workload.jobs, memory, False)


def test_checkpointing_makes_room_and_takes_time(workload):
    config = read_model("llama-3.1-70b")
    plain, again = (propose(workload, config, 4, 141 * GIB, on)[0] for on in (False, True))
    assert again.largest_capacity > 2 * plain.largest_capacity
    assert again.throughput < plain.throughput


def test_what_does_not_fit_has_a_reason(workload):
    config = read_model("llama-3.1-70b")
    by_stages = {choice.stages: choice for choice in propose(workload, config, 4, 80 * GIB, True)}
    assert by_stages[1].reason == "the weights do not fit"
    assert not by_stages[4].reason
    with pytest.raises(UserError, match=r"1 GPUs of 80 GiB: nothing fits \(1 stages x 1: the weights do not fit\)"):
        propose(workload, config, 1, 80 * GIB)
