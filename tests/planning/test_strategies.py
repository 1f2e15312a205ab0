"""Every strategy, on any workload, gives a plan that the checker accepts, or says why there is none."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from baselines.mlora import planner as mlora
from lorafusion.core.plan import check, statistics_of, violations
from lorafusion.core.schema import UserError
from lorafusion.core.workload import Job, Sample, Workload
from lorafusion.planning import STRATEGIES, bounds, first_fit, plan_workload, sequential
from lorafusion.planning.common import insert_noops, largest_microbatch

CAPACITY = 20


@st.composite
def workloads(draw) -> Workload:
    jobs = []
    for index in range(draw(st.integers(1, 5))):
        lengths = draw(st.lists(st.integers(2, CAPACITY), min_size=1, max_size=12))
        jobs.append(
            Job(
                name=f"job-{index}",
                dataset="toy",
                rank=draw(st.integers(1, 8)),
                alpha=1.0,
                epochs=draw(st.integers(1, 2)),
                global_batch_size=draw(st.integers(1, 8)),
                samples=[Sample(i, tokens) for i, tokens in enumerate(lengths)],
            )
        )
    return Workload(name="drawn", jobs=tuple(jobs))


@pytest.mark.parametrize("strategy", STRATEGIES)
@settings(max_examples=60, deadline=None)
@given(workload=workloads(), stages=st.integers(1, 5), data_parallel=st.integers(1, 3))
def test_every_plan_passes_the_checker_and_none_is_below_the_bound(strategy, workload, stages, data_parallel):
    plan = plan_workload(workload, strategy, stages=stages, capacity=CAPACITY, data_parallel=data_parallel)
    check(plan, workload)
    assert plan.statistics.tokens == workload.tokens
    least = bounds.lower_bound(workload, 1 if plan.flush else stages, CAPACITY, data_parallel)
    assert len(plan.slots()) >= least


@pytest.mark.parametrize("strategy", sorted(set(STRATEGIES) - {"sequential"}))
@settings(max_examples=40, deadline=None)
@given(workload=workloads(), stages=st.integers(2, 5))
def test_no_noop_is_superfluous(strategy, workload, stages):
    """Taking any one no-op out of an order breaks the dependency rule, or it stood where no rule asked for it."""
    plan = plan_workload(workload, strategy, stages=stages, capacity=CAPACITY)
    for index, microbatch in enumerate(plan.microbatches):
        if microbatch.noop:
            fewer = plan.microbatches[:index] + plan.microbatches[index + 1 :]
            changed = {"microbatches": fewer, "statistics": statistics_of(fewer, CAPACITY)}
            assert violations(plan.model_copy(update=changed), workload)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_sample_above_capacity_is_named(strategy, make_workload):
    with pytest.raises(UserError, match="sample 3 of 'b' has 9 tokens, more than the capacity of 8"):
        plan_workload(make_workload(), strategy, stages=1, capacity=8)


def test_the_plan_is_the_same_every_time(make_workload):
    for strategy in STRATEGIES:
        first, second = (plan_workload(make_workload(), strategy, stages=3, capacity=16) for _ in range(2))
        assert first.to_json() == second.to_json()


def test_mlora_takes_turns_by_whole_batches(make_job, make_workload):
    jobs = [make_job(name, (8, 8, 8, 8), global_batch_size=2) for name in "ab"]
    plan = mlora.plan(make_workload(*jobs), "mlora", 1, 8)
    order = [(part.adapter, part.samples) for microbatch in plan.microbatches for part in microbatch.segments]
    assert order == [(0, (0,)), (0, (1,)), (1, (0,)), (1, (1,)), (0, (2,)), (0, (3,)), (1, (2,)), (1, (3,))]


def test_one_adapter_alone_in_a_deep_pipeline_waits(make_job, make_workload):
    """mLoRA's bubble: 4 stages, one adapter, one microbatch a batch: three no-ops between two batches."""
    plan = mlora.plan(make_workload(make_job("a", (2, 2, 2, 2))), "mlora", 4, 4)
    assert [microbatch.noop for microbatch in plan.microbatches] == [False, True, True, True, False]


def test_sequential_trains_one_adapter_after_another(make_workload):
    plan = sequential.plan(make_workload(), "peft", 1, 16)
    adapters = [microbatch.segments[0].adapter for microbatch in plan.microbatches]
    assert adapters == sorted(adapters)
    assert plan.flush


def test_head_tail_groups(make_job, make_workload):
    jobs = [make_job(name, (length,) * 4) for name, length in zip("abcde", (3, 9, 5, 2, 7), strict=True)]
    assert first_fit.group_adapters(make_workload(*jobs), 4) == [[1, 3], [4, 0], [2]]
    assert first_fit.group_adapters(make_workload(*jobs), 1) == [[0, 1, 2, 3, 4]]


def test_first_fit_decreasing_packs_what_fits(make_job, make_workload):
    workload = make_workload(make_job("a", (5, 4, 3), global_batch_size=3), make_job("b", (5, 3), global_batch_size=2))
    packed = first_fit.pack(workload, [0, 1], 0, 10)
    assert [microbatch.tokens for microbatch in packed] == [10, 10]
    assert [microbatch.step_after for microbatch in packed] == [(), (0, 1)]


@pytest.mark.parametrize(("lengths", "expected"), [((4,) * 8, 2), ((2,) * 8, 4), ((8,) * 8, 1), ((2,) * 7 + (9,), 1)])
def test_the_microbatch_of_fixed_size_systems_is_the_largest_that_always_fits(make_job, lengths, expected):
    assert largest_microbatch(make_job("a", lengths, global_batch_size=8), 10) == expected


def test_noops_come_only_where_a_batch_begins_too_early(make_job, make_workload):
    workload = make_workload(make_job("a", (2,) * 4), make_job("b", (2,) * 4))
    plan = mlora.plan(workload, "mlora", 2, 4)
    assert plan.statistics.noops == 0
    assert insert_noops(plan.microbatches, workload, 2) == list(plan.microbatches)
