"""`lorafusion plan show`: the numbers it prints, the chart in the terminal, pictures, the page and the trace."""

from __future__ import annotations

import json
import re

import pytest
from PIL import Image

from lorafusion.core.schema import UserError
from lorafusion.planning import plan_workload
from lorafusion.planning.simulator import gantt, simulate, simulate_plan
from lorafusion.planning.simulator.timeline import STEP
from lorafusion.planning.simulator.trace import write_trace
from tests.planning.simulator.test_schedules import a_plan, equal_costs


@pytest.fixture
def workload(make_job, make_workload):
    jobs = make_job("short", (4,) * 8, weight=3.0), make_job("long", (9, 8, 7, 6), global_batch_size=2, priority=-1)
    return make_workload(*jobs)


@pytest.fixture
def shown(workload):
    plan = plan_workload(workload, "ffd", stages=3, capacity=16)
    timeline, unit = simulate_plan(plan, workload)
    return plan, timeline, unit


def test_the_terminal_says_what_the_plan_is(shown, workload, capsys):
    plan, timeline, unit = shown
    gantt.print_plan(plan, timeline, unit, (0.0, timeline.makespan), workload)
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


def test_the_terminal_and_the_page_say_when_jobs_end(shown, workload, tmp_path, capsys):
    plan, timeline, unit = shown
    ends = {job.name: job for job in gantt.job_ends(plan, timeline, workload)}
    last = {adapter: slot for slot, one in enumerate(plan.microbatches) for adapter in one.step_after}
    steps = {index: end for kind, index, _, end in timeline.of(0) if kind == STEP}  # the first stage steps last
    assert {name: job.end for name, job in ends.items()} == {"short": steps[last[0]], "long": steps[last[1]]}
    shares = [ends[name].end / timeline.makespan for name in ("short", "long")]
    mean, weighted = sum(shares) / 2, (3 * shares[0] + shares[1]) / 4
    gantt.print_plan(plan, timeline, unit, (0.0, timeline.makespan), workload)
    text = capsys.readouterr().out
    assert f"after {mean:.1%} of it on average, {weighted:.1%} by their weights" in text
    assert re.search(rf"^short +{ends['short'].end:,.4g} units +{shares[0]:.1%} +0 +3 *$", text, re.M)
    assert text.index("\nlong") < text.index("\nshort")  # the first to end comes first
    gantt.save(plan, timeline, unit, (0.0, timeline.makespan), tmp_path / "x.html", workload)
    row = f"<td>long</td><td>{ends['long'].end:,.4g} units</td><td>{shares[1]:.1%}</td><td>-1</td><td>1</td>"
    assert row in (tmp_path / "x.html").read_text()


def test_without_the_workload_nothing_is_said_of_priorities_and_weights(shown, tmp_path, capsys):
    plan, timeline, unit = shown
    assert [job.name for job in gantt.job_ends(plan, timeline)] == ["adapter 1", "adapter 0"]
    gantt.print_plan(plan, timeline, unit, (0.0, timeline.makespan))
    gantt.save(plan, timeline, unit, (0.0, timeline.makespan), tmp_path / "x.html")
    for text in (capsys.readouterr().out, (tmp_path / "x.html").read_text()):
        assert "of it on average" in text
        assert not re.search("weight<|weights|priority", text)


def test_a_job_ends_when_all_stages_and_replicas_have_done_its_last_step():
    plan = a_plan(6, 2, steps=[1, 3, 5])
    timeline = simulate(plan, equal_costs(plan, step=0.5))
    ends = [end for kind, _, _, end in timeline.of(0) if kind == STEP]  # stage 0 steps last
    assert timeline.job_ends([set(), {0}, set(), {0, 1}, set(), {2}]) == {0: ends[1], 1: ends[1], 2: ends[2]}
    assert ends[2] == timeline.makespan
    plan = a_plan(4, 1, steps=[0, 3], data_parallel=2)
    costs = equal_costs(plan)
    costs.backward[0, 2] = 9.0
    timeline = simulate(plan, costs)
    assert timeline.job_ends([{1}, {0}]) == {1: 3.0, 0: 3.0 + 1.0 + 9.0}


def test_the_terminal_lists_so_many_jobs(make_job, make_workload, capsys):
    workload = make_workload(*(make_job(f"job-{index}", (4,)) for index in range(gantt.MOST_ROWS + 3)))
    plan = plan_workload(workload, "fast", stages=1, capacity=4)
    gantt.print_plan(plan, *simulate_plan(plan, workload), (0.0, 1.0), workload)
    text = capsys.readouterr().out
    assert "\njob-19 " in text
    assert "\njob-20 " not in text
    assert "and 3 more, which a page has (--out plan.html)" in text


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
