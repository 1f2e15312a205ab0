"""`fast`: every way to pack is a plan, the one that the simulator finds fastest is taken, and each way has its use."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorafusion.plan import check, make_plan
from lorafusion.scheduler import fast, plan_workload
from lorafusion.scheduler.packer import ORDERS, Packer
from lorafusion.simulator import even_costs
from tests.scheduler.test_strategies import CAPACITY, workloads


@given(
    workload=workloads(),
    stages=st.integers(1, 4),
    data_parallel=st.integers(1, 2),
    order=st.sampled_from(list(ORDERS)),
    target=st.integers(1, CAPACITY),
    slack=st.integers(0, CAPACITY),
)
def test_every_way_to_pack_is_a_plan(workload, stages, data_parallel, order, target, slack):
    trials = fast.Trials(workload.jobs, stages, CAPACITY, data_parallel)
    microbatches = [
        microbatch
        for bins, ended in trials.slots(fast.Way(target, order, slack))
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

    assert shares(0)[:2] == [{0, 1}, {0, 1}]
    assert shares(3)[:2] == [{0}, {0}]


def test_trials_hold_the_same_part_of_every_job(make_job):
    """An order that leaves the longest job alone at the end must pay for it in a trial of the first samples too."""
    jobs = (make_job("short", (4,) * 40, global_batch_size=2), make_job("long", (9,) * 400, global_batch_size=2))
    slots = list(fast.Trials(jobs, 2, 10).slots(fast.Way(10, "nearly-done", 0), samples=110))
    counts = [sum(item.adapter == adapter for bins, _ in slots for one in bins for item in one) for adapter in (0, 1)]
    assert counts == [10, 100]


@pytest.mark.parametrize("stages", [2, 4])
@pytest.mark.parametrize("adapters", [2, 3])
def test_nothing_that_was_tried_is_faster(make_job, make_workload, stages, adapters):
    lengths = [((10, 11, 9, 3) * 24), ((30, 2, 2, 17) * 24), ((6, 8) * 48)]
    jobs = [make_job(f"a{index}", lengths[index], global_batch_size=8) for index in range(adapters)]
    trials, model = fast.Trials(tuple(jobs), stages, 80), even_costs(stages)
    best = trials.fastest(model)
    for target in (80, 60, 44, 32, 24):
        for slack in (0, target // 4):
            # Neighbours may hide a little: orders are tried at one target only.
            other = trials.trial(model, fast.Way(target, "longest-way", slack), 10_000)
            assert best.throughput >= other.throughput * 0.99
    made = {name: plan_workload(make_workload(*jobs), name, stages=stages, capacity=80) for name in ("fast", "fewest")}
    assert len(made["fewest"].microbatches) <= len(made["fast"].microbatches)
