"""`fast`: every way to pack is a plan, the one that the simulator finds fastest is taken, and each way has its use."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorafusion.core.plan import check, make_plan
from lorafusion.lab.experiments.planner import repeated_workload
from lorafusion.planning import fast, plan_workload
from lorafusion.planning.packer import ORDERS, Packer
from lorafusion.planning.simulator import chosen_costs, costs_of, even_costs, simulate, simulate_plan
from tests.conftest import job as job_of
from tests.conftest import workload as workload_of
from tests.planning.test_strategies import CAPACITY, workloads


@given(
    workload=workloads(),
    stages=st.integers(1, 4),
    data_parallel=st.integers(1, 2),
    order=st.sampled_from(list(ORDERS)),
    target=st.integers(1, CAPACITY),
    slack=st.integers(0, CAPACITY),
    ramp=st.lists(st.integers(1, CAPACITY), max_size=5),
)
def test_every_way_to_pack_is_a_plan(workload, stages, data_parallel, order, target, slack, ramp):
    trials = fast.Trials(workload.jobs, stages, CAPACITY, data_parallel)
    microbatches = [
        microbatch
        for bins, ended in trials.slots(fast.Way(target, order, slack, tuple(sorted(ramp))))
        for microbatch in fast.slot_microbatches(workload, bins, ended, data_parallel)
    ]
    sizes = {"stages": stages, "capacity": CAPACITY, "data_parallel": data_parallel}
    check(make_plan("x", workload, microbatches, **sizes), workload)


def placed(packer):
    """The adapters of each slot's bins."""
    slots = []
    while packer.streams:
        bins, _ = packer.next_slot()
        slots.append([{item.adapter for item in content} for content in bins])
    return slots


@pytest.mark.parametrize(
    ("order", "turns"),
    [("longest-way", "LOLOLOL"), ("in-hand", "LOOOL-L-L"), ("abreast", "OOOL-L-L-L"), ("nearly-done", "LOLOOL-L")],
)
def test_who_comes_first_in_a_slot(make_job, order, turns):
    """O has one global batch of three slots; L has four of one slot each, two slots apart on two stages."""
    packer = Packer(stages=2, capacity=10, order=order)
    packer.add(0, make_job("O", (10,) * 3, global_batch_size=3))
    packer.add(1, make_job("L", (10,) * 4, global_batch_size=1))
    assert "".join("OL"[bins[0].pop()] if bins else "-" for bins in placed(packer)) == turns


def test_a_slack_keeps_other_adapters_out(make_job):
    def shares(slack):
        packer = Packer(stages=1, capacity=10, slack=slack)
        packer.add(0, make_job("a", (7, 7, 7), global_batch_size=3))
        packer.add(1, make_job("b", (3, 3, 3), global_batch_size=3))
        return [bins[0] for bins in placed(packer)]

    assert shares(0) == [{0, 1}] * 3
    assert shares(3) == [{0}, {0}, {0, 1}, {1}]  # what is left of a batch is followed by the next one all the same


def test_trials_hold_the_same_part_of_every_job(make_job):
    """An order that leaves the longest job alone at the end must pay for it in a trial of the first samples too."""
    jobs = (make_job("short", (4,) * 40, global_batch_size=2), make_job("long", (9,) * 400, global_batch_size=2))
    slots = list(fast.Trials(jobs, 2, 10).slots(fast.Way(10, "nearly-done", 0), samples=110))
    counts = [sum(item.adapter == adapter for bins, _ in slots for one in bins for item in one) for adapter in (0, 1)]
    assert counts == [10, 100]


@pytest.mark.parametrize(
    ("name", "stages", "global_batch", "adapters", "way"),
    [
        ("wikisum", 2, 16, 2, (8192, "longest-way", 32, (4096, 6144))),  # full microbatches, with a ramp
        ("wikisum", 8, 8, 2, (3302, "longest-way", 825, ())),  # a lower target
        ("wikisum", 8, 8, 4, (4279, "abreast", 1069, ())),  # one beside it, in another order
        ("xsum", 4, 8, 4, (2782, "in-hand", 695, (556, 874, 1192, 1510, 1828, 2146, 2464))),  # a low and long ramp
        ("heterogeneous", 2, 8, 4, (8192, "in-hand", 32, (4096, 6144))),  # another order with a ramp
    ],
)
def test_each_thing_that_is_tried_wins_somewhere(name, stages, global_batch, adapters, way):
    workload = repeated_workload(name, 100, global_batch, adapters, 1)
    assert fast.Trials(workload.jobs, stages, 8192).fastest(even_costs(stages)).way == way


