"""A run against the clock on a GPU: two clocks, the peak of memory, and what was trained."""

from __future__ import annotations

from contextlib import contextmanager

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
