"""Plans in which jobs end early: how early, at what price, and what priorities and weights do."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorafusion.core.config import read_model
from lorafusion.core.plan import check
from lorafusion.core.schema import UserError
from lorafusion.core.workload import Workload
from lorafusion.planning import bounds, plan_system, plan_workload
from lorafusion.planning.completion import COMPLETION, THROUGHPUT
from lorafusion.planning.simulator import costs_of, even_costs, model_costs, simulate
from tests.planning.test_strategies import CAPACITY, workloads

LONGER = 0.025
SIZES = {"stages": st.integers(1, 4), "data_parallel": st.integers(1, 2)}


def ends(plan, workload, model=None):
    """The makespan and the end of each job."""
    timeline = simulate(plan, costs_of(plan, workload, model or even_costs(plan.stages)))
    times = timeline.job_ends(plan.stepping())
    return timeline.makespan, [times[adapter] for adapter in range(len(workload.jobs))]


def pareto(make_job, seed, adapters=32):
    """Jobs of sizes with a long tail, samples as long as in three datasets."""
    draw, jobs = random.Random(seed), []
    for index in range(adapters):
        count = min(3000, max(8, int(24 * draw.paretovariate(1.1))))
        middle = (5.8, 6.7, 7.6)[index % 3]
        lengths = [min(8192, max(2, int(draw.lognormvariate(middle, 0.4)))) for _ in range(count)]
        jobs.append(make_job(f"job-{index}", lengths, global_batch_size=8))
    return Workload(name="pareto", jobs=tuple(jobs))


@pytest.mark.parametrize("stages", [1, 4])
@pytest.mark.parametrize("seed", [9, 10, 11])
def test_short_jobs_do_not_wait_for_long_ones(make_job, seed, stages):
    workload, model = pareto(make_job, seed), model_costs(read_model("llama-3.1-70b"), stages)
    plans = [plan_workload(workload, stages=stages, capacity=8192, costs=model, aim=aim)
             for aim in (THROUGHPUT, COMPLETION)]  # fmt: skip
    (fastest, before), (makespan, after) = (ends(plan, workload, model) for plan in plans)
    assert makespan <= fastest * (1 + LONGER)
    assert np.mean(after) <= 0.4 * fastest
    assert np.mean(before) >= 1.3 * np.mean(after)


@settings(max_examples=30)
@given(workload=workloads(), data=st.data(), **SIZES)
def test_any_plan_is_exact_and_costs_no_more_than_it_may(workload, data, stages, data_parallel):
    states = [{"priority": data.draw(st.integers(-1, 1)), "weight": data.draw(st.sampled_from([0.5, 1.0, 4.0]))}
              for _ in workload.jobs]  # fmt: skip
    jobs = tuple(job.model_copy(update=state) for job, state in zip(workload.jobs, states, strict=True))
    stated = Workload(name="stated", jobs=jobs)
    sizes = {"stages": stages, "capacity": CAPACITY, "data_parallel": data_parallel}
    plan = plan_workload(stated, aim=COMPLETION, **sizes)
    check(plan, stated)
    assert plan == plan_workload(stated, aim=COMPLETION, **sizes)
    assert len(plan.slots()) >= bounds.lower_bound(stated, stages, CAPACITY, data_parallel)
    fastest, _ = ends(plan_workload(stated, aim=THROUGHPUT, **sizes), stated)
    makespan, _ = ends(plan, stated)
    # On one GPU the last two microbatches may share their samples afterwards, which leaves the tokens as they are.
    assert makespan <= fastest * (1 + LONGER) * (1 + (1e-3 if stages == data_parallel == 1 else 1e-9))


@settings(max_examples=20)
@given(workload=workloads(), factor=st.sampled_from([0.25, 4.0]), shift=st.integers(-3, 3), **SIZES)
def test_only_the_order_of_priorities_counts_and_the_ratio_of_weights(workload, factor, shift, stages, data_parallel):
    changed = Workload(name="changed", jobs=tuple(job.model_copy(update={"priority": shift, "weight": factor})
                                                  for job in workload.jobs))  # fmt: skip
    sizes = {"stages": stages, "capacity": CAPACITY, "data_parallel": data_parallel, "aim": COMPLETION}
    assert plan_workload(changed, **sizes).microbatches == plan_workload(workload, **sizes).microbatches


@settings(max_examples=40)
@given(workload=workloads(), data=st.data(), **SIZES)
def test_a_higher_priority_ends_a_job_no_later(workload, data, stages, data_parallel):
    """Than if no job had one, and than in the fastest plan. Between other priorities it does not always hold."""
    adapter = data.draw(st.integers(0, len(workload.jobs) - 1))
    jobs = tuple(job.model_copy(update={"priority": int(index == adapter)}) for index, job in enumerate(workload.jobs))
    raised = Workload(name="raised", jobs=jobs)
    sizes = {"stages": stages, "capacity": CAPACITY, "data_parallel": data_parallel}
    _, times = ends(plan_workload(raised, **sizes), raised)
    for aim in (THROUGHPUT, COMPLETION):
        _, before = ends(plan_workload(workload, aim=aim, **sizes), workload)
        assert times[adapter] <= before[adapter] * (1 + 1e-9)


def test_priorities_and_weights_are_heard_without_being_asked_for(make_job, make_workload):
    """What jobs state is never passed over; else `fast` is for throughput, and suites stay as they are."""
    jobs = [make_job("long", (9,) * 40, global_batch_size=4), make_job("short", (9,) * 4, global_batch_size=4)]
    sizes = {"stages": 1, "capacity": 36}
    usual = plan_workload(make_workload(*jobs), **sizes)
    assert usual == plan_workload(make_workload(*jobs), aim=THROUGHPUT, **sizes)
    for change, first in (({"priority": 1}, "long"), ({"weight": 100.0}, "long"), ({"weight": 0.5}, "short")):
        stated = make_workload(jobs[0].model_copy(update=change), jobs[1])
        plan = plan_workload(stated, **sizes)
        _, (long, short) = ends(plan, stated)
        assert ("long" if long < short else "short") == first
        assert plan_system(stated, "lorafusion", **sizes).microbatches == plan.microbatches
    with pytest.raises(UserError, match="plan: unknown aim 'sooner'; known: completion, throughput"):
        plan_workload(make_workload(*jobs), aim="sooner", **sizes)


def test_a_job_that_comes_while_others_train_goes_first_by_its_priority(make_job, make_workload):
    """What remains is planned again, with the others from where they are."""
    begun = [make_job(name, (9,) * 40, global_batch_size=4, start=3) for name in "ab"]
    late = make_job("late", (9,) * 20, global_batch_size=4, priority=5)
    workload = make_workload(*begun, late)
    for stages in (1, 2, 4):
        _, (a, b, last) = ends(plan_workload(workload, stages=stages, capacity=36), workload)
        assert last < min(a, b)
