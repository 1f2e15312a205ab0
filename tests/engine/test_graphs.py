"""Stages as graphs, with `recorded`'s in place of a GPU's: what they train is what eager stages train, bit for bit."""

from __future__ import annotations

import logging
import re
import weakref
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist

from lorafusion.core.config import read_model
from lorafusion.core.plan import Plan
from lorafusion.core.workload import Workload
from lorafusion.data import packing
from lorafusion.engine import fork_server, graphs
from lorafusion.engine.build import build_run
from lorafusion.engine.graphs import CaptureError, StageGraphs, Usage
from lorafusion.engine.process import WorkerProcess, gathered
from lorafusion.engine.stream import execute
from lorafusion.engine.timed import report_of, timed
from lorafusion.engine.training import TrainingRun
from lorafusion.lab.checks.toy_runs import toy_jobs
from lorafusion.lab.cost import cost_of
from lorafusion.lab.table.result import result_of
from lorafusion.launch.heartbeat import Position
from lorafusion.launch.outcome import Outcome
from lorafusion.launch.spec import RunSpec
from lorafusion.planning import plan_system
from lorafusion.planning.buckets import with_buckets
from tests.engine.recorded import CpuRecorder, graphs_on_a_cpu

CLIPPED = {"max_grad_norm": 0.05, "schedule": "cosine"}


class Case(NamedTuple):
    """prepare: the run, once it is warm. most: buckets."""

    dtype: str = "float64"
    checkpointing: float = 0.0
    most: int = 3
    changes: dict = {}
    prepare: Callable[[TrainingRun], None] = lambda run: None
    system: str = "lorafusion"


def no_number(run: TrainingRun) -> None:
    with torch.no_grad():
        next(iter(run.adapters[0].parameters.values()))[0, 0] = torch.nan


def other_weights(run: TrainingRun) -> None:
    """As a checkpoint's are taken over."""
    for adapter in run.adapters:
        state = {name: value.clone() for name, value in adapter.state().items()}
        adapter.load({name: value + 0.01 if name.endswith("weight") else value for name, value in state.items()}, 1)


CASES = {
    "float64": Case(),
    "float32": Case("float32", most=1),
    "recomputed": Case(checkpointing=1.0),
    "partly recomputed": Case(checkpointing=0.5, changes=CLIPPED),
    "no number": Case(prepare=no_number),
    "PEFT": Case(most=1, system="peft-bf16"),  # a bucket of both adapters
    "PEFT under autocast": Case("bfloat16", most=1, changes=CLIPPED, system="peft"),
    "other weights": Case(changes={"evaluate_every": 2}, prepare=other_weights),
    "prompts": Case(changes={"evaluate_every": 2, "prompt": 0.9}),
}


def planned(case: Case, stages: int = 1, replicas: int = 1) -> tuple[Workload, Plan]:
    """A plan with buckets. The second job ends early; jobs are evaluated where they say when."""
    first, second = (job.model_copy(update=case.changes) for job in toy_jobs())
    jobs = (first, second.model_copy(update={"epochs": 1}))
    if first.evaluate_every:
        jobs = tuple(job.model_copy(update={"evaluation": job.samples[:3]}) for job in jobs)
    workload = Workload(name="toy", jobs=jobs)
    plan = plan_system(workload, case.system, stages=stages, capacity=96, data_parallel=replicas)
    return workload, with_buckets(plan, workload, tile=16, most=case.most)


def built(
    folder: Path, case: Case, workload: Workload, plan: Plan, rank: int = 0, device: str = "cpu", **changes
) -> TrainingRun:
    spec = RunSpec(system=case.system, workload="", dtype=case.dtype, adapter_dtype=case.dtype, device=device,
                   checkpointing=case.checkpointing, **{"model": "tiny", **changes})  # fmt: skip
    return build_run(WorkerProcess(spec, torch.device(device, rank), Position(folder, rank), rank), workload, plan)


