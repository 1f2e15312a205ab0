"""Stages as CUDA graphs. Attention's backward pass is told to add in one order, so equal is equal in each bit."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
import torch
import triton
import triton.language as tl

from lorafusion.engine import graphs
from lorafusion.engine.graphs import StageGraphs
from lorafusion.engine.training import TrainingRun
from lorafusion.launch.launch import launch
from lorafusion.launch.spec import RunSpec
from lorafusion.planning import plan_system
from tests.engine.test_graphs import CASES, Case, assert_equal, built, executed, planned

GPU_CASES = {name: case._replace(dtype="bfloat16") for name, case in CASES.items() if case.dtype == "float64"} | {
    "one bucket": Case("bfloat16", most=1),
    "float16": Case("float16"),
    "PEFT under autocast": CASES["PEFT under autocast"],
}


@pytest.fixture(autouse=True)
def in_one_order() -> Iterator[None]:
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@triton.jit
def fill_kernel(address, words, BLOCK: tl.constexpr):
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    # No number in float32, and two in bfloat16.
    tl.store(address.to(tl.pointer_type(tl.int32)) + index, 0x7FC07FC0, mask=index < words)


def spoil(lane: dict) -> int:
    """Fill the pool of a lane's graphs with what is no number; its bytes."""
    pool = next(iter(lane.values())).replay_forward.__self__.pool()
    segments = torch.cuda.memory_snapshot(pool)
    for segment in segments:
        words = segment["total_size"] // 4
        fill_kernel[(triton.cdiv(words, 1024),)](segment["address"], words, BLOCK=1024)
    return sum(segment["total_size"] for segment in segments)


def warm(folder, case: Case, monkeypatch, captured: bool) -> TrainingRun:
    run = built(folder, case, *planned(case), device="cuda")
    with monkeypatch.context() as patch:
        if not captured:
            patch.setattr(graphs, "recorder_of", lambda device: None)
        run.warm_up()
    assert (run.graphs is not None) == captured
    return run


@pytest.mark.parametrize("name", GPU_CASES)
def test_graphs_train_what_eager_stages_train(tmp_path, monkeypatch, name):
    case = GPU_CASES[name]
    eager = executed(warm(tmp_path, case, monkeypatch, captured=False), case)
    assert_equal(executed(warm(tmp_path, case, monkeypatch, captured=True), case), eager)


def test_what_is_left_in_a_pool_is_not_read(tmp_path, monkeypatch):
    case, spoilt = GPU_CASES["one bucket"]._replace(most=3), []
    expected = executed(warm(tmp_path, case, monkeypatch, captured=True), case)
    run = warm(tmp_path, case, monkeypatch, captured=True)
    call = StageGraphs.__call__

    def spoiling(stage, batch, x):
        spoilt.extend(map(spoil, stage._free))
        return call(stage, batch, x)

    monkeypatch.setattr(StageGraphs, "__call__", spoiling)
    assert_equal(executed(run, case), expected)
    assert len(spoilt) == len(run.microbatches)
    assert min(spoilt) > 0


def test_the_memory_of_graphs_is_counted_and_given_back(tmp_path, monkeypatch):
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    run = warm(tmp_path, Case("bfloat16"), monkeypatch, captured=True)
    usage = run.graphs.usage
    assert 0 < usage.uncounted <= usage.bytes <= torch.cuda.memory_reserved() - before
    del run
    gc.collect()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() - before < usage.bytes


@pytest.mark.parametrize("ask", [torch.cuda.synchronize, lambda: torch.ones((), device="cuda").item()])
def test_a_capture_that_is_broken_off_leaves_no_trace(tmp_path, monkeypatch, ask):
    """That of the second bucket waits for its device. Torch then empties its cache and draws as before."""
    case, captures = Case("bfloat16"), []
    expected = executed(warm(tmp_path, case, monkeypatch, captured=False), case)
    run = built(tmp_path, case, *planned(case), device="cuda", needs_graphs=False)
    through = run._through

    def asking(batch, x):
        if torch.cuda.is_current_stream_capturing():
            captures.append(batch)
            if len(captures) == 2:
                ask()
        return through(batch, x)

    monkeypatch.setattr(run, "_through", asking)
    run.warm_up()
    assert run.graphs is None
    assert "capturing" in run.without_graphs
    torch.cuda.empty_cache()
    assert torch.rand(8, device="cuda").isfinite().all()
    assert_equal(executed(run, case), expected)


@pytest.mark.parametrize("arrangement", [(1, 1), (2, 1), (1, 2)])
def test_processes_train_by_graphs(tmp_path, arrangement):
    """Whole runs, beside NCCL, against those without padding and graphs: what the first step sees differs by rounding
    alone."""
    stages, replicas = arrangement
    if torch.cuda.device_count() < stages * replicas:
        pytest.skip(f"{stages * replicas} GPUs are needed, this machine has {torch.cuda.device_count()}")
    case, reports = Case("bfloat16", checkpointing=0.5), []
    workload, captured = planned(case, stages, replicas)
    eager = plan_system(workload, "lorafusion", stages=stages, capacity=96, data_parallel=replicas)
    for name, plan in (("eager", eager), ("graphs", captured)):
        folder = tmp_path / name
        folder.mkdir()
        paths = {"workload": str(folder / "workload.json"), "plan": str(folder / "plan.json")}
        (folder / "workload.json").write_text(workload.to_json())
        (folder / "plan.json").write_text(plan.to_json())
        spec = RunSpec(system="lorafusion", model="tiny", device="cuda", dtype="bfloat16", adapter_dtype="bfloat16",
                       checkpointing=0.5, **paths)  # fmt: skip
        outcome = launch(spec, stages * replicas, 300)
        assert outcome.status == "ok", outcome.note
        reports.append(outcome.report)
    assert all(part["graphs"] > 0 for part in reports[1]["graphs"])
    for job, losses in reports[0]["losses"].items():
        assert reports[1]["losses"][job][:2] == pytest.approx(losses[:2], rel=1e-2)
