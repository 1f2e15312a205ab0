"""A profile: which runs it makes, and what of them counts."""

from __future__ import annotations

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from lorafusion.core.config import read_systems
from lorafusion.core.plugins import load
from lorafusion.core.workload import Workload
from lorafusion.engine.build import build_run
from lorafusion.engine.executor import prepared_by
from lorafusion.engine.process import WorkerProcess
from lorafusion.lab import trials
from lorafusion.lab.checks.toy_runs import toy_jobs
from lorafusion.lab.profiler import IDLE, Span
from lorafusion.lab.tuned import TrialOptions
from lorafusion.launch.heartbeat import Position
from lorafusion.launch.spec import RunSpec
from lorafusion.planning import plan_system
from tests.known_meter import KnownMeter


def test_a_profile_has_the_kernels_while_the_clock_runs_and_the_time_of_a_run_without(tmp_path, monkeypatch):
    """With a profiler that saw a GEMM half way, and a filling at the end. What an executor sets up is not traced."""
    jobs = Workload(name="toy", jobs=toy_jobs(dropout=0.0))
    plan = plan_system(jobs, "lorafusion", stages=1, capacity=96)
    (tmp_path / "part.json").write_text(jobs.to_json())
    (tmp_path / "plan.json").write_text(plan.to_json())
    spec = RunSpec(system="lorafusion", model="tiny", workload="", device="cpu", dtype="float32")
    meter = KnownMeter(seconds=0.125)
    run = build_run(WorkerProcess(spec, torch.device("cpu"), Position(tmp_path, 0), meter=meter), jobs, plan)
    execute, executed = load(read_systems()["lorafusion"].executor, "executor"), []
    ms, tracing = 10**6, []
    took = 125 * plan.statistics.tokens * ms

    class Tracer:
        spans = (Span("nvjet", took // 2, took // 2 + ms), Span("fill", took - 3 * ms, took))

        def __enter__(self):
            tracing.append(True)

        def __exit__(self, *_):
            tracing.clear()

    @contextmanager
    def prepared(_run):
        assert not tracing
        yield
        assert not tracing

    @prepared_by(prepared)
    def noted(executed_run, _):
        executed.append((executed_run, bool(tracing)))
        execute(executed_run)

    monkeypatch.setattr(trials.profiler, "Tracer", Tracer)
    monkeypatch.setattr(trials.profiler, "start", lambda: None)
    part = SimpleNamespace(part=str(tmp_path / "part.json"), trials=[SimpleNamespace(part=str(tmp_path / "plan.json"))])
    with meter.watching():
        rows = {row["class"]: row for row in trials.profile(part, run, noted)}
    warm_up_step, untraced, traced = executed
    assert len(warm_up_step[0].adapters) == 1
    assert untraced[0] is not traced[0]
    assert (warm_up_step[1], untraced[1], traced[1]) == (False, False, True)
    scale = plan.statistics.tokens / 1000
    assert {name: row["milliseconds"] * scale for name, row in rows.items()} == {
        "GEMM": pytest.approx(1.0), "elementwise": pytest.approx(3.0), IDLE: pytest.approx(took / ms - 4),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("seconds", "trials_made"), [([1.0, 0.9, 1.2, 1.0], 3), ([1.0, 1.04, 1.1, 1.0], 3), ([1.0], 1)]
)
def test_trials_end_with_one_that_is_clearly_slower_than_the_fastest(tmp_path, seconds, trials_made):
    """On a clock whose token takes so long in each of the trials."""
    jobs = Workload(name="toy", jobs=toy_jobs(dropout=0.0))
    plan = plan_system(jobs, "lorafusion", stages=1, capacity=96)
    for name, content in (("part", jobs), ("plan", plan)):
        (tmp_path / f"{name}.json").write_text(content.to_json())
    trial = {"plan": str(tmp_path / "plan.json"), "part": str(tmp_path / "plan.json"), "capacity": 96}
    options = TrialOptions(
        part=str(tmp_path / "part.json"), throughputs=str(tmp_path / "throughputs"), trials=(trial,) * len(seconds)
    )
    spec = RunSpec(system="lorafusion", model="tiny", workload="")
    meter = KnownMeter(seconds=1.0)
    run = build_run(WorkerProcess(spec, torch.device("cpu"), Position(tmp_path, 0), meter=meter), jobs, plan)
    execute, each = load(read_systems()["lorafusion"].executor, "executor"), iter(seconds)

    def paced(one):
        if len(one.adapters) > 1:  # not in the warm-up step
            meter.of_a_token = next(each)
        execute(one)

    with meter.watching():
        trials.try_plans(options, run, paced, 0)
    written = [float(line) for line in (tmp_path / "throughputs").read_text().splitlines()]
    assert written == pytest.approx([1 / one for one in seconds[:trials_made]])