def executed(run: TrainingRun, case: Case) -> tuple[list[dict], dict[str, torch.Tensor]]:
    """Train a warm run: its events, and all that its adapters are in the end."""
    case.prepare(run)
    torch.manual_seed(1)  # PEFT's dropout draws from torch's generator
    events: list[dict] = []
    run.record.events = SimpleNamespace(write=events.append)
    execute(run)
    run.record.wait()
    state = {f"{adapter.job.name}/{name}": value.clone() for adapter in run.adapters
             for name, value in adapter.state().items()}  # fmt: skip
    return events, state


def trained(run: TrainingRun, case: Case, captured: bool) -> tuple[list[dict], dict[str, torch.Tensor]]:
    with graphs_on_a_cpu() if captured else nullcontext() as recorder:
        run.warm_up()
        before = (recorder.captured, recorder.replayed) if captured else None
        result = executed(run, case)
    if captured:
        assert run.graphs is not None
        passes = 2 * sum(not microbatch.noop for microbatch in run.microbatches)
        assert (recorder.captured, recorder.replayed - passes) == before, "captured anew, or not replayed"
    return result


def assert_equal(ours, expected, **tolerance) -> None:
    torch.testing.assert_close(ours, expected, equal_nan=True, **tolerance or {"rtol": 0, "atol": 0})


@pytest.mark.parametrize("name", CASES)
def test_graphs_train_what_eager_stages_train(tmp_path, name):
    case = CASES[name]
    workload, plan = planned(case)
    assert {len(part.segments) for part in plan.microbatches} == ({1, 2} if case.system == "lorafusion" else {1})
    eager = trained(built(tmp_path, case, workload, plan), case, captured=False)
    assert_equal(trained(built(tmp_path, case, workload, plan), case, captured=True), eager)
    events = eager[0]
    assert {event["adapter"] for event in events if "stopped" in event} == ({0} if name == "no number" else set())
    assert any("evaluation" in event for event in events) == ("evaluate_every" in case.changes)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_padding_changes_nothing_but_the_order_of_sums(tmp_path, dtype):
    """A product of more rows may add in another order. Masks are those of the tokens' own places."""
    case = Case(dtype)
    workload, plan = planned(case)
    assert any(microbatch.padding for microbatch in plan.microbatches)
    unpadded = plan_system(workload, "lorafusion", stages=1, capacity=96)
    eager = trained(built(tmp_path, case, workload, unpadded), case, captured=False)
    graphs = trained(built(tmp_path, case, workload, plan), case, captured=True)
    tolerance = {"rtol": 1e-10, "atol": 1e-12} if dtype == "float64" else {"rtol": 1e-3, "atol": 1e-4}
    assert_equal(graphs, eager, **tolerance)


def test_logits_of_what_is_learnt_train_the_same_bits_as_all(tmp_path, monkeypatch):
    case = CASES["prompts"]
    workload, plan = planned(case)
    run = built(tmp_path, case, workload, plan)
    batches = [run._built(microbatch) for microbatch in plan.microbatches]
    assert {len(batch.rows) for batch in batches} == {16}
    some = trained(run, case, captured=True)
    monkeypatch.setattr(packing, "_logit_rows", lambda *_: None)
    run = built(tmp_path, case, workload, plan)
    assert run._built(plan.microbatches[0]).rows is None
    assert_equal(some, trained(run, case, captured=False))


@pytest.mark.parametrize("arrangement", [(3, 1), (1, 2)])
def test_each_stage_and_replica_has_graphs_of_its_own(tmp_path, arrangement):
    processes = arrangement[0] * arrangement[1]
    with ProcessPoolExecutor(processes, fork_server.FORKSERVER) as pool:
        for done in [pool.submit(_compare, tmp_path, *arrangement, rank) for rank in range(processes)]:
            done.result()


