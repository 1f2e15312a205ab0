"""A run against the clock on a GPU: two clocks, the peak of memory, and what was trained."""

from __future__ import annotations

import time
from contextlib import contextmanager
from itertools import pairwise

import pytest
import torch

from lorafusion.core.clock import Meter
from lorafusion.core.config import read_systems
from lorafusion.core.plugins import load
from lorafusion.core.workload import Workload
from lorafusion.engine import timed
from lorafusion.engine.build import build_run
from lorafusion.engine.executor import prepared_by
from lorafusion.engine.process import WorkerProcess
from lorafusion.engine.training import TrainingRun
from lorafusion.lab.checks.toy_runs import toy_jobs
from lorafusion.lab.table.result import result_of
from lorafusion.launch.heartbeat import Position
from lorafusion.launch.outcome import Outcome
from lorafusion.launch.spec import RunSpec
from lorafusion.planning import plan_system

SYSTEM = "mlora"
GIB = 2**30
CLOCK_HZ = 1_000_000_000  # about that of an SM; `torch.cuda._sleep` counts its cycles


@pytest.fixture
def run(tmp_path):
    """On the tiny model."""
    jobs = Workload(name="toy", jobs=toy_jobs(dropout=0.0))
    spec = RunSpec(system=SYSTEM, model="tiny", workload="", device="cuda", dtype="bfloat16", adapter_dtype="bfloat16")
    plan = plan_system(jobs, SYSTEM, stages=1, capacity=96)
    return build_run(WorkerProcess(spec, torch.device("cuda", 0), Position(tmp_path, 0)), jobs, plan)


def execute(run):
    load(read_systems()[SYSTEM].executor, "executor")(run)


def result(run):
    report = timed.report_of(run) | {"canary": {}}
    return result_of(Outcome("ok", report=report), run.workload, run.plan, {}, {})


def test_both_clocks_agree(run):
    """Also where the host is far ahead of the device at the end, for which the clock waits."""

    def ahead(one):
        execute(one)
        torch.cuda._sleep(CLOCK_HZ)

    timed.timed(run, ahead)
    [(device, host)] = timed.report_of(run)["clocks"]
    assert device > 0.3
    assert host == pytest.approx(device, rel=1e-3)
    assert result(run)["status"] == "ok"


def test_work_from_before_is_not_in_the_clock(run):
    @contextmanager
    def busy(one):
        if len(one.adapters) > 1:  # not in the warm-up step
            torch.cuda._sleep(4 * CLOCK_HZ)
        yield

    @prepared_by(busy)
    def after(one, _):
        execute(one)

    timed.timed(run, after)
    [(device, _)] = timed.report_of(run)["clocks"]
    seconds = timed.report_of(run)["seconds"]
    assert 0 < seconds[0][1] < 0.5
    assert 0 < device < 2
    assert result(run)["status"] == "ok"


def test_the_peak_of_memory_is_that_of_the_run(run):
    """What was there before the clock started, and is there no longer, is no part of it; what is there still is."""
    before = torch.cuda.memory_allocated()  # by other tests of this process
    kept = torch.empty(GIB, dtype=torch.uint8, device="cuda")

    def place():
        torch.empty(4 * GIB, dtype=torch.uint8, device="cuda")
        return ()

    timed.timed(run, execute, place)
    assert GIB < timed.report_of(run)["peak_memory"] - before < 2 * GIB
    assert Meter(torch.device("cuda", 0)).peak_memory() - before < 2 * GIB
    del kept


def test_a_run_whose_gradients_are_not_finite_is_not_ok(run):
    def place():
        for parameter in run.adapters[0].parameters.values():
            parameter.register_hook(lambda gradient: gradient * float("nan"))
        return ()

    timed.timed(run, execute, place)
    found = result(run)
    assert (found["status"], found["metrics"]) == ("nan", [])
    assert found["note"] == "job-0 made 0 of 6 steps: it was stopped by a gradient that is not finite"


def test_passes_are_timed_on_the_device_and_a_slow_host_is_its_own_cause(run, monkeypatch):
    """The host sleeps where it makes a batch; the device works for a tenth of a second in each backward pass."""
    build, begin = run._builder.build, TrainingRun._begin_backward

    def slow_build(microbatch):
        torch.cuda.synchronize()
        time.sleep(0.1)
        return build(microbatch)

    def long_backward(self, slot):
        begin(self, slot)
        torch.cuda._sleep(CLOCK_HZ // 10)

    monkeypatch.setattr(TrainingRun, "_begin_backward", long_backward)
    monkeypatch.setattr(run._builder, "build", slow_build)
    timed.timed(run, execute)
    found = result(run)
    [stage], count = found["stages"], len(run.plan.microbatches)
    assert 0.05 * count < stage["backward"] < 0.2 * count
    assert 0.3 < stage["host"] < 0.7
    assert stage["bubble"] == pytest.approx(0, abs=0.01)
    assert stage["neighbour"] == pytest.approx(0, abs=0.01)
    spans = sorted(zip(*(iter(found["times"][0]["forward"] + found["times"][0]["backward"]),) * 3, strict=True),
                   key=lambda span: span[1])  # fmt: skip
    assert all(end <= begin + 1 for (_, _, end), (_, begin, _) in pairwise(spans))


def test_marks_cost_little(run):
    """About ten for each microbatch, of which none of Llama-3.1-8B takes less than 0.2 s: 0.5 % of that are 1000 us."""
    record, count = run.record, 10_000
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for slot in range(count):
        with record.timing("forward", slot):
            pass
    torch.cuda.synchronize()
    span = (time.perf_counter() - begin) / count
    print(f"{1e6 * span:.1f} us a span of two marks")
    assert 5 * span < 1e-3
