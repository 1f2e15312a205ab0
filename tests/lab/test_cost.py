"""What a run costs besides time: counted once its clock has stopped, without a trace in it and without losing it."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lorafusion.core.config import read_model, read_systems
from lorafusion.core.plan import Plan
from lorafusion.core.plugins import load
from lorafusion.core.workload import Workload
from lorafusion.engine.build import build_run
from lorafusion.engine.process import WorkerProcess
from lorafusion.engine.timed import losses_by_job, report_of, timed
from lorafusion.lab import cost, profiler
from lorafusion.lab.checks.toy_runs import toy_jobs
from lorafusion.lab.experiments.end_to_end import TRAIN_WITH_COST
from lorafusion.lab.operators import Counting, by_class, product_dtypes
from lorafusion.lab.profiler import Span
from lorafusion.lab.table.result import cost_metrics, result_of
from lorafusion.lab.table.vocabulary import METRICS
from lorafusion.launch.heartbeat import Position
from lorafusion.launch.launch import launch
from lorafusion.launch.outcome import Outcome
from lorafusion.launch.spec import RunSpec
from lorafusion.model.stage import build_stage
from lorafusion.planning import plan_system
from lorafusion.planning.buckets import with_buckets
from tests.engine.recorded import graphs_on_a_cpu

TOY = Workload(name="toy", jobs=toy_jobs())


def spec_of(folder: Path, system: str = "lorafusion", stages: int = 1, **changes) -> RunSpec:
    plan = plan_system(TOY, system, stages=stages, capacity=96)
    (folder / "workload.json").write_text(TOY.to_json())
    (folder / "plan.json").write_text(plan.to_json())
    return RunSpec(system=system, model="tiny", workload=str(folder / "workload.json"), task=TRAIN_WITH_COST,
                   plan=str(folder / "plan.json"), **changes)  # fmt: skip


@pytest.fixture
def over(tmp_path):
    """A run that is over, and its executor."""
    spec = spec_of(tmp_path)
    run = build_run(WorkerProcess(spec, torch.device("cpu"), Position(tmp_path, 0)), TOY, Plan.read(spec.plan))
    execute = load(read_systems()["lorafusion"].executor, "executor")
    timed(run, execute)
    return run, execute


def test_the_cost_leaves_no_trace_in_a_run(over):
    run, execute = over
    report, weights = report_of(run), [one.detach().clone() for one in trained_parameters(run)]
    found = cost.cost_of(run, execute)
    assert all(torch.equal(one, before) for one, before in zip(trained_parameters(run), weights, strict=True))
    assert report["losses"] == losses_by_job(TOY, run.plan, run.record.losses)
    assert found["dtypes"] == {"model": "float32", "adapters": "float32", "gradients": "float32", "moments": "float32",
                               "autocast": None}  # fmt: skip
    assert (found["layers"], found["recomputed_layers"], found["liger"]) == (4, 0, False)
    assert 0 < found["tokens"] <= TOY.tokens
    assert found["counts"].keys() == {"operators"}


def trained_parameters(run):
    return [parameter for parameter in run.stage.parameters() if parameter.requires_grad]


def test_what_is_counted_is_what_runs_while_the_clock_does(over, monkeypatch):
    """Forward and backward passes and steps of the part, not what is around them."""
    run, execute = over
    monkeypatch.setitem(cost.TOKENS, "cpu", 10**6)
    plan, seen = run.plan, []
    monkeypatch.setattr(cost.operators, "Counting", lambda note: noting(note, seen))
    found = cost.cost_of(run, execute)
    assert found["tokens"] == TOY.tokens
    assert found["part"] == f"the first {len(plan.microbatches)} of {len(plan.microbatches)} microbatches"
    assert found["counts"]["operators"] == len(seen)
    counts = by_class(seen)
    assert counts["loss"].operators == 4 * len(plan.microbatches)
    steps = sum(len(job.batches) for job in TOY.jobs)
    assert sum(one.name == "_fused_adamw_" for one in seen) == steps


def noting(note, seen):
    def both(operation):
        seen.append(operation)
        note(operation)

    return Counting(both)


@pytest.mark.parametrize("tokens", [1, 100, 10**6])
@pytest.mark.parametrize("system", ["lorafusion", "mlora", "fused-sequential"])
def test_the_part_is_the_shortest_beginning_that_ends_at_a_step(system, tokens):
    plan = plan_system(TOY, system, stages=2, capacity=96)
    part = cost.beginning(plan, tokens)
    taken = len(part.microbatches)
    assert part.microbatches == plan.microbatches[:taken]
    assert part.statistics.tokens == sum(one.tokens for one in part.microbatches)
    assert part.statistics.tokens >= tokens or taken == len(plan.microbatches)
    assert part.microbatches[-1].step_after or taken == len(plan.microbatches)
    for shorter in range(1, taken):
        before = plan.microbatches[:shorter]
        assert not before[-1].step_after or sum(one.tokens for one in before) < tokens


def test_a_run_says_what_it_costs(tmp_path):
    """Of two stages: all layers, all operators of both processes."""
    from tests import forked

    spec = spec_of(tmp_path, "mlora", stages=2)
    outcome = forked.launch(spec, 2, 120)
    assert outcome.status == "ok", outcome.note
    assert outcome.report["cost"]["layers"] == 4
    result = result_of(outcome, TOY, Plan.read(spec.plan), {}, {})
    assert result["cost"] == outcome.report["cost"]
    (found,) = [one for one in result["metrics"] if one["metric"] == "operators"]
    counts = outcome.report["cost"]
    assert found["value"] == pytest.approx(1000 * counts["counts"]["operators"] / counts["tokens"])


def test_the_frozen_model_is_timed_in_the_same_process(tmp_path):
    for system, expected in (("lorafusion", True), ("mlora", False)):
        spec = spec_of(tmp_path, system)
        report = cost.train_with_cost(WorkerProcess(spec, torch.device("cpu"), Position(tmp_path, 0)))
        metrics = {item["metric"]: item for item in result_of(Outcome("ok", report=report), TOY, Plan.read(spec.plan),
                                                              {}, {})["metrics"]}  # fmt: skip
        assert bool(report["frozen"]) == ("frozen_throughput" in metrics) == expected
        if expected:
            assert metrics["frozen_throughput"]["value"] > 0
            assert metrics["frozen_throughput"]["note"].startswith("the first ")


def test_a_stage_without_adapters_is_the_base_model(over):
    """Its backward pass goes through all layers; the adapters, which are trained, get no gradient."""
    run, _ = over
    config, plain = (
        read_model("tiny"),
        {"device": torch.device("cpu"), "dtype": torch.float32, "seed": RunSpec.model_fields["seed"].default},
    )
    base = build_stage(config, index=0, count=1, **plain)
    batch = run._built(run.plan.microbatches[0])
    with_adapters = run._through(batch, None)
    cost.remove_adapters(run.stage)
    hidden = run.stage(batch.input_ids, batch.position_ids, batch.borders)
    assert torch.equal(hidden, base(batch.input_ids, batch.position_ids, batch.borders))
    assert not torch.equal(run._through(batch, None), with_adapters)
    hidden.sum().backward()
    assert not any(parameter.grad.any() for parameter in trained_parameters(run))


def test_the_frozen_model_replays_graphs_as_the_run_does(tmp_path):
    plan = with_buckets(plan_system(TOY, "lorafusion", stages=1, capacity=96), TOY, tile=16)
    run = build_run(WorkerProcess(spec_of(tmp_path), torch.device("cpu"), Position(tmp_path, 0)), TOY, plan)
    execute = load(read_systems()["lorafusion"].executor, "executor")
    with graphs_on_a_cpu() as recorder:
        timed(run, execute)
        captured = recorder.captured
        assert cost.frozen_rate(run, execute)["throughput"] > 0
    assert captured < recorder.captured <= 2 * captured


def test_an_extra_copy_shows(over, monkeypatch):
    run, execute = over
    monkeypatch.setitem(cost.TOKENS, "cpu", 10**6)
    adapters = list(run.adapters)
    before = cost.cost_of(run, execute)["counts"]["operators"]
    run.adapters = adapters
    forward = run.stage.model.norm.forward
    run.stage.model.norm.forward = lambda x: forward(x.clone())
    assert cost.cost_of(run, execute)["counts"]["operators"] == before + len(run.plan.microbatches)


def test_a_cost_that_cannot_be_known_does_not_take_the_time_with_it(tmp_path, monkeypatch):
    spec = spec_of(tmp_path)
    monkeypatch.setattr(cost, "measured", raising(torch.OutOfMemoryError("CUDA out of memory.\nTried 3 GiB")))
    report = cost.train_with_cost(WorkerProcess(spec, torch.device("cpu"), Position(tmp_path, 0)))
    assert report["cost"] == {"unknown": "CUDA out of memory. Tried 3 GiB"}
    result = result_of(Outcome("ok", report=report), TOY, Plan.read(spec.plan), {}, {})
    assert result["status"] == "ok"
    assert result["note"] == "the cost is unknown: CUDA out of memory. Tried 3 GiB"
    assert {"throughput", "time"} <= {one["metric"] for one in result["metrics"]}
    assert not {"operators", "kernels"} & {one["metric"] for one in result["metrics"]}


@pytest.mark.parametrize("error", [None, RuntimeError("no profiler")])
def test_patience_has_an_end_when_the_work_has(monkeypatch, error):
    """Else it would end a process that has long gone on."""
    calls = []
    monkeypatch.setattr(cost.faulthandler, "dump_traceback_later", lambda *given, **more: calls.append((given, more)))
    monkeypatch.setattr(cost.faulthandler, "cancel_dump_traceback_later", lambda: calls.append("cancelled"))
    with contextlib.suppress(RuntimeError), cost.patience(3.0):
        calls.append("work")
        if error:
            raise error
    assert calls == [((3.0,), {"exit": True}), "work", "cancelled"]


def raising(error):
    def fail(*_):
        raise error

    return fail


class Ended:
    """Processes that left these files and ended with this code."""

    def __init__(self, files: dict[str, dict], code: int | None) -> None:
        self.files, self.code = files, code

    def __call__(self, processes, nodes, arguments, log):
        for name, content in self.files.items():
            (Path(arguments[1]) / name).write_text(json.dumps(content))
        return self

    def wait(self, seconds: float) -> int | None:
        return self.code

    def end(self) -> None:
        pass


FAILED = {"failure-1.json": {"status": "oom", "message": "rank 1, the cost of the run: no memory"}}
REPORT = {"report.json": {"seconds": [[0, 1.0]], "finished": True, "pending": "cost"}}


@pytest.mark.parametrize("code", [1, -9, None])
def test_what_ends_the_processes_while_they_look_at_the_cost_does_not_end_the_run(tmp_path, code):
    spec = spec_of(tmp_path)
    done = launch(spec, 2, 0.0, start=Ended(REPORT | FAILED, code))
    assert done.status == "ok"
    assert done.report["seconds"] == [[0, 1.0]]
    assert done.report["cost"]["unknown"]
    lost = launch(spec, 2, 0.0, start=Ended(FAILED, code))
    nothing_pending = {"report.json": {"finished": True}}
    without = launch(spec, 2, 0.0, start=Ended(nothing_pending | FAILED, code))
    assert "ok" not in (lost.status, without.status)


def test_metrics_are_for_1000_tokens_and_in_the_vocabularys_units():
    counts = {"kernels": 300, "launches": 200, "busy_ms": 50.0}
    found = {row["metric"]: row for row in cost_metrics({"tokens": 2000, "part": "p", "counts": counts}, 0.75)}
    assert {name: row["value"] for name, row in found.items()} == pytest.approx(
        {"kernels": 150.0, "launches": 100.0, "device_busy": 25.0, "busy": 0.25}
    )
    for name, row in found.items():
        assert (row["unit"], row["direction"]) == METRICS[name][:2]
    assert cost_metrics({}, 0.75) == cost_metrics({"unknown": "why"}, 0.75) == []


def test_a_gpu_is_profiled_while_the_clock_runs(over, monkeypatch):
    """On a CPU, with a tracer that notes what is done within it."""
    run, execute = over
    seen = []

    class Tracer:
        spans = (Span("gemm", 0, 10, 1), Span("nccl", 5, 90, 2), Span("gemm", 20, 40, 3), Span("copy", 30, 50, 3))

        def __enter__(self):
            seen.append("traced")

        def __exit__(self, *_):
            seen.append("over")

    def noted(run):
        seen.append("trained")
        execute(run)

    monkeypatch.setattr(cost.profiler, "Tracer", Tracer)
    monkeypatch.setattr(cost.profiler, "start", lambda: seen.append("first trace"))
    spans = cost.profiled(cost.repeated(run, run.plan), noted)
    assert seen == ["first trace", "traced", "trained", "over"]
    assert cost.counts_of(spans) == cost.DeviceCounts(kernels=4, launches=3, busy_ms=40 / 1e6)


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 50)), max_size=8))
def test_busy_is_when_something_runs(pairs):
    spans = [Span("k", begin, begin + length) for begin, length in pairs]
    moments = {moment for span in spans for moment in range(span.begin, span.end)}
    assert profiler.busy_nanoseconds(spans) == len(moments)


def test_waiting_for_another_device_is_not_being_busy():
    spans = [Span("ncclDevKernel_SendRecv(ncclDevKernelArgsStorage<4096ul>)", 0, 9), Span("nvjet", 2, 4)]
    assert profiler.without_communication(spans) == spans[1:]


def test_operators_are_told_by_class_and_bytes():
    seen = []
    x = torch.ones(4, 8, requires_grad=True)
    with Counting(seen.append):
        y = (x @ x.T).relu().view(16)
        z = torch.cat([y, y]).to(torch.bfloat16)
        z.sum().item()
        torch.empty(9)
        torch.native_dropout(x, 0.5, True)
    assert [(one.name, one.kind) for one in seen] == [
        ("mm", "matrix products"), ("relu", "elementwise"), ("cat", "copies"), ("_to_copy", "copies"),
        ("sum", "reductions"), ("_local_scalar_dense", "host reads"), ("native_dropout", "random numbers"),
    ]  # fmt: skip
    assert (seen[0].read, seen[0].written) == (2 * 4 * 8 * 4, 4 * 4 * 4)
    assert product_dtypes(seen) == {"float32": 1}
    assert by_class(seen)["copies"] == (2, 2 * 64 + 128, 128 + 64)
