"""The packer: exact filling, urgency, jobs that come and go, and bounds that no plan goes below."""

from __future__ import annotations

from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorafusion.core.plan import check, make_plan
from lorafusion.core.schema import UserError
from lorafusion.planning import STRATEGIES, bounds, fast, plan_workload
from lorafusion.planning.packer import BY_PRIORITY, JOB_BY_JOB, Item, Packer, fill
from lorafusion.planning.simulator import even_costs

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


@pytest.mark.parametrize(
    ("lengths", "room", "least"),
    [
        ((100_001, 99_999, 50_000), 200_000, 200_000),
        ((70_001, 70_001), 70_001, 70_001),
        ((101,) * 20_000, 1_000_000, 999_900),
        ((200_000,), 200_000, 200_000),
    ],
)
def test_large_rooms_are_filled_too(lengths, room, least):
    """Their lengths were once counted in units, so that a sample as long as the room found no place, ever."""
    chosen = fill([[Item(tokens, 0, position) for position, tokens in enumerate(lengths)]], room, 0)
    assert least <= sum(item.tokens for item in chosen) <= room
    assert len({item.position for item in chosen}) == len(chosen)


@pytest.mark.parametrize("data_parallel", [1, 2])
def test_capacities_beyond_the_exact_room_are_planned(make_job, make_workload, data_parallel):
    workload = make_workload(make_job("a", (70_001, 70_001, 150_003), global_batch_size=2))
    for capacity in (150_003, 200_000):
        plan = plan_workload(workload, "fast", stages=2, capacity=capacity, data_parallel=data_parallel)
        check(plan, workload)


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


def order_of(packer):
    """The names of the jobs in each slot until all are done."""
    names = {adapter: stream.job.name for adapter, stream in packer.streams.items()}
    slots = []
    while packer.streams:
        bins, _ = packer.next_slot()
        slots.append("".join(sorted({names[item.adapter] for content in bins for item in content})) or "-")
    return " ".join(slots)


def packer_of(jobs, order, stages=1):
    packer = Packer(stages=stages, capacity=10, order=order)
    for adapter, job in enumerate(jobs):
        packer.add(adapter, job)
    return packer


UNGUARDED = next(iter(BY_PRIORITY))


@pytest.mark.parametrize(
    ("changes", "order"),
    [
        ({}, "c b b a a a"),  # the shortest job first
        ({"a": {"weight": 4.0}}, "a a a c b b"),  # 30 tokens over 4 are less than 10
        ({"a": {"weight": 2.0}}, "c a a a b b"),  # 30 over 2 are less than 20 and more than 10
        ({"a": {"priority": 1}}, "a a a c b b"),
        ({"a": {"priority": 1}, "b": {"priority": 2}}, "b b a a a c"),
        ({"c": {"priority": -1}}, "b b a a a c"),
        ({"a": {"priority": 1}, "c": {"weight": 1e6}}, "a a a c b b"),  # a weight counts among equals alone
    ],
)
def test_jobs_come_by_priority_and_then_by_tokens_left_over_weight(make_job, changes, order):
    lengths = {"a": (10,) * 3, "b": (10,) * 2, "c": (10,)}
    jobs = [make_job(name, lengths[name], global_batch_size=1, **changes.get(name, {})) for name in lengths]
    assert order_of(packer_of(jobs, UNGUARDED)) == order


def test_orders_without_priorities_do_not_look_at_them(make_job):
    first = make_job("a", (10,) * 3, global_batch_size=1, priority=1)
    jobs = [first, make_job("b", (10,) * 2, global_batch_size=1)]
    assert order_of(packer_of(jobs, next(iter(JOB_BY_JOB)))) == "b b a a a"
    assert order_of(packer_of(jobs, UNGUARDED)) == "a a a b b"


def test_a_job_counts_by_what_it_has_left(make_job):
    jobs = (make_job("a", (10,) * 4, global_batch_size=1, start=2), make_job("b", (10,) * 3, global_batch_size=1))
    packer = Packer(stages=1, capacity=10, order=UNGUARDED)
    for adapter, job in enumerate(jobs):
        packer.add(adapter, job, job.start)
    assert order_of(packer) == "a a b b b"


def test_the_guard_keeps_the_longest_way_moving(make_job):
    """On three stages L takes 13 slots whatever else is done; the others fit in between, and their order is kept."""
    jobs = [make_job("L", (10,) * 5, global_batch_size=1)]
    jobs += [make_job(name, (10,) * 2, global_batch_size=2, priority=1) for name in "abc"]
    assert order_of(packer_of(jobs, UNGUARDED, stages=3)) == "a a b b c c L - - L - - L - - L - - L"
    assert order_of(packer_of(jobs, "by-priority-0.9", stages=3)) == "L a a L b b L c c L - - L"


