"""From the times of microbatches to the two throughputs."""

from __future__ import annotations

import pytest

from baselines.mlora import planner as mlora
from lorafusion.plan import make_plan
from lorafusion.runtime.launch import Outcome
from lorafusion.runtime.result import EXPECTED, metrics, result_of, steady_throughput
from lorafusion.scheduler import sequential


def plan_of(make_job, make_workload, planner=mlora.plan, stages=1):
    workload = make_workload(make_job("a", (4,) * 12), make_job("b", (4,) * 12))
    return planner(workload, "test", stages, 4)


def report(seconds):
    return {"seconds": seconds, "peak_memory": 1024, "canary": {"canary-gemm": 1e-3}, "losses": {"a": [1.0]}}


@pytest.mark.parametrize("stages", [1, 2])
def test_a_stream_without_bubbles_has_equal_throughput_in_both_windows(make_job, make_workload, stages):
    plan = plan_of(make_job, make_workload, stages=stages)
    seconds = [[index, 0.5 * (index + 1)] for index in range(len(plan.microbatches))]
    found = {(metric.metric, metric.window): metric.value for metric in metrics(report(seconds), plan)}
    assert found["throughput", "whole"] == pytest.approx(8.0)
    assert found["throughput", "steady"] == pytest.approx(8.0)
    assert found["time", "whole"] == 0.5 * len(plan.microbatches)
    assert found["fill", "whole"] == 1.0


def test_a_slow_start_and_end_count_in_the_whole_window_only(make_job, make_workload):
    plan = plan_of(make_job, make_workload, stages=2)
    count = len(plan.microbatches)
    times = [10.0 + 0.5 * index for index in range(count - 1)]
    seconds = [[index, time] for index, time in enumerate([*times, times[-1] + 100])]
    found = {(metric.metric, metric.window): metric for metric in metrics(report(seconds), plan)}
    assert found["throughput", "steady"].value == pytest.approx(8.0)
    assert found["throughput", "steady"].note == f"microbatches 5 to {count - 2} of {count}"
    assert found["throughput", "whole"].value < 1.0


def test_a_flushing_schedule_is_timed_at_its_steps(make_job, make_workload):
    """Marks at the ends of global batches of two microbatches: tokens between two marks over the time between."""
    plan = plan_of(make_job, make_workload, planner=sequential.plan)
    seconds = {index: float(index + 1) for index in range(1, len(plan.microbatches), 2)}
    throughput, note = steady_throughput(seconds, plan)
    assert throughput == pytest.approx(4.0)
    assert note == f"microbatches 4 to 23 of {len(plan.microbatches)}"


def test_a_plan_of_one_step_has_one_window(make_job, make_workload):
    workload = make_workload(make_job("a", (4, 4)))
    plan = sequential.plan(workload, "test", 1, 8)
    assert steady_throughput({0: 2.0}, plan) == (4.0, "the whole run, which has only one step")
    assert make_plan("x", workload, list(plan.microbatches), stages=1, capacity=8)


def test_a_failed_run_keeps_what_was_expected_of_it(make_job, make_workload):
    result = result_of(Outcome("oom", "rank 0: too large"), plan_of(make_job, make_workload), {"cell": "c"}, {})
    assert (result["status"], result["note"]) == ("oom", "rank 0: too large")
    assert result["metrics"] == []
    assert [(row["metric"], row["window"]) for row in result["expected"]] == list(EXPECTED)