def test_the_first_and_the_last_microbatches_are_smaller_where_many_follow_each_other():
    """The last stage waits for the first microbatch to come, and the first stage for the last one to come back."""
    workload, model = repeated_workload("mixed", 32, 4, 16, 1), chosen_costs(8, "llama-3.1-70b")
    trials = fast.Trials(workload.jobs, 8, 8192)
    best = trials.fastest(model)
    level = trials.trial(model, best.way._replace(ramp=()), 512)
    assert best.throughput > 1.02 * level.throughput
    tokens = [sum(item.tokens for item in bins[0]) for bins, _ in trials.slots(best.way)]
    assert tokens[0] < 0.6 * best.way.target
    assert tokens[-1] < 0.6 * best.way.target
    assert max(tokens) > 0.9 * best.way.target


def test_targets_are_whole_tiles():
    """A GPU takes as long for a part of a tile as for all of it."""
    model = chosen_costs(8, "llama-3.1-70b")
    trials = fast.Trials(repeated_workload("mixed", 32, 4, 16, 1).jobs, 8, 8192)
    trials.fastest(model)
    assert {trial.way.target % model.tile for trial in trials._tried} == {0}


@given(workload=workloads(), order=st.sampled_from(list(ORDERS)), slack=st.integers(0, CAPACITY))
def test_without_a_crumb_it_is_a_plan_of_the_same_size(workload, order, slack):
    trials = fast.Trials(workload.jobs, 1, CAPACITY)
    before = list(trials.slots(fast.Way(CAPACITY, order, slack)))
    slots = list(fast.without_crumb(before))
    microbatches = [one for bins, ended in slots for one in fast.slot_microbatches(workload, bins, ended, 1)]
    check(make_plan("x", workload, microbatches, stages=1, capacity=CAPACITY), workload)
    assert len(slots) == len(before)
    assert slots[:-2] == before[:-2]
    counts = [[sum(item.tokens for item in items) for [items], _ in some[-2:]] for some in (before, slots)]
    assert min(counts[1]) >= min(counts[0])
    assert max(counts[1]) <= max(counts[0])


def test_the_last_two_share_samples_but_not_of_a_batch_that_must_come_first(make_job, make_workload):
    """30 and 8 tokens: 10 of b, of which no further batch is there, make it 20 and 18, and b steps after the last."""
    jobs = (make_job("a", (10, 10, 8), global_batch_size=2), make_job("b", (10,), global_batch_size=1))
    plan = plan_workload(make_workload(*jobs), "fast", stages=1, capacity=30)
    assert [one.tokens for one in plan.microbatches] == [20, 18]
    assert [one.step_after for one in plan.microbatches] == [(0,), (0, 1)]
    alone = plan_workload(make_workload(jobs[0]), "fast", stages=1, capacity=30)
    assert [one.tokens for one in alone.microbatches] == [20, 8]


@pytest.mark.parametrize("capacity", [8192, 16384, 24576, 32768])
@pytest.mark.parametrize("name", ["xsum", "cnn_dailymail", "wikisum", "mixed", "heterogeneous"])
def test_a_plan_for_one_gpu_has_no_crumb(name, capacity):
    workload = repeated_workload(name, 16, 8, 4, 1)
    *_, before, last = plan_workload(workload, "fast", stages=1, capacity=capacity).microbatches
    assert 2 * last.tokens >= before.tokens


@pytest.mark.parametrize(("adapters", "model"), [(4, "llama-3.1-70b"), (8, "llama-3.1-8b")])
def test_a_capacity_above_all_that_is_in_hand_is_not_filled(adapters, model):
    """Four samples of each adapter are far less than 65536 tokens: as one microbatch they leave 15 of 16 stages idle,
    and that once took five times as long as with 4096 tokens."""
    workload, seconds = repeated_workload("xsum", 64, 4, adapters, 1), {}
    for capacity in (4096, 65536):
        plan = plan_workload(workload, "fast", stages=16, capacity=capacity, costs=chosen_costs(16, model))
        seconds[capacity] = simulate_plan(plan, workload, model)[0].makespan
    assert seconds[65536] <= seconds[4096] * 1.02


