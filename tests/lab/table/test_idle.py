"""Of reports made by hand: the idle share of each stage by cause. Two stages, three microbatches of one second each
way; without any delay the run takes 8 seconds, and each stage is idle for 2 of them."""

from __future__ import annotations

import json

import pytest

from lorafusion.core.plan import Microbatch, Segment, make_plan
from lorafusion.lab.table.idle import stages_of
from lorafusion.lab.table.result import MOST_SPANS, _kept_times, write_result
from tests.conftest import job as make_a_job
from tests.conftest import workload as make_a_workload

JOBS = make_a_workload(make_a_job("a", (4,) * 3, global_batch_size=3))
MICROBATCHES = [
    Microbatch(segments=(Segment(adapter=0, samples=(index,), tokens=4),), step_after=(0,) if index == 2 else ())
    for index in range(3)
]
PLAN = make_plan("toy", JOBS, MICROBATCHES, stages=2, capacity=4)


def spans(*times: tuple[float, float]) -> list[int]:
    return [round(1e6 * value) if place else slot for slot, pair in enumerate(times)
            for place, value in enumerate((slot, *pair))]  # fmt: skip


def report(first, second, waits=(2.0, 2.0), end=8.0, **more) -> dict:
    """first, second: begins of each stage's three forwards and three backwards, a second long each."""
    times = [
        {"forward": spans(*((begin, begin + 1) for begin in begins[:3])),
         "backward": spans(*((begin, begin + 1) for begin in begins[3:])), "step": [], "wait": [round(1e6 * wait)]}
        for begins, wait in zip((first, second), waits, strict=True)
    ]  # fmt: skip
    return {"times": times, "clocks": [[end, end], [end, end]]} | more


PROMPT = report((0, 1, 4, 3, 5, 7), (1, 3, 5, 2, 4, 6))


def shares(found: list[dict]) -> list[tuple[float, float, float]]:
    return [(stage["bubble"], stage["host"], stage["neighbour"]) for stage in found]


def test_without_delays_all_idle_time_is_the_schedules():
    assert shares(stages_of(PROMPT, PLAN)) == [(0.25, 0, 0), (0.25, 0, 0)]


def test_a_late_host_is_its_stages_own_and_the_others_neighbour():
    """The second stage is two seconds late with its last backward: its loop did something else."""
    late = report((0, 1, 4, 3, 5, 9), (1, 3, 5, 2, 4, 8), waits=(4.0, 2.0), end=10.0)
    assert shares(stages_of(late, PLAN)) == [(0.2, 0, 0.2), (0.2, pytest.approx(0.2), 0)]


def test_a_slow_message_is_the_neighbours():
    late = report((0, 1, 4, 3, 5, 9), (1, 3, 5, 2, 4, 6), waits=(4.0, 4.0), end=10.0)
    assert shares(stages_of(late, PLAN)) == [(0.2, 0, pytest.approx(0.2))] * 2


def test_an_executor_that_tells_no_waits_has_no_host():
    late = report((0, 1, 4, 3, 5, 9), (1, 3, 5, 2, 4, 6), waits=(0.0, 0.0), end=10.0)
    assert shares(stages_of(late, PLAN)) == [(0.2, 0, pytest.approx(0.2))] * 2


def test_a_gpu_waits_for_its_host_within_passes_too():
    """The profile saw the first of two slots. It took the two devices 4 seconds, and for 3 of them they were busy."""
    cost = {"slots": 1, "tokens": 1, "counts": {"busy_ms": 3000.0}}
    assert shares(stages_of(PROMPT | {"cost": cost}, PLAN)) == [(0.25, 0.75 / 4, 0)] * 2


def test_sharded_replicas_wait_for_the_slowest_at_each_pass():
    """By their own schedule the second replica is idle where the first computes, which takes twice as long."""
    microbatches = [*MICROBATCHES, Microbatch(noop=True)]
    plan = make_plan("toy", JOBS, microbatches, stages=1, capacity=4, data_parallel=2)
    times = [{"forward": spans(*((2 * slot * length, (2 * slot + 1) * length) for slot in range(2))),
              "backward": spans(*(((2 * slot + 1) * length, (2 * slot + 2) * length) for slot in range(2))),
              "step": [], "wait": [0]} for length in (2, 1)]  # fmt: skip
    found = stages_of({"times": times, "clocks": [[8.0, 8.0], [8.0, 8.0]]}, plan, "sharded")
    assert shares(found) == [(0, 0, 0), (0.5, 0, 0)]


def test_waits_within_a_pass_are_not_work():
    """The second replica's passes take as long as the first's, as it waits in each for a second."""
    microbatches = [*MICROBATCHES, Microbatch(noop=True)]
    plan = make_plan("toy", JOBS, microbatches, stages=1, capacity=4, data_parallel=2)
    slow = {"forward": spans((0, 2), (4, 6)), "backward": spans((2, 4), (6, 8)), "step": [], "wait": [0]}
    waits = {name: [0, 1_000_000, 1, 1_000_000] for name in ("forward_wait", "backward_wait")}
    found = stages_of(
        {"times": [slow, slow | waits | {"wait": [4_000_000]}], "clocks": [[8.0, 8.0]] * 2}, plan, "sharded"
    )
    assert shares(found) == [(0, 0, 0), (0.5, 0, 0)]
    assert (found[1]["forward"], found[1]["wait"]) == (2, 4)


def test_a_report_without_times_has_no_stages():
    assert stages_of({"clocks": [[1.0, 1.0]]}, PLAN) == []


def test_a_long_plans_times_are_not_kept(tmp_path):
    times = PROMPT["times"]
    assert _kept_times(times) == times
    assert _kept_times([times[0] | {"forward": [0, 1, 2] * (MOST_SPANS + 1)}]) == []
    content = {"times": times, "losses": {"a": [1.5, None, -2e-7]}, "note": "x\n 1"}
    write_result(tmp_path / "result.json", content)
    text = (tmp_path / "result.json").read_text()
    assert json.loads(text).items() >= content.items()
    assert f'"forward": [ {", ".join(map(str, times[0]["forward"]))}\n' in text
