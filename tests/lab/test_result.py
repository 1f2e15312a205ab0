"""Which runs have numbers, and from the times of microbatches to the two throughputs."""

from __future__ import annotations

import copy
import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baselines.mlora import planner as mlora
from lorafusion.core.plan import Statistics, make_plan
from lorafusion.lab.table.result import EXPECTED, metrics, require_steps, result_of, steady_throughput
from lorafusion.launch.outcome import FaultyRunError, Outcome
from lorafusion.planning import sequential
from lorafusion.planning.buckets import with_buckets
from tests.conftest import job as make_a_job
from tests.conftest import workload as make_a_workload

TOY = make_a_workload(make_a_job("a", (4,) * 12), make_a_job("b", (4,) * 12))  # 6 steps each, 96 tokens


def plan_of(planner=mlora.plan, stages=1, workload=TOY):
    return planner(workload, "test", stages, 4)


def report(plan, step=0.5, seconds=None, workload=TOY, processes=None):
    """Of a run that trained all of it, `step` seconds a slot where no times are given."""
    if seconds is None:
        seconds = [[slot, step * (slot + 1)] for slot in range(len(plan.slots()))]
    end = max(time for _, time in seconds)
    return {
        "seconds": seconds,
        "clocks": [[end, end]] * (processes or plan.stages * plan.data_parallel),
        "losses": {one.name: [1.0] * len(one.batches) for one in workload.jobs},
        "steps": {one.name: len(one.batches) for one in workload.jobs},
        "stopped": [],
        "peak_memory": 1024,
        "canary": {"canary-gemm": 1e-3},
    }


def numbers(report, plan, workload=TOY):
    return {(row["metric"], row["window"]): row["value"] for row in metrics(report, workload, plan)}


@pytest.mark.parametrize("stages", [1, 2])
def test_a_stream_without_bubbles_has_equal_throughput_in_both_windows(stages):
    plan = plan_of(stages=stages)
    found = numbers(report(plan), plan)
    assert found["throughput", "whole"] == pytest.approx(8.0)
    assert found["throughput", "steady"] == pytest.approx(8.0)
    assert found["time", "whole"] == 0.5 * len(plan.microbatches)
    assert found["fill", "whole"] == 1.0


def test_a_slow_start_and_end_count_in_the_whole_window_only():
    plan = plan_of(stages=2)
    count = len(plan.microbatches)
    times = [10.0 + 0.5 * index for index in range(count - 1)]
    seconds = [[index, time] for index, time in enumerate([*times, times[-1] + 100])]
    found = {(row["metric"], row["window"]): row for row in metrics(report(plan, seconds=seconds), TOY, plan)}
    assert found["throughput", "steady"]["value"] == pytest.approx(8.0)
    assert found["throughput", "steady"]["note"] == f"microbatches 5 to {count - 2} of {count}"
    assert found["throughput", "whole"]["value"] < 1.0


def test_a_flushing_schedule_is_timed_at_its_steps():
    """Marks at the ends of global batches of two microbatches: tokens between two marks over the time between."""
    plan = plan_of(planner=sequential.plan)
    seconds = {index: float(index + 1) for index in range(1, len(plan.microbatches), 2)}
    throughput, note = steady_throughput(seconds, plan)
    assert throughput == pytest.approx(4.0)
    assert note == f"microbatches 4 to 23 of {len(plan.microbatches)}"
    done = report(plan, seconds=[[*one] for one in seconds.items()])
    assert result_of(Outcome("ok", report=done), TOY, plan, {}, {})["status"] == "ok"


def test_a_plan_of_one_step_has_one_window():
    workload = make_a_workload(make_a_job("a", (4, 4)))
    plan = sequential.plan(workload, "test", 1, 8)
    assert steady_throughput({0: 2.0}, plan) == (4.0, "the whole run, which has only one step")
    assert make_plan("x", workload, list(plan.microbatches), stages=1, capacity=8)


def test_a_failed_run_keeps_what_was_expected_of_it():
    result = result_of(Outcome("oom", "rank 0: too large"), TOY, plan_of(), {"cell": "c"}, {})
    assert (result["status"], result["note"]) == ("oom", "rank 0: too large")
    assert result["metrics"] == []
    assert [(row["metric"], row["window"]) for row in result["expected"]] == list(EXPECTED)
    assert result_of(Outcome("skipped", "no package"), TOY, None, {}, {})["status"] == "skipped"


