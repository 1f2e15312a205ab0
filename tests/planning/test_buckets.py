"""The buckets of a plan: the choice is the best there is, and a padded plan is the same training."""

from __future__ import annotations

import re
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorafusion.core.config import CONFIGS, read_model, read_systems
from lorafusion.core.plan import Bucket, Microbatch, Plan, check, violations
from lorafusion.core.schema import UserError
from lorafusion.core.workload import Workload
from lorafusion.data.lengths import make_workload
from lorafusion.planning import plan_system, plan_workload
from lorafusion.planning.bounds import time_bound
from lorafusion.planning.buckets import MOST_SIZES, bucket_sizes, with_buckets
from lorafusion.planning.simulator import costs_of, model_costs, simulate
from lorafusion.planning.simulator.costs import contents_of
from tests.conftest import job as make_job
from tests.planning.test_strategies import workloads

CAPACITY = 24


def work(sizes, held, worth):
    """Tokens after padding, and what the buckets must save; infinite where a microbatch has none."""
    if max(sizes) < max(held):
        return float("inf")
    return sum(min(size for size in sizes if size >= tokens) for tokens in held) * (1 + worth * len(sizes))


@given(
    held=st.lists(st.integers(1, CAPACITY), min_size=1, max_size=12),
    tile=st.integers(1, 5),
    most=st.integers(1, 4),
    worth=st.sampled_from([0, 0.002, 0.05, 1]),
)
def test_no_other_buckets_have_less_work(held, tile, most, worth):
    sizes = bucket_sizes(held, CAPACITY, tile=tile, most=most, worth=worth)
    assert sizes == sorted(set(sizes))
    assert len(sizes) <= most
    assert all(size % tile == 0 or size == CAPACITY for size in sizes)
    every = sorted({*range(tile, CAPACITY + 1, tile), CAPACITY})
    choices = [choice for count in range(1, most + 1) for choice in combinations(every, count)]
    assert work(sizes, held, worth) == min(work(choice, held, worth) for choice in choices)


def test_more_sizes_than_are_tried_are_taken_in_larger_tiles():
    held = range(1, 5 * MOST_SIZES)
    sizes = bucket_sizes(held, held[-1], tile=1)
    assert len(sizes) == 8
    assert sizes[-1] == held[-1]
    assert max(after - before for before, after in zip([0, *sizes], sizes, strict=False)) < 700


@pytest.mark.parametrize(("large", "expected"), [(400, [128, 4096]), (500, [4096])])
def test_a_bucket_must_be_worth_its_captures(large, expected):
    """Without its own bucket a microbatch of 100 tokens costs 3968 more, of 1.6 or 2 million."""
    assert bucket_sizes([100, *[4000] * large], 4096) == expected


@settings(max_examples=30)
@given(
    workload=workloads(),
    system=st.sampled_from(["unfused-sequential", "mlora", "mlora-packed"]),
    stages=st.integers(1, 3),
    data_parallel=st.integers(1, 2),
    tile=st.integers(1, 9),
)
def test_a_padded_plan_is_the_same_training(workload, system, stages, data_parallel, tile):
    jobs = tuple(job.model_copy(update={"epochs": 1}) for job in workload.jobs)
    workload, capacity = workload.model_copy(update={"jobs": jobs}), 64
    plan = plan_system(workload, system, stages=stages, capacity=capacity, data_parallel=data_parallel)
    captured = with_buckets(plan, workload, tile=tile)
    check(captured, workload)
    sizes = [bucket.tokens for bucket in captured.buckets]
    for before, after in zip(plan.microbatches, captured.microbatches, strict=True):
        assert before == after.model_copy(update={"bucket": None})
        assert after.noop or after.length == after.bucket == min(size for size in sizes if size >= before.length)
        assert after.padding == after.length - before.length
        assert after.length <= capacity
    assert captured.statistics == plan.statistics
    assert captured.content_hash != plan.content_hash
    assert Plan.model_validate_json(captured.to_json()) == captured


