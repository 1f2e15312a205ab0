"""`lorafusion plan show`: the numbers it prints, the chart in the terminal, pictures, the page and the trace."""

from __future__ import annotations

import json

import pytest
from PIL import Image

from lorafusion.core.schema import UserError
from lorafusion.planning import plan_workload
from lorafusion.planning.simulator import gantt, simulate_plan
from lorafusion.planning.simulator.trace import write_trace


@pytest.fixture
def shown(make_job, make_workload):
    workload = make_workload(make_job("short", (4,) * 8), make_job("long", (9, 8, 7, 6), global_batch_size=2))
    plan = plan_workload(workload, "ffd", stages=3, capacity=16)
    timeline, unit = simulate_plan(plan, workload)
    return plan, timeline, unit


def test_the_terminal_says_what_the_plan_is(shown, capsys):
    plan, timeline, unit = shown
    gantt.print_plan(plan, timeline, unit, (0.0, timeline.makespan), ["short", "long"])
    text = capsys.readouterr().out
    assert f"{plan.statistics.microbatches}, of them {plan.statistics.noops} no-ops" in text
    assert f"{timeline.bubble().mean():.1%}" in text
    rows = [line for line in text.splitlines() if line.startswith("stage ")]
    charts = [line[18:] for line in rows if line[18:19] in ("f", "·")]
    assert len(charts) == 3
    assert [len(chart) - len(chart.lstrip("·")) for chart in charts] == sorted(
        len(chart) - len(chart.lstrip("·")) for chart in charts
    )  # later stages begin later
    assert all(set(chart.strip()) <= set("fB·") for chart in charts)
    assert "short  long" in text


def test_a_window_is_that_of_its_microbatches(shown):
    plan, timeline, _ = shown
    begin, end = gantt.window_of(timeline, 1, 1)
    assert begin == next(start for kind, index, start, _ in timeline.of(0) if (kind, index) == (0, 1))
    assert end == next(end for kind, index, _, end in timeline.of(0) if (kind, index) == (1, 1))
    assert gantt.window_of(timeline, 10_000, 1) == (0.0, timeline.makespan)


@pytest.mark.parametrize("suffix", [".png", ".svg", ".pdf", ".html"])
def test_charts_are_written_the_same_every_time(shown, tmp_path, suffix):
    plan, timeline, unit = shown
    paths = [tmp_path / f"{name}{suffix}" for name in "ab"]
    for path in paths:
        gantt.save(plan, timeline, unit, (0.0, timeline.makespan), path)
    assert paths[0].read_bytes() == paths[1].read_bytes()
    if suffix == ".png":
        assert Image.open(paths[0]).size[0] > 1000
    if suffix == ".html":
        page = paths[0].read_text()
        assert "<svg" in page
        assert "no-ops" in page


def test_another_form_is_refused(shown, tmp_path):
    plan, timeline, unit = shown
    with pytest.raises(UserError, match=r"unknown form of chart '.gif'; known: .html, .pdf, .png, .svg"):
        gantt.save(plan, timeline, unit, (0.0, 1.0), tmp_path / "x.gif")


def test_the_trace_is_one_that_perfetto_reads(shown, tmp_path):
    plan, timeline, _ = shown
    write_trace(timeline, plan, tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    real = [event for event in events if event["ph"] == "X"]
    assert {event["args"]["name"] for event in events if event["name"] == "thread_name"} == {
        f"stage {stage}" for stage in range(3)
    }
    count = sum(not microbatch.noop for microbatch in plan.microbatches)
    assert len(real) == 2 * 3 * count
    assert max(event["ts"] + event["dur"] for event in real) == pytest.approx(timeline.makespan * 1e6)
    assert sum(event["dur"] for event in real if event["cat"] == "forward" and event["tid"] == 0) == pytest.approx(
        1e6 * sum(end - start for kind, _, start, end in timeline.of(0) if kind == 0)
    )