def test_padding_is_counted_in_the_padded_throughput_alone():
    workload = make_a_workload(make_a_job("a", (3, 5, 2, 4)))
    plan = mlora.plan(workload, "test", 1, 16, row_multiple=8)
    found = numbers(report(plan, workload=workload), plan, workload)
    seconds = 0.5 * len(plan.microbatches)
    assert found["throughput", "whole"] == pytest.approx((3 + 5 + 2 + 4) / seconds)
    assert found["throughput_padded", "whole"] == pytest.approx(4 * 8 / seconds)


def test_padding_to_buckets_is_counted_in_the_padded_throughput_alone():
    workload = make_a_workload(make_a_job("a", (3, 5, 2, 4)))
    plan = sequential.plan(workload, "test", 1, 16)
    padded = with_buckets(plan, workload, tile=16)
    assert {microbatch.length for microbatch in padded.microbatches if not microbatch.noop} == {16}
    before, after = (numbers(report(each, workload=workload), each, workload) for each in (plan, padded))
    count = len(plan.microbatches) - plan.statistics.noops
    assert after.pop(("throughput_padded", "whole")) == pytest.approx(16 * count / (0.5 * len(plan.microbatches)))
    assert before.pop(("throughput_padded", "whole")) == before["throughput", "whole"]
    assert after == before


def test_tokens_are_the_workloads_whatever_the_plan_says_of_itself():
    plan, said = plan_of(), Statistics(tokens=960, microbatches=24, noops=0, lower_bound=1, fill=9.0)
    found = numbers(report(plan), plan.model_copy(update={"statistics": said}))
    assert found["throughput", "whole"] == pytest.approx(96 / 12)
    assert found["fill", "whole"] == 1.0
    assert steady_throughput({0: 2.0}, plan.model_copy(update={"statistics": said}))[0] == 48.0


def test_the_time_is_that_of_the_slowest_process_and_the_host_is_in_the_result():
    plan = plan_of(stages=2)
    done = report(plan)
    done["clocks"] = [[13.0, 13.0], [13.5, 13.6]]
    result = result_of(Outcome("ok", report=done), TOY, plan, {}, {})
    found = {(one["metric"], one["window"]): one["value"] for one in result["metrics"]}
    assert found["time", "whole"] == 13.5
    assert found["throughput", "whole"] == pytest.approx(96 / 13.5)
    assert result["clocks"] == [{"device": 13.0, "host": 13.0}, {"device": 13.5, "host": 13.6}]
    assert result["steps"] == {"a": 6, "b": 6}


def changed(key, *path_and_value):
    """Changes an entry of a report: the keys that lead to it, and its value, or a function of the old one."""

    def change(report):
        *path, last, value = (key, *path_and_value)
        for name in path:
            report = report[name]
        report[last] = value(report[last]) if callable(value) else value

    return change


SLOTS = "are not those of the plan's 24 in their order"
FAULTS = {
    "a loss is NaN": (changed("losses", "b", 2, math.nan), "nan", "the loss of b is not finite"),
    "a loss is infinite": (changed("losses", "a", 0, math.inf), "nan", "the loss of a is not finite"),
    "a loss is missing": (changed("losses", "b", 2, None), "crash", "global batch 2 of b is missing or in part"),
    "the last loss is missing": (changed("losses", "b", lambda old: old[:-1]), "crash", "batch 5 of b is missing"),
    "a job has no losses": (changed("losses", {"a": [1.0] * 6}), "crash", "global batch 0 of b is missing"),
    "no step was made": (changed("steps", "b", 0), "crash", "b made 0 of 6 steps"),
    "a step is missing": (changed("steps", "a", 5), "crash", "a made 5 of 6 steps"),
    "a step too many": (changed("steps", "a", 7), "crash", "a made 7 of 6 steps"),
    "a job is missing": (changed("steps", {"a": 6}), "crash", "b made 0 of 6 steps"),
    "a job that is not its own": (changed("steps", "c", 1), "crash", "another adapter, c"),
    "an adapter was stopped": (
        lambda report: report.update(steps={"a": 6, "b": 3}, stopped=["b"]),
        "nan",
        "b made 3 of 6 steps: it was stopped by a gradient that is not finite",
    ),
    "an adapter was stopped at the end": (changed("stopped", ["a"]), "nan", "a made 6 of 6 steps: it was stopped"),
    "the clocks disagree": (changed("clocks", [[12.0, 12.2]]), "crash", "12 s by its device's clock and 12.2 s"),
    "the device's clock is slow": (changed("clocks", [[12.2, 12.0]]), "crash", "more than 1% apart"),
    "no time passed": (changed("clocks", [[0.0, 0.0]]), "crash", "process 0 ran 0 s"),
    "time ran backwards": (changed("clocks", [[-12.0, -12.0]]), "crash", "process 0 ran -12 s"),
    "the time is NaN": (changed("clocks", [[math.nan, 12.0]]), "crash", "process 0 ran nan s"),
    "a process has no times": (changed("clocks", []), "crash", "times of 0 processes, the run had 1"),
    "a process too many": (changed("clocks", lambda old: old * 2), "crash", "times of 2 processes, the run had 1"),
    "a slot is missing": (changed("seconds", lambda old: old[:3] + old[4:]), "crash", SLOTS),
    "the last slot is missing": (changed("seconds", lambda old: old[:-1]), "crash", SLOTS),
    "no slot was marked": (changed("seconds", []), "crash", SLOTS),
    "a slot comes twice": (changed("seconds", lambda old: [old[0], *old]), "crash", SLOTS),
    "slots are swapped": (changed("seconds", lambda old: [old[1], old[0], *old[2:]]), "crash", SLOTS),
    "marks are out of order": (changed("seconds", 3, 1, 5.0), "crash", "ran backwards: 2.5 s at 4, after 5 s"),
    "a mark before the start": (changed("seconds", 0, 1, -1.0), "crash", "ran backwards: -1 s at 0, after 0 s"),
    "a mark after the end": (changed("clocks", [[11.0, 11.0]]), "crash", "ran backwards: 11 s at the end, after 12 s"),
    "no memory": (changed("peak_memory", 0), "crash", "the peak of memory is 0 bytes"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "status", "note"), FAULTS.values(), ids=FAULTS)