def test_a_plan_without_graphs_says_nothing_of_buckets(make_workload):
    plan = plan_system(make_workload(), "lorafusion", stages=2, capacity=16)
    assert "bucket" not in plan.to_json()
    # As it was before there were buckets.
    assert plan.content_hash == "5cad759b83254f13"
    assert plan.key == "a7707091cbf186c0"


def test_bounds_hold_for_every_microbatch_of_a_bucket(make_job, make_workload):
    workload = make_workload(
        make_job("a", (5, 4, 7), global_batch_size=1), make_job("b", (2, 6, 3), global_batch_size=1)
    )
    plan = plan_system(workload, "fused-sequential", stages=1, capacity=8)
    captured = with_buckets(plan, workload, tile=4, most=1)
    # Of 5, 4, 7, 2, 6 and 3 tokens: one sample each, and that of the padding; the longest is one of each kind.
    assert captured.buckets == (Bucket(tokens=8, samples=2, segments=1, longest=7),)


@pytest.mark.parametrize(
    ("buckets", "message"),
    [
        ([{"samples": 1}, {}], "microbatch 0: samples 2, its bucket of 8 tokens has 1 at most"),
        ([{"longest": 4}, {}], "microbatch 0: longest 5, its bucket of 8 tokens has 4 at most"),
        ([{"tokens": 6}, {}], "microbatch 0: 5 tokens, bucket 8, expected 6"),
        ([{"tokens": 16}, {}], "buckets of [16, 16] tokens, expected rising ones"),
        ([{"tokens": 17}, {}], "buckets of [17, 16] tokens, expected rising ones"),
        ([{}], "microbatch 1: 12 tokens, the largest bucket has 8"),
        ([], "microbatch 0: 5 tokens, bucket 8, expected None"),
    ],
)
def test_buckets_that_do_not_hold_what_they_say_are_refused(buckets, message, make_job, make_workload):
    workload = make_workload(make_job("a", (5, 12), global_batch_size=1))
    plan = plan_system(workload, "fused-sequential", stages=1, capacity=16)
    padded = with_buckets(plan, workload, tile=8)
    assert [bucket.tokens for bucket in padded.buckets] == [8, 16]
    changed = tuple(bucket.model_copy(update=change) for bucket, change in zip(padded.buckets, buckets, strict=False))
    microbatches = padded.microbatches
    if len(changed) == 1:
        microbatches = (microbatches[0], microbatches[1].model_copy(update={"bucket": None}))
    broken = padded.model_copy(update={"buckets": changed, "microbatches": microbatches})
    assert violations(broken, workload)[0] == message


def test_a_noop_has_no_bucket(make_workload):
    plan = with_buckets(plan_system(make_workload(), "lorafusion", stages=4, capacity=16), make_workload(), tile=4)
    at = next(index for index, microbatch in enumerate(plan.microbatches) if microbatch.noop)
    assert plan.microbatches[at] == Microbatch(noop=True)
    broken = [*plan.microbatches]
    broken[at] = broken[at].model_copy(update={"bucket": 4})
    expected = f"microbatch {at}: 0 tokens, bucket 4, expected None"
    assert violations(plan.model_copy(update={"microbatches": tuple(broken)}), make_workload()) == [expected]


LARGE = model_costs(read_model("llama-3.1-8b"), 2)
MODEL = model_costs(read_model("llama-3.1-8b"), 1)


@pytest.fixture(scope="module")
def long_jobs():
    """Whose microbatches of a few hundred tokens keep a GPU waiting for its host."""
    return make_workload(CONFIGS / "workloads" / "mixed.yaml", samples=8, global_batch=4, scale=4.0)


def seconds(plan: Plan, workload, costs) -> float:
    return simulate(plan, costs_of(plan, workload, costs)).makespan


