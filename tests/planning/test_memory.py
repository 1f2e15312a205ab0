"""Memory as it was measured, capacities that fit, and the reason where nothing does."""

from __future__ import annotations

import re

import pandas as pd
import pytest

from lorafusion.core.config import CONFIGS, read_model
from lorafusion.data.lengths import make_workload
from lorafusion.planning.memory import ADAPTER_BYTES, GIB, WORKSPACE, PipelineMemory, saved_bytes
from lorafusion.planning.simulator import model_costs
from lorafusion.planning.simulator.costs import adapter_parameters

KERNELS = CONFIGS.parent / "results" / "reference" / "nvidia-h200" / "kernels.parquet"


def memory_of(name: str, stages: int, gib: float, checkpointing: bool = False) -> PipelineMemory:
    config = read_model(name)
    return PipelineMemory(config, model_costs(config, stages), int(gib * GIB), checkpointing)


@pytest.mark.parametrize("model", ["llama-3.1-8b", "qwen2.5-32b", "llama-3.1-70b"])
def test_saved_bytes_are_those_that_the_h200_measured(model):
    rows = pd.read_parquet(KERNELS).query(f"model == '{model}' and implementation == 'fused' and tokens == 8192")
    (measured,) = rows.query("metric == 'saved_memory' and statistic == 'median'")["value"]
    assert saved_bytes(read_model(model)) * 8192 == pytest.approx(measured, rel=0.015)


def test_weights_and_adapters_are_those_of_the_model():
    """70.6 billion parameters of 2 bytes over four stages, and adapters of rank 16 besides."""
    memory = memory_of("llama-3.1-70b", 4, 80)
    assert sum(memory.weights(stage) for stage in range(4)) == pytest.approx(2 * 70.55e9, rel=0.001)
    for merged, parameters in ((False, 207.1e6), (True, 80 * 16 * 145_408)):
        (job, *_) = make_workload(
            CONFIGS / "workloads" / "xsum.yaml", samples=4, global_batch=4, merged_qkv=merged
        ).jobs
        in_a_layer = adapter_parameters(memory.config, job)
        assert 80 * in_a_layer == pytest.approx(parameters, rel=0.001)
    states = sum(memory.used(in_a_layer, 0, stage) - memory.used(0, 0, stage) for stage in range(4))
    assert states == ADAPTER_BYTES * 80 * in_a_layer


def test_logits_take_memory_where_there_are_labels(make_job):
    whole, less = (memory_of("llama-3.1-8b", 2, 80)._replace(labels=share) for share in (1.0, 0.25))
    assert less.token(0) == whole.token(0)
    assert whole.token(1) - less.token(1) == 0.75 * 12 * 128256
    lengths = (100, 20, 30)
    assert make_job("a", lengths).most_labels == 1.0
    assert make_job("a", lengths, prompt=0.9).most_labels == pytest.approx(0.1)
    assert make_job("a", (*lengths, 2), prompt=0.9).most_labels == 0.5


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("stages", [2, 4, 8])
def test_a_capacity_is_the_largest_that_fits(stages, checkpointing):
    memory = memory_of("llama-3.1-70b", stages, 141, checkpointing)
    capacity = memory.capacity(1_000_000)
    if capacity < 1:
        return
    assert WORKSPACE < memory.most_used(1_000_000, capacity) <= 0.94 * memory.memory
    assert memory.most_used(1_000_000, capacity + 256) > 0.94 * memory.memory
    # And the other way round: beside it there is room for these adapters, and for hardly more.
    room = memory.parameters(capacity)
    assert room >= 1_000_000
    assert memory.capacity(room) == capacity > memory.capacity(int(room * 1.01) + 1)


@pytest.mark.parametrize(
    ("gib", "parameters", "longest", "reason"),
    [
        (12, 0, 2048, "the weights do not fit: 15.0 GiB"),
        (17, 0, 2048, r"the weights fit \(15.0 GiB\), 2 GiB of workspace do not"),
        (24, 0, 8192, "holds 1024 tokens even without adapters, a sample has 8192"),
        (80, 200_000_000, 2048, "an adapter's states do not fit beside the weights: 95.4 GiB"),
        (80, 110_000_000, 4096, r"an adapter's states \(52.5 GiB\) leave room for 1024 tokens, not for 4096"),
        (80, 1_000_000, 4096, ""),
    ],
)
def test_the_reason_is_what_does_not_fit(gib, parameters, longest, reason):
    assert re.fullmatch(reason, memory_of("llama-3.1-8b", 1, gib).reason(parameters, longest))


def test_graphs_compute_layers_again_in_a_pool_of_each_microbatch_in_flight():
    eager = memory_of("llama-3.1-70b", 4, 141, checkpointing=True)
    captured = eager._replace(model=eager.model.captured())
    more = [captured.token(stage) - eager.token(stage) for stage in range(4)]
    assert more == pytest.approx([pools * saved_bytes(eager.config) for pools in (3, 2, 1, 0)])
    whole = eager._replace(checkpointing=False)
    assert whole.token(0) == whole._replace(model=captured.model).token(0)