@settings(max_examples=30)
@given(
    stages=st.sampled_from([1, 2, 3, 4, 8, 16]),
    adapters=st.sampled_from([1, 2, 3, 4, 8]),
    data_parallel=st.integers(1, 2),
    growth=st.floats(1.05, 20),
    seed=st.integers(0, 10_000),
)
def test_a_larger_capacity_does_not_make_a_plan_slower(stages, adapters, data_parallel, growth, seed):
    workload, seconds = odd_workload(seed, adapters), []
    longest = max(sample.tokens for job in workload.jobs for sample in job.samples)
    for capacity in (longest, int(longest * growth) + 1):
        plan = plan_workload(workload, "fast", stages=stages, capacity=capacity, data_parallel=data_parallel)
        seconds.append(simulate_plan(plan, workload)[0].makespan)
    assert seconds[1] <= seconds[0] * 1.02


def odd_workload(seed, adapters):
    """Adapters of 16 to 60 samples whose lengths are near each other, spread, far apart or of two kinds."""
    draw = random.Random(seed)
    length = draw.choice(
        [
            lambda: draw.randint(2, 40),
            lambda: draw.lognormvariate(6, 0.8),
            lambda: 50 * draw.paretovariate(1.1),
            lambda: draw.choice([50, 51, 2000, 2010]),
        ]
    )
    return workload_of(
        *(
            job_of(
                f"a{index}",
                [min(8000, max(2, int(length()))) for _ in range(draw.randint(16, 60))],
                global_batch_size=draw.choice([1, 2, 3, 4, 8, 16]),
            )
            for index in range(adapters)
        )
    )


def test_fewest_takes_the_order_with_the_fewest_microbatches():
    workload = repeated_workload("xsum", 100, 16, 2, 1)
    counts = {
        order: sum(1 for _ in fast.Trials(workload.jobs, 4, 8192).slots(fast.Way(8192, order, 32))) for order in ORDERS
    }
    assert min(counts.values()) < counts["longest-way"]
    assert len(plan_workload(workload, "fewest", stages=4, capacity=8192).microbatches) == min(counts.values())


def test_fast_is_never_slower_than_fewest(make_job, make_workload):
    """Whole run, short workloads of any shape, where its beginning and its end weigh much."""
    for seed in range(40):
        draw = random.Random(seed)
        jobs = [
            make_job(
                f"a{index}",
                [min(8000, max(2, int(draw.lognormvariate(6.5, 0.8)))) for _ in range(draw.choice([4, 8, 16, 32]))],
                global_batch_size=draw.choice([4, 8, 16]),
            )
            for index in range(draw.randint(1, 5))
        ]
        stages, replicas, throughput = draw.choice([1, 2, 4, 8]), draw.choice([1, 1, 2]), {}
        made = make_workload(*jobs)
        for strategy in ("fast", "fewest"):
            plan = plan_workload(made, strategy, stages=stages, capacity=8192, data_parallel=replicas)
            throughput[strategy] = simulate(plan, costs_of(plan, made, even_costs(stages))).throughput("whole")
        assert throughput["fast"] >= throughput["fewest"] * (1 - 1e-9), seed


@pytest.mark.parametrize(("name", "stages", "global_batch", "adapters"), [("xsum", 8, 64, 4), ("wikisum", 8, 64, 8)])
def test_the_beginning_of_a_long_run_does_not_decide_how_it_is_packed(name, stages, global_batch, adapters):
    workload, costs = repeated_workload(name, 1000, global_batch, adapters, 0), chosen_costs(stages, "llama-3.1-70b")

    def seconds(strategy):
        plan = plan_workload(workload, strategy, stages=stages, capacity=8192, costs=costs)
        return simulate(plan, costs_of(plan, workload, costs)).makespan

    assert seconds("fast") <= seconds("fewest")  # 1.177 and 1.033 of it where the first samples alone were asked


def test_what_the_first_samples_say_is_compared_on_more(monkeypatch):
    trials = fast.Trials(repeated_workload("wikisum", 100, 8, 3, 1).jobs, 2, 8192)
    monkeypatch.setattr(fast, "TRIED_SAMPLES", 40)
    compared = trials.fastest(even_costs(2))
    monkeypatch.setattr(fast, "COMPARED_SAMPLES", 40)
    misled = trials.fastest(even_costs(2))
    assert compared.way != misled.way
    everything = [trials.trial(even_costs(2), one.way, 300).throughput for one in (compared, misled)]
    assert everything[0] > everything[1]
