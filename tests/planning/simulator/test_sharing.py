"""Processes that share cores: how fast they go, and when what they do ends."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from lorafusion.core.plan import Microbatch, Plan, Segment, statistics_of
from lorafusion.core.schema import UserError
from lorafusion.planning.simulator import CostModel, simulate
from lorafusion.planning.simulator.costs import Costs
from lorafusion.planning.simulator.schedules import _orders
from lorafusion.planning.simulator.sharing import ends_together, run_shared
from lorafusion.planning.simulator.timeline import FORWARD, OrderedRun, run_orders

STEPPING = [False, False, True, False, True, True]


def costs_of(stages: int, microbatches: int, cores: int) -> Costs:
    generator = np.random.default_rng(stages)
    forward, backward, step = generator.uniform(0.5, 2, (3, stages, microbatches))
    transfer = generator.uniform(0, 0.3, microbatches)
    return Costs(forward, backward, step * np.array(STEPPING), transfer, cores)


def shared(costs: Costs, flush: bool = False):
    orders = _orders(costs.stages, STEPPING, 1, flush=flush)
    tokens = np.ones(costs.microbatches, np.int64)
    return run_shared(OrderedRun(orders, costs, tokens, 1), costs), run_orders(orders, costs, tokens)


@pytest.mark.parametrize("flush", [False, True])
@pytest.mark.parametrize("stages", [1, 2, 4])
def test_with_a_core_each_processes_go_as_if_alone(stages, flush):
    ours, alone = shared(costs_of(stages, 6, cores=stages), flush)
    for of_ours, of_alone in zip(ours.ends, alone.ends, strict=True):
        np.testing.assert_allclose(of_ours, of_alone)


@pytest.mark.parametrize("cores", [1, 2, 3])
def test_cores_that_are_all_busy_do_all_the_work_there_is(cores):
    """No process waits for another one here, so the cores are idle only when there are fewer processes."""
    work = np.array([3.0, 1.0, 2.0, 2.0])
    costs = Costs(np.diag(work), np.zeros((4, 4)), np.zeros((4, 4)), np.zeros(4), cores)
    orders = [[(FORWARD, 0)], [], [], []]
    assert run_shared(OrderedRun(orders, costs, np.ones(4, np.int64), 1), costs).makespan == pytest.approx(3.0)
    ends = ends_together(work, costs)
    idle = sum(
        max(0, cores - busy) * time for busy, time in zip((4, 3, 2, 1), np.diff([0, *sorted(ends)]), strict=True)
    )
    assert cores * ends.max() - idle == pytest.approx(work.sum())


def test_four_equal_processes_on_two_cores_take_twice_as_long():
    costs = Costs(np.ones((1, 4)), np.ones((1, 4)), np.zeros((1, 4)), np.zeros(4), 2)
    assert ends_together(np.ones(4), costs).tolist() == [2.0] * 4


def test_a_pipeline_on_fewer_cores_takes_longer_and_no_less_than_its_work():
    costs = costs_of(4, 6, cores=2)
    ours, alone = shared(costs)
    work = (costs.forward + costs.backward + costs.step).sum()
    assert alone.makespan < ours.makespan < 2 * alone.makespan
    assert ours.makespan > work / 2
    for starts, ends, whole in zip(ours.starts, ours.ends, (costs.forward + costs.backward + costs.step).sum(1),
                                   strict=True):  # fmt: skip
        assert (ends - starts).sum() >= whole - 1e-9


def test_orders_that_wait_for_each_other_are_an_error():
    costs = costs_of(2, 6, cores=1)
    orders = [[(1, 0), (0, 0)], [(0, 0), (1, 0)]]
    with pytest.raises(UserError, match="stage 0 waits for ever for the backward of microbatch 0"):
        run_shared(OrderedRun(orders, costs, np.ones(6, np.int64), 1), costs)


def test_on_a_cpu_both_ends_of_a_message_pay_for_it():
    model = CostModel(layers=(1, 1, 1), token=1.0, latency=0.5, transfer=0.1, step=1.0)
    held = [np.array(values, float) for values in ([10, 0], [0, 0], [1, 0], [1, 0])]
    alone, together = model.costs(*held), model.model_copy(update={"cores": 2}).costs(*held)
    assert together.cores == 2
    assert (together.forward - alone.forward).tolist() == [[1.5, 0], [3.0, 0], [1.5, 0]]
    np.testing.assert_allclose(together.backward - alone.backward, together.forward - alone.forward)
    assert (together.step - alone.step).tolist() == [[1.0, 0], [2.0, 0], [1.0, 0]]
    assert together.transfer.tolist() == alone.transfer.tolist() == [1.5, 0]


@pytest.mark.parametrize(
    ("schedule", "stages", "replicas"), [("stream", 3, 1), ("flush", 3, 1), ("gpipe", 2, 1), ("sharded", 1, 3)]
)
def test_on_one_core_every_schedule_takes_as_long_as_its_work(schedule, stages, replicas):
    count = 6 * replicas
    microbatches = tuple(Microbatch(segments=(Segment(adapter=0, samples=(index,), tokens=10),),
                                    step_after=(0,) if index % 4 == 3 else ()) for index in range(count))  # fmt: skip
    plan = Plan(system="x", workload_hash="y", stages=stages, data_parallel=replicas, capacity=100,
                microbatches=microbatches, statistics=statistics_of(microbatches, 100))  # fmt: skip
    draw = np.random.default_rng(0).uniform(0.5, 2, (2, stages, count))
    costs = Costs(*draw, np.zeros((stages, count)), np.zeros(count), cores=1)
    assert simulate(plan, costs, schedule).makespan == pytest.approx(draw.sum())
    assert simulate(plan, replace(costs, cores=0), schedule).makespan < 0.9 * draw.sum()