def test_a_run_that_did_not_train_everything_has_no_numbers(change, status, note):
    plan = plan_of()
    done = report(plan)
    assert result_of(Outcome("ok", report=copy.deepcopy(done)), TOY, plan, {}, {})["status"] == "ok"
    change(done)
    result = result_of(Outcome("ok", report=done), TOY, plan, {}, {})
    assert result["status"] == status
    assert note in result["note"]
    assert "\n" not in result["note"]
    assert len(result["note"]) <= 300
    assert result["metrics"] == []
    json.dumps(result["losses"], allow_nan=False)


def test_a_run_without_adapters_has_no_numbers():
    with pytest.raises(FaultyRunError, match="no adapter trained"):
        require_steps({"steps": {}, "stopped": []}, {})


def test_a_plan_of_fewer_tokens_than_the_workloads_has_no_numbers():
    plan = plan_of()
    shorter = plan.model_copy(update={"microbatches": plan.microbatches[:-1]})
    result = result_of(Outcome("ok", report=report(plan)), TOY, shorter, {}, {})
    assert (result["status"], result["note"]) == ("crash", "the plan has 92 tokens, its workload 96")


@given(host=st.floats(0.5, 1.5), rank=st.integers(0, 1))
def test_both_clocks_of_every_process_agree_within_a_hundredth(host, rank):
    plan = plan_of(stages=2)
    done = report(plan)
    device = done["clocks"][0][0]
    done["clocks"] = [[device, device], [device, device]]
    done["clocks"][rank] = [device, device * host]
    status = result_of(Outcome("ok", report=done), TOY, plan, {}, {})["status"]
    assert (status == "ok") == (abs(1 / host - 1) <= 0.01)


@given(st.lists(st.floats(0.01, 10.0), min_size=24, max_size=24), st.floats(1.0, 2.0))
def test_throughput_is_tokens_over_the_clock(durations, slowest):
    """Whatever the slots took: 96 tokens over the time of the slowest process, in both windows the tokens in it."""
    plan = plan_of(stages=2)
    times = [sum(durations[: slot + 1]) for slot in range(24)]
    count = len(plan.slots())
    times += [times[-1] + index + 1.0 for index in range(count - len(times))]
    done = report(plan, seconds=[[slot, time] for slot, time in enumerate(times)])
    end = times[-1]
    done["clocks"] = [[end, end], [end * slowest, end * slowest]]
    result = result_of(Outcome("ok", report=done), TOY, plan, {}, {})
    found = {(one["metric"], one["window"]): one["value"] for one in result["metrics"]}
    assert found["throughput", "whole"] * end * slowest == pytest.approx(96)
    # The window of two stages: after the fifth microbatch, to the last that has one after it.
    tokens = sum(plan.microbatches[slot].tokens for slot in range(5, count - 1))
    assert found["throughput", "steady"] * (times[count - 2] - times[4]) == pytest.approx(tokens)