def _compare(folder: Path, stages: int, replicas: int, rank: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=stages * replicas)
    case = Case(changes={"evaluate_every": 3, "prompt": 0.7, **CLIPPED}, checkpointing=0.5)
    workload, plan = planned(case, stages, replicas)
    eager, graphs = (trained(built(folder, case, workload, plan, rank), case, captured) for captured in (False, True))
    assert_equal(graphs, eager)
    run = built(folder, case, workload, plan, rank)
    with graphs_on_a_cpu() as recorder:
        if rank == 1:
            FAILURES["an operator"](recorder)
        run.warm_up()
        assert_equal(executed(run, case), eager)
    assert [bool(reason) for reason in gathered(run.without_graphs)] == [part == 1 for part in range(stages * replicas)]
    dist.destroy_process_group()


def test_what_graphs_took_is_reported(tmp_path, caplog):
    workload, plan = planned(Case())
    run, eager = (built(tmp_path, Case(), workload, plan) for _ in range(2))
    with graphs_on_a_cpu(), caplog.at_level(logging.INFO):
        timed(run, execute)
    assert caplog.messages == [f"stage 0 of 1: {run.graphs.usage}"]
    report, graphs = report_of(run), 2 * len(plan.buckets)
    assert report["graphs"] == [Usage(graphs, run.graphs.usage.seconds, 1000 * graphs, 990 * graphs)._asdict()]
    assert report["peak_memory"] == run.record.meter.peak_memory() + 990 * graphs
    timed(eager, execute)
    report = report_of(eager)
    assert "graphs" not in report
    for reasons, note in (([None, "no", "no"], "without graphs: no"), ([None], "")):
        result = result_of(Outcome("ok", report=report | {"graphs": reasons, "canary": {}}), workload, plan, {}, {})
        assert result["note"] == note


def no_memory(recorder: CpuRecorder) -> None:
    def rehearse(work) -> None:
        work()
        raise torch.OutOfMemoryError

    recorder.rehearse = rehearse


def fail(reason: str) -> None:
    raise RuntimeError(reason)


def no_operator(recorder: CpuRecorder) -> None:
    """The second capture is broken off, and its end is an error, too."""
    capture = recorder.capture

    def broken(work, pool) -> Callable[[], None]:
        replay = capture(work, pool)
        if recorder.captured < 2:
            return replay
        with ExitStack() as stack:
            stack.callback(fail, "CUDA error: due to a previous error during capture")
            try:
                {}["a key"]
            except KeyError:  # and what broke it off may have come of something that is no error
                fail("CUDA error: operation not permitted\nSearch for it.")

    recorder.capture = broken


FAILURES = {"memory": no_memory, "an operator": no_operator, "a question": lambda recorder: None}
ASKED = "operation not permitted when stream is capturing: aten::_local_scalar_dense"
REASONS = {"memory": "graphs of 2 buckets do not fit in memory", "an operator": "CUDA error: operation not permitted",
           "a question": ASKED}  # fmt: skip


def held_weakly(passes: list) -> Callable:
    original = graphs._Passes.forward

    def forward(part, through) -> None:
        passes.append(weakref.ref(part))
        original(part, through)

    return forward


@pytest.mark.parametrize("failure", FAILURES)
def test_a_stage_that_cannot_be_captured_trains_without(tmp_path, monkeypatch, caplog, failure):
    """The same, bit for bit; or it is an error, before anything is trained. A dynamic rotary embedding asks."""
    model, case = tmp_path / "model.yaml", Case()
    rope = {"rope_type": "dynamic", "factor": 2.0} if failure == "a question" else {"rope_type": "default"}
    changes = {"rope_parameters": {"rope_theta": 1e4, **rope}}
    model.write_text(read_model("tiny").model_copy(update=changes).model_dump_json())
    workload, plan = planned(case)
    eager, run, needy = (
        built(tmp_path, case, workload, plan, model=str(model), needs_graphs=needs) for needs in (False, False, True)
    )
    expected = trained(eager, case, captured=False)
    with graphs_on_a_cpu() as recorder, caplog.at_level(logging.WARNING):
        FAILURES[failure](recorder)
        monkeypatch.setattr(graphs._Passes, "forward", held_weakly(passes := []))
        run.warm_up()
        assert passes
        assert not any(part() for part in passes)
        assert_equal(executed(run, case), expected)
    assert run.graphs is None
    assert run.without_graphs.endswith(REASONS[failure])
    assert caplog.messages == [f"stage 0 of 1: without graphs: {run.without_graphs}"]
    reason = re.escape(REASONS[failure])
    with graphs_on_a_cpu() as recorder:
        FAILURES[failure](recorder)
        with pytest.raises(CaptureError, match=f"graphs: found on, expected auto or off: .*{reason}$") as error:
            needy.warm_up()
    assert error.value.status == ("oom" if failure == "memory" else "crash")


