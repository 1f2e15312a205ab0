"""The packer: exact filling, urgency, jobs that come and go, and bounds that no plan goes below."""

from __future__ import annotations

from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorafusion.plan import check, make_plan
from lorafusion.scheduler import STRATEGIES, bounds, fast, plan_workload
from lorafusion.scheduler.packer import Item, Packer, fill
from lorafusion.simulator import even_costs

lengths = st.lists(st.integers(1, 40), min_size=1, max_size=9)


@given(lengths=lengths, room=st.integers(1, 120))
def test_what_is_filled_is_the_best_of_all_choices(lengths, room):
    items = [Item(tokens, 0, position) for position, tokens in enumerate(lengths)]
    chosen = fill([items], room, 0)
    best = max(
        total for count in range(len(lengths) + 1) for total in map(sum, combinations(lengths, count)) if total <= room
    )
    assert sum(item.tokens for item in chosen) == best
    assert len({item.position for item in chosen}) == len(chosen)


def test_another_adapter_is_asked_only_where_the_first_does_not_fill_the_room():
    first = [Item(5, 0, 0), Item(4, 0, 1)]
    second = [Item(3, 1, 0), Item(1, 1, 1)]
    assert {item.adapter for item in fill([first, second], 9, 0)} == {0}
    assert {item.adapter for item in fill([first, second], 8, 1)} == {0, 1}  # 5 + 3
    assert {item.adapter for item in fill([first, second], 8, 3)} == {0}  # 5 is enough


def test_large_rooms_are_counted_coarsely_and_never_overfilled():
    items = [Item(100_001, 0, 0), Item(99_999, 0, 1), Item(50_000, 0, 2)]
    chosen = fill([items], 200_000, 0)
    assert 150_000 <= sum(item.tokens for item in chosen) <= 200_000


def test_the_adapter_with_the_longest_way_to_go_comes_first(make_job):
    packer = Packer(stages=3, capacity=10)
    packer.add(0, make_job("a", (10,), global_batch_size=1))
    packer.add(1, make_job("b", (10, 10, 10), global_batch_size=1))
    slots = [packer.next_slot() for _ in range(7)]
    assert [[item.adapter for content in bins for item in content] for bins, _ in slots] == [
        [1],
        [0],
        [],
        [1],
        [],
        [],
        [1],
    ]
    assert [ended for _, ended in slots] == [{1}, {0}, set(), {1}, set(), set(), {1}]
    assert not packer.streams


def test_replicas_share_what_is_left(make_job):
    packer = Packer(stages=1, capacity=100, data_parallel=2)
    packer.add(0, make_job("a", (10,) * 8, global_batch_size=8))
    bins, ended = packer.next_slot()
    assert [sum(item.tokens for item in content) for content in bins] == [40, 40]
    assert ended == {0}


def test_jobs_come_and_go_while_others_train(make_job):
    """A job that comes later begins at its first batch, one that goes leaves the others as they were."""
    packer = Packer(stages=2, capacity=12)
    packer.add(0, make_job("a", (6,) * 8, global_batch_size=2))
    packer.next_slot()
    packer.add(7, make_job("late", (6,) * 4, global_batch_size=2))
    bins, ended = packer.next_slot()
    assert {item.adapter for content in bins for item in content} == ended == {7}
    bins, _ = packer.next_slot()
    assert {(item.adapter, item.position) for content in bins for item in content} == {(0, 2), (0, 3)}
    left = packer.withdraw(0)
    assert [item.position for item in left] == [4, 5]  # its next batch, of which nothing was placed
    rest = [packer.next_slot() for _ in range(1)]
    assert {item.adapter for bins, _ in rest for content in bins for item in content} == {7}
    assert not packer.streams


def test_a_job_resumes_at_a_batch(make_job):
    packer = Packer(stages=1, capacity=12)
    packer.add(0, make_job("a", (6,) * 8, global_batch_size=2), batch=3)
    bins, _ = packer.next_slot()
    assert [item.position for item in bins[0]] == [6, 7]
    assert not packer.streams


@pytest.mark.parametrize(("stages", "slots"), [(1, 4), (2, 5), (4, 7)])
def test_the_dependency_bound_counts_waiting(make_job, make_workload, stages, slots):
    """Two batches of two microbatches each, and S - 1 slots between them."""
    workload = make_workload(make_job("a", (6, 6, 6, 6), global_batch_size=2))
    assert bounds.dependency_bound(workload, stages, 10) == slots
    assert bounds.token_bound(workload, 10) == 3
    assert bounds.lower_bound(workload, stages, 10) == slots
    assert len(plan_workload(workload, "fewest", stages=stages, capacity=10).microbatches) == slots


def test_bounds_of_replicas_are_in_slots(make_job, make_workload):
    workload = make_workload(make_job("a", (6,) * 8, global_batch_size=4))
    assert bounds.token_bound(workload, 12, data_parallel=2) == 2
    assert bounds.dependency_bound(workload, 3, 12, data_parallel=2) == 1 + 2 + 1


def test_lower_capacities_are_chosen_where_waiting_rules(make_job, make_workload):
    """Two adapters, four stages: full microbatches wait for each other's steps, halves of them fill the pipeline."""
    jobs = [make_job(name, (10, 11, 9, 10) * 20, global_batch_size=4) for name in "ab"]
    workload = make_workload(*jobs)
    assert fast.fastest(workload, 4, 80, 1, even_costs(4)).capacity < 80
    assert fast.fastest(workload, 1, 80, 1, even_costs(1)).capacity == 80


def test_an_under_full_order_is_what_its_owner_may_check(make_job, make_workload):
    """The incremental slots make a plan like any other."""
    workload = make_workload(make_job("a", (3, 4, 5, 6)), make_job("b", (7, 2), global_batch_size=1))
    packer = Packer(stages=2, capacity=9)
    for adapter, job in enumerate(workload.jobs):
        packer.add(adapter, job)
    microbatches = []
    while packer.streams:
        bins, ended = packer.next_slot()
        microbatches += fast.slot_microbatches(workload, bins, ended, 1)
    check(make_plan("x", workload, microbatches, stages=2, capacity=9), workload)


def test_strategies_have_names(make_workload):
    assert set(STRATEGIES) == {"fast", "fewest", "paper", "ffd", "mlora", "sequential"}
    with pytest.raises(ValueError, match="plan: unknown strategy 'best'; known: fast, fewest, ffd, mlora, paper"):
        plan_workload(make_workload(), "best", stages=1, capacity=16)