def test_a_plan_with_graphs_is_made_for_its_buckets(long_jobs):
    """No host, and microbatches that fill buckets: faster than the plan for eager stages with buckets, and not slower
    than one that knows nothing of them."""
    sizes = {"stages": 2, "capacity": 1024, "costs": LARGE}
    plan = plan_system(long_jobs, "lorafusion", graphs=True, **sizes)
    eager = plan_system(long_jobs, "lorafusion", **sizes)
    assert plan.buckets
    assert not eager.buckets
    assert seconds(plan, long_jobs, LARGE) < 0.5 * seconds(eager, long_jobs, LARGE)
    for by in (LARGE, LARGE.captured()):
        other = with_buckets(plan_workload(long_jobs, "fast", stages=2, capacity=1024, costs=by), long_jobs)
        assert seconds(plan, long_jobs, LARGE) <= seconds(other, long_jobs, LARGE)
    assert plan == plan_system(long_jobs, "lorafusion", graphs=True, **sizes)
    assert plan.key != eager.key


def test_a_padded_plan_costs_as_one_that_is_planned_to_its_buckets(long_jobs):
    plan = plan_system(long_jobs, "lorafusion", stages=2, capacity=1024, graphs=True)
    sizes = [bucket.tokens for bucket in plan.buckets]
    before = plan.model_copy(update={
        "buckets": (), "microbatches": tuple(m.model_copy(update={"bucket": None}) for m in plan.microbatches)
    })  # fmt: skip
    expected = LARGE.captured(sizes).costs(*contents_of(before, long_jobs))
    costs = costs_of(plan, long_jobs, LARGE)
    for name in ("forward", "backward", "step", "transfer"):
        assert np.array_equal(getattr(costs, name), getattr(expected, name)), name


def test_no_plan_with_graphs_takes_less_than_the_bound_of_time():
    """Padding is no part of it: a mean microbatch has no bucket."""
    job = make_job("a", (65,) * 12, global_batch_size=12)
    workload = Workload(name="toy", jobs=(job,))
    plan = with_buckets(plan_workload(workload, "fast", stages=1, capacity=1024, costs=MODEL), workload)
    assert [bucket.tokens for bucket in plan.buckets] == [896]
    for sizes in ([896], [128, 1024]):
        assert time_bound(workload.jobs, MODEL.captured(sizes), 1024) <= seconds(plan, workload, MODEL)


def test_costs_of_stages_with_graphs_have_no_host():
    captured = LARGE.captured([128, 512])
    tokens = np.array([0.0, 100, 128, 129, 600])
    costs = captured.costs(tokens, tokens**2, np.full(5, 3.0), np.zeros(5))
    expected = LARGE.captured().costs(
        np.array([0.0, 128, 128, 512, 600]),
        tokens**2 + np.array([0, 28, 0, 383, 0.0]) ** 2,
        np.full(5, 3.0),
        np.zeros(5),
    )
    assert np.array_equal(costs.forward, expected.forward)
    assert np.array_equal(costs.backward, expected.backward)
    assert costs.forward[0, 1] < LARGE.costs(tokens, tokens**2, np.full(5, 3.0), np.zeros(5)).forward[0, 1]


@pytest.mark.parametrize("name", list(read_systems()))
def test_systems_with_the_fused_operation_in_a_stream_have_graphs(name, make_workload):
    """The others say why not."""
    system = read_systems()[name]
    kinds = ("lorafusion.model.lora:fused", "lorafusion.model.lora:peft")
    can = system.lora in kinds and system.executor.endswith("stream:execute") and not name.endswith("-eager")
    assert (system.no_graphs is None) == can
    if can:
        assert plan_system(make_workload(), name, stages=1, capacity=64, graphs=True).buckets
    else:
        with pytest.raises(UserError, match=re.escape(f"plan: system {name} has no graphs, {system.no_graphs}")):
            plan_system(make_workload(), name, stages=1, capacity=64, graphs=True)