@pytest.mark.parametrize(
    ("guard", "order"),
    [("inf", "a a b b c c d d e e Z - - Z"), ("0.97", "a a b b c c d d Z e e Z"), ("0.5", "a a b b Z c c d d e Z e")],
)
def test_who_waits_is_looked_at_again_when_little_else_is_left(make_job, guard, order):
    """Z has two batches, three slots apart, and waits from the beginning; no slot is empty where it goes in time."""
    jobs = [make_job("Z", (10, 10), global_batch_size=1)]
    jobs += [make_job(name, (6, 4) * 2, global_batch_size=4, weight=100.0) for name in "abcde"]
    assert order_of(packer_of(jobs, f"by-priority-{guard}", stages=3)) == order


def test_a_job_that_comes_later_goes_before_lower_priorities(make_job):
    packer = packer_of([make_job("a", (10,) * 3, global_batch_size=1)], UNGUARDED)
    packer.add(1, make_job("b", (10,) * 3, global_batch_size=1))
    packer.next_slot()
    packer.add(2, make_job("c", (10,) * 9, global_batch_size=1, priority=1))
    assert order_of(packer) == "c " * 9 + "a a b b b"
    packer = packer_of([make_job("a", (10,) * 3, global_batch_size=1)], UNGUARDED)
    packer.add(1, make_job("b", (10,) * 2, global_batch_size=1))
    packer.withdraw(1)
    assert order_of(packer) == "a a a"


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


def test_an_adapter_that_comes_back_waits_for_its_own_step(make_job):
    packer, job = Packer(stages=3, capacity=12), make_job("a", (6,) * 8, global_batch_size=2)
    packer.add(0, job)
    packer.next_slot()
    packer.withdraw(0)
    packer.add(0, job, batch=1)
    slots = [packer.next_slot()[0] for _ in range(3)]
    assert [len(bins) for bins in slots] == [0, 0, 1]


def test_mistakes_of_the_packers_owner_are_named(make_job):
    packer, job = Packer(stages=1, capacity=12), make_job("a", (6,) * 8, global_batch_size=2)
    packer.add(0, job)
    with pytest.raises(UserError, match="adapter 0 is there already"):
        packer.add(0, job)
    with pytest.raises(UserError, match="'a' has 4 global batches, found 4"):
        packer.add(1, job, batch=4)
    with pytest.raises(UserError, match="adapter 5 is not there"):
        packer.withdraw(5)
    with pytest.raises(UserError, match="a sample of 'b' has 13 tokens, the capacity is 12"):
        packer.add(1, make_job("b", (13,)))


def test_a_sample_longer_than_the_target_is_alone(make_job):
    """One long sample must not make all microbatches as long."""
    packer = Packer(stages=1, capacity=100, target=10)
    packer.add(0, make_job("a", (90, 5, 5, 4, 4, 2), global_batch_size=6))
    loads = []
    while packer.streams:
        bins, _ = packer.next_slot()
        loads.append(sum(item.tokens for content in bins for item in content))
    assert loads == [90, 10, 10]


def test_a_job_resumes_at_a_batch(make_job):
    packer = Packer(stages=1, capacity=12)
    packer.add(0, make_job("a", (6,) * 8, global_batch_size=2), batch=3)
    bins, _ = packer.next_slot()
    assert [item.position for item in bins[0]] == [6, 7]
    assert not packer.streams


def test_a_job_ends_before_a_batch(make_job):
    packer, job = Packer(stages=1, capacity=12), make_job("a", (6,) * 8, global_batch_size=2)
    packer.add(0, job, batch=1, end=3)
    bins = [packer.next_slot()[0] for _ in range(2)]
    assert [[item.position for item in one[0]] for one in bins] == [[2, 3], [4, 5]]
    assert not packer.streams
    for batch, end in ((2, 2), (1, 5)):
        with pytest.raises(UserError, match=f"'a' has 4 global batches, found {batch} to {end}"):
            packer.add(0, job, batch, end)


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
    assert fast.Trials(workload.jobs, 4, 80).fastest(even_costs(4)).way.target < 80
    assert fast.Trials(workload.jobs, 1, 80).fastest(even_costs(1)).way.target == 80


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


@pytest.mark.parametrize("name", ["stages", "capacity", "data_parallel"])
def test_sizes_below_one_are_refused(make_workload, name):
    sizes = {"stages": 1, "capacity": 16, "data_parallel": 1} | {name: 0}
    with pytest.raises(UserError, match=f"plan: {name} must be at least 1, found 0"):
        plan_workload(make_workload(), "fast", **sizes)


def test_strategies_have_names(make_workload):
    assert set(STRATEGIES) == {"fast", "fewest", "paper", "ffd", "mlora", "sequential"}
    with pytest.raises(ValueError, match="plan: unknown strategy 'best'; known: fast, fewest, ffd, mlora, paper"):
        plan_workload(make_workload(), "best", stages=1, capacity=16)
