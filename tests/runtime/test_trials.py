"""A profile: which runs it makes, and what of them counts."""

from __future__ import annotations

import time
from types import SimpleNamespace

import pytest
import torch

from lorafusion.checks import toy_jobs
from lorafusion.config import read_systems
from lorafusion.imports import load
from lorafusion.measure.profiler import IDLE, Span
from lorafusion.runtime import trials, worker
from lorafusion.runtime.board import Position
from lorafusion.runtime.spec import RunSpec
from lorafusion.scheduler import plan_system
from lorafusion.workload import Workload


def test_a_profile_has_the_kernels_of_the_second_trace_and_the_time_of_a_run_without(tmp_path, monkeypatch):
    """On a CPU, with a profiler that saw one GEMM, and the filling of a buffer long before the clock started; and of
    another one after it stopped."""
    jobs = Workload(name="toy", jobs=toy_jobs(dropout=0.0))
    plan = plan_system(jobs, "lorafusion", stages=1, capacity=96)
    (tmp_path / "part.json").write_text(jobs.to_json())
    (tmp_path / "plan.json").write_text(plan.to_json())
    spec = RunSpec(system="lorafusion", model="tiny", workload="", device="cpu", dtype="float32")
    run = worker.build_run(spec, jobs, plan, torch.device("cpu"), Position(tmp_path, 0), 0)
    execute, executed = load(read_systems()["lorafusion"].executor, "executor"), []
    ms, hour = 10**6, 3600 * 10**9

    def noted(one):
        executed.append(one)
        execute(one)
        one.record.begin -= 100  # as if it had taken longer, so that a busy machine makes no difference
        time.sleep(0.2 * (len(executed) == 4))

    def trace(function, before):
        for _ in range(2):
            before()
            function()
        gemm = Span("nvjet", hour - 50_000 * ms, hour - 49_999.5 * ms)
        return [Span("fill", 0, ms), gemm, Span("fill", hour - 190 * ms, hour)]

    monkeypatch.setattr(trials.profiler, "trace", trace)
    part = SimpleNamespace(part=str(tmp_path / "part.json"), trials=[SimpleNamespace(part=str(tmp_path / "plan.json"))])
    rows = {row["class"]: row for row in trials.profile(part, run, noted)}
    rehearsal, untraced, *traced = executed
    assert (len(rehearsal.adapters), len(traced)) == (1, 2)
    assert set(rows) == {"GEMM", IDLE}
    scale = plan.statistics.tokens / 1000
    assert rows["GEMM"]["milliseconds"] * scale == pytest.approx(0.5)
    seconds = untraced.record.done[-1][1] - untraced.record.begin
    assert sum(row["milliseconds"] for row in rows.values()) * scale == pytest.approx(1e3 * seconds)