def test_gradients_that_are_set_to_none_are_seen(tmp_path):
    workload, plan = planned(Case())
    run = built(tmp_path, Case(), workload, plan)
    with graphs_on_a_cpu():
        run.warm_up()
    for parameter in run.adapters[0].parameters.values():
        parameter.grad = None
    with pytest.raises(RuntimeError, match="expected gradients zeroed in place"):
        run.forward(0, None)


def test_what_a_pass_gives_is_not_what_the_next_one_writes(tmp_path):
    workload, plan = planned(Case(most=1))
    batch = built(tmp_path, Case(), workload, plan)._built(plan.microbatches[0])
    ends = torch.zeros(1, len(batch.labels), 4), torch.zeros(1, len(batch.labels), 4)
    graphs = StageGraphs(lambda batch, x: (3 * x).sin(), [], [batch], ends, 1, CpuRecorder())
    first = torch.rand(ends[0].shape).requires_grad_()
    out = graphs(batch, first)
    out.backward(torch.ones_like(out))
    kept = out.detach().clone(), first.grad.clone()
    second = torch.rand(ends[0].shape).requires_grad_()
    graphs(batch, second).sum().backward()
    assert_equal((out.detach(), first.grad), kept)
    assert_equal(kept, ((3 * first).sin().detach(), 3 * (3 * first).cos().detach()))


def test_each_microbatch_in_flight_has_its_own_memory(tmp_path):
    workload, plan = planned(Case(most=1))
    batch = built(tmp_path, Case(), workload, plan)._built(plan.microbatches[0])
    ends = torch.zeros(1, len(batch.labels), 4), torch.zeros(1, len(batch.labels), 4)
    graphs = StageGraphs(lambda batch, x: (3 * x).sin(), [], [batch], ends, 3, CpuRecorder())
    inputs = [torch.rand(ends[0].shape).requires_grad_() for _ in range(7)]
    expected = [3 * (3 * x).cos().detach() for x in inputs]
    in_flight = [graphs(batch, x) for x in inputs[:2]]
    for x in inputs[2:]:
        in_flight.append(graphs(batch, x))
        in_flight.pop(0).sum().backward()
    for out in in_flight:
        out.sum().backward()
    assert_equal([x.grad for x in inputs], expected)


def test_a_stage_that_asks_its_device_is_not_captured(tmp_path):
    workload, plan = planned(Case(most=1))
    batch = built(tmp_path, Case(), workload, plan)._built(plan.microbatches[0])
    x = torch.zeros(1, len(batch.labels), 4)
    for ask in (lambda batch: batch.borders.offsets.tolist(), lambda batch: torch.tensor([1.0])):
        with pytest.raises(CaptureError, match="not permitted when stream is capturing"):
            StageGraphs(lambda batch, x, ask=ask: x * len(ask(batch)), [], [batch], (x, x), 1, CpuRecorder())


def test_the_cost_of_a_run_is_that_of_its_graphs(tmp_path):
    run = built(tmp_path, CASES["float64"], *planned(CASES["float64"]))
    with graphs_on_a_cpu() as recorder:
        run.warm_up()
        execute(run)
        run.record.wait()
        captured, replayed = recorder.captured, recorder.replayed
        cost = cost_of(run, execute)
    assert recorder.captured == captured
    assert recorder.replayed - replayed == 2 * cost["slots"]
