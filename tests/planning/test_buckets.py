"""The buckets of a plan: the choice is the best there is, and a padded plan is the same training."""

from __future__ import annotations

from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorafusion.core.plan import Bucket, Microbatch, Plan, check, violations
from lorafusion.planning import plan_system
from lorafusion.planning.buckets import MOST_SIZES, bucket_sizes, with_buckets
from tests.planning.test_strategies import workloads

CAPACITY = 24


def work(sizes, held, price):
    """Tokens after padding, and the price of the buckets; infinite where a microbatch has none."""
    if max(sizes) < max(held):
        return float("inf")
    return sum(min(size for size in sizes if size >= tokens) for tokens in held) + price * sum(sizes)


@given(
    held=st.lists(st.integers(1, CAPACITY), min_size=1, max_size=12),
    tile=st.integers(1, 5),
    most=st.integers(1, 4),
    price=st.sampled_from([0, 0.5, 2, 100]),
)
def test_no_other_buckets_have_less_work(held, tile, most, price):
    sizes = bucket_sizes(held, CAPACITY, tile=tile, most=most, price=price)
    assert sizes == sorted(set(sizes))
    assert len(sizes) <= most
    assert all(size % tile == 0 or size == CAPACITY for size in sizes)
    every = sorted({*range(tile, CAPACITY + 1, tile), CAPACITY})
    choices = [choice for count in range(1, most + 1) for choice in combinations(every, count)]
    assert work(sizes, held, price) == min(work(choice, held, price) for choice in choices)


def test_more_sizes_than_are_tried_are_taken_in_larger_tiles():
    held = range(1, 5 * MOST_SIZES)
    sizes = bucket_sizes(held, held[-1], tile=1)
    assert len(sizes) == 8
    assert sizes[-1] == held[-1]
    assert max(after - before for before, after in zip([0, *sizes], sizes, strict=False)) < 700


@pytest.mark.parametrize(("price", "expected"), [(0, [128, 4096]), (1, [4096])])
def test_a_bucket_is_worth_its_captures(price, expected):
    """Padding a microbatch of 100 tokens costs 3968; another bucket costs 128 for each capture, and saves one."""
    assert bucket_sizes([100, 4000], 4096, price=price * 40) == expected


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
    assert plan.content_hash == "edabdae478e1f8b2"
    assert plan.key == "515dda837d87b8ae"


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
    padded = with_buckets(plan, workload, tile=8, capture=0)
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
