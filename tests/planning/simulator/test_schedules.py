"""Timelines: closed forms for equal costs, bounds, order, dependencies, and an independent model of the stages."""

from __future__ import annotations

import random
from collections import defaultdict

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from baselines.mlora import planner as mlora
from lorafusion.core.plan import Microbatch, Plan, Segment, statistics_of
from lorafusion.core.schema import UserError
from lorafusion.planning.common import NOOP
from lorafusion.planning.simulator import SCHEDULES, Costs, simulate
from lorafusion.planning.simulator.stream import simulate_stream
from lorafusion.planning.simulator.timeline import BACKWARD, FORWARD, STEP, run_orders

IN_ORDER = ("stream", "flush", "gpipe")


def a_plan(count, stages, steps=(), noops=(), data_parallel=1):
    """A plan that need not train anything; the schedules look at its form alone."""
    microbatches = tuple(
        NOOP
        if index in noops
        else Microbatch(
            segments=(Segment(adapter=0, samples=(index,), tokens=10 + index),),
            step_after=(0,) if index in steps else (),
        )
        for index in range(count)
    )
    return Plan(
        system="x", workload_hash="y", stages=stages, data_parallel=data_parallel, capacity=10_000,
        microbatches=microbatches, statistics=statistics_of(microbatches, 10_000),
    )  # fmt: skip


def equal_costs(plan, forward=1.0, backward=2.0, step=0.0, transfer=0.0):
    real = np.array([not one.noop for one in plan.microbatches], float)
    table = np.ones((plan.stages, len(plan.microbatches))) * real
    return Costs(forward * table, backward * table, step * table, transfer * real)


def random_costs(plan, seed):
    draw = np.random.default_rng(seed)
    real = np.array([not one.noop for one in plan.microbatches], float)
    shape = (plan.stages, len(plan.microbatches))
    steps = np.array([bool(one.step_after) for one in plan.microbatches], float)
    return Costs(
        draw.uniform(0.5, 2, shape) * real, draw.uniform(0.5, 4, shape) * real, draw.uniform(0, 1, shape) * steps,
        draw.uniform(0, 0.5, shape[1:]) * real,
    )  # fmt: skip


@pytest.mark.parametrize("stages", [1, 2, 4, 7])
@pytest.mark.parametrize("count", [1, 3, 16])
def test_a_stream_of_equal_microbatches_fills_and_drains_once(stages, count):
    plan = a_plan(count, stages)
    timeline = simulate(plan, equal_costs(plan))
    assert timeline.makespan == pytest.approx(3 * (count + stages - 1))
    assert timeline.bubble("whole") == pytest.approx([(stages - 1) / (count + stages - 1)] * stages)


@pytest.mark.parametrize("schedule", ["flush", "gpipe"])
@pytest.mark.parametrize(("stages", "batch", "batches"), [(1, 2, 3), (4, 8, 3), (4, 2, 5), (3, 1, 2)])
def test_a_schedule_that_drains_pays_for_each_batch(schedule, stages, batch, batches):
    """The bubble of 1F1B and of GPipe: (S - 1) / (S - 1 + m)."""
    plan = a_plan(batch * batches, stages, steps=range(batch - 1, batch * batches, batch))
    timeline = simulate(plan, equal_costs(plan), schedule)
    assert timeline.makespan == pytest.approx(3 * batches * (batch + stages - 1))
    assert timeline.bubble("whole") == pytest.approx([(stages - 1) / (batch + stages - 1)] * stages)


def test_gpipe_holds_all_of_a_batch_and_1f1b_at_most_the_stages():
    plan = a_plan(8, 3, steps=[7])
    costs = equal_costs(plan)
    assert [count for count, _ in simulate(plan, costs, "gpipe").peak_in_flight()] == [8, 8, 8]
    assert [count for count, _ in simulate(plan, costs, "stream").peak_in_flight()] == [3, 2, 1]
    # Stage 0 holds the three longest, which are the last; stage 2 holds the last alone.
    assert [tokens for _, tokens in simulate(plan, costs, "stream").peak_in_flight()] == [15 + 16 + 17, 16 + 17, 17]


def test_a_transfer_and_a_step_take_their_time():
    plan = a_plan(1, 3, steps=[0])
    timeline = simulate(plan, equal_costs(plan, transfer=0.25, step=0.5))
    assert timeline.makespan == pytest.approx(3 * 1 + 3 * 2 + 4 * 0.25 + 0.5)


def test_a_noop_keeps_its_turn_and_takes_no_time():
    """Where batch 1 waits for the step of batch 0, no-ops let its backward come first on every stage."""
    plan = a_plan(5, 4, steps=[0, 4], noops=[1, 2, 3])
    timeline = simulate(plan, equal_costs(plan))
    assert timeline.makespan == pytest.approx(2 * 4 * 3)  # one after the other
    assert timeline.peak_in_flight()[0] == (1, 14)


def test_data_parallel_replicas_meet_at_steps():
    plan = a_plan(4, 1, steps=[0, 3], data_parallel=2)
    costs = equal_costs(plan)
    costs.forward[0, 1] = 7.0  # the second replica's first microbatch is slow
    timeline = simulate(plan, costs)
    assert [[operation[:2] for operation in timeline.of(processor)] for processor in (0, 1)] == [
        [(kind, index) for index in own for kind in (FORWARD, BACKWARD, STEP)] for own in ((0, 2), (1, 3))
    ]
    assert timeline.starts[0][2] == timeline.starts[1][2] == 9.0


def test_sharded_ranks_wait_for_the_slowest_in_each_pass():
    plan = a_plan(4, 1, steps=[3], data_parallel=2)
    costs = equal_costs(plan, step=0.5)
    costs.forward[0, 1] = costs.backward[0, 2] = 7.0
    costs.step[0, :3] = 0.0
    timeline = simulate(plan, costs, "sharded")
    assert timeline.makespan == 7 + 2 + 1 + 7 + 0.5
    with pytest.raises(UserError, match="sharded: has no stages, but the plan has 2"):
        simulate(a_plan(2, 2), equal_costs(a_plan(2, 2)), "sharded")


def test_every_replica_steps_all_adapters_that_end_in_a_slot():
    """Two adapters end in one slot on two replicas, and each replica has a copy of both."""
    plan = a_plan(2, 1, steps=[0, 1], data_parallel=2)
    assert simulate(plan, equal_costs(plan, step=0.5)).makespan == 1 + 2 + 2 * 0.5


@pytest.mark.parametrize("replicas", [1, 2, 3])
def test_a_stream_does_what_its_order_does_step_by_step(replicas):
    """Its own loop against the one that goes through any order, with no-ops, and with fewer slots than stages."""
    for seed in range(30):
        draw = random.Random(seed)
        slots, stages = draw.randint(1, 8), draw.randint(1, 5)
        stepping = [draw.random() < 0.4 for _ in range(slots)]
        steps = [slot * replicas + draw.randrange(replicas) for slot in range(slots) if stepping[slot]]
        noops = [index for index in range(slots * replicas) if index not in steps and draw.random() < 0.2]
        plan = a_plan(slots * replicas, stages, steps, noops, replicas)
        costs = random_costs(plan, seed)
        tokens = np.array([microbatch.tokens for microbatch in plan.microbatches])
        orders = []
        for processor in range(stages * replicas):
            replica, ahead = processor // stages, stages - 1 - processor % stages
            turns = [[(FORWARD, slot * replicas + replica)] for slot in range(slots)] + [[] for _ in range(ahead)]
            for slot in range(slots):
                index = slot * replicas + replica
                turns[slot + ahead] += [(BACKWARD, index)] + [(STEP, index)] * stepping[slot]
            orders.append([operation for turn in turns for operation in turn])
        fast, slow = simulate_stream(costs, tokens, stepping, replicas), run_orders(orders, costs, tokens, replicas)
        assert fast.processors == slow.processors
        for processor in range(fast.processors):
            assert list(fast.of(processor)) == list(slow.of(processor)), seed
        assert simulate(plan, costs).makespan == fast.makespan


def greedy_case(make_job, make_workload, stages, adapters, batches):
    workload = make_workload(*(make_job(f"a{i}", (4,) * batches, global_batch_size=1) for i in range(adapters)))
    plan = mlora.plan(workload, "mlora", stages, 4)
    return plan, equal_costs(plan), workload


@pytest.mark.parametrize(("adapters", "idle"), [(1, 0.75), (2, 0.50), (4, 0.02), (8, 0.01)])
def test_mloras_order_idles_as_published(make_job, make_workload, adapters, idle):
    """Four stages, one microbatch a global batch, forward 1 and backward 2: the table of the mLoRA paper."""
    plan, costs, workload = greedy_case(make_job, make_workload, 4, adapters, 50)
    timeline = simulate(plan, costs, "greedy", workload)
    assert timeline.bubble("whole").mean() == pytest.approx(idle, abs=0.015)


@pytest.mark.parametrize("adapters", [1, 2, 4, 8])
def test_greedy_is_never_slower_than_the_same_plan_with_its_noops(make_job, make_workload, adapters):
    plan, costs, workload = greedy_case(make_job, make_workload, 4, adapters, 12)
    assert simulate(plan, costs, "greedy", workload).makespan <= simulate(plan, costs).makespan + 1e-9


shapes = st.tuples(st.integers(1, 5), st.integers(1, 12), st.integers(0, 2**32 - 1))


def drawn(shape):
    stages, count, seed = shape
    draw = random.Random(seed)
    steps = [index for index in range(count) if draw.random() < 0.3]
    noops = [index for index in range(count) if index not in steps and draw.random() < 0.2]
    plan = a_plan(count, stages, steps, noops)
    return plan, random_costs(plan, seed)


@pytest.mark.parametrize("schedule", IN_ORDER)
@given(shape=shapes)
def test_a_stage_does_one_thing_at_a_time_and_nothing_before_its_input(schedule, shape):
    plan, costs = drawn(shape)
    timeline = simulate(plan, costs, schedule)
    begun, done = defaultdict(dict), defaultdict(dict)
    for stage in range(plan.stages):
        assert np.all(timeline.ends[stage][:-1] <= timeline.starts[stage][1:] + 1e-12)
        for kind, index, start, end in timeline.of(stage):
            begun[kind][stage, index], done[kind][stage, index] = start, end
    for index, microbatch in enumerate(plan.microbatches):
        for stage in range(0 if not microbatch.noop else plan.stages, plan.stages):
            if stage:
                assert begun[FORWARD][stage, index] >= done[FORWARD][stage - 1, index] + costs.transfer[index] - 1e-12
                assert begun[BACKWARD][stage - 1, index] >= done[BACKWARD][stage, index] + costs.transfer[index] - 1e-12
            assert begun[BACKWARD][stage, index] >= done[FORWARD][stage, index]


@pytest.mark.parametrize("schedule", IN_ORDER)
@given(shape=shapes)
def test_no_makespan_below_its_bounds_and_none_falls_when_a_cost_rises(schedule, shape):
    plan, costs = drawn(shape)
    timeline = simulate(plan, costs, schedule)
    work = costs.forward.sum(1) + costs.backward.sum(1) + costs.step.sum(1)
    alone = costs.forward.sum(0) + costs.backward.sum(0) + 2 * (plan.stages - 1) * costs.transfer
    assert timeline.makespan >= max(work.max(), alone.max()) - 1e-9
    assert np.all(timeline.bubble("whole") >= -1e-12)
    slower = Costs(costs.forward * 1.0, costs.backward * 1.0, costs.step, costs.transfer)
    index = shape[2] % len(plan.microbatches)
    slower.backward[shape[2] % plan.stages, index] += 1.0
    assert simulate(plan, slower, schedule).makespan >= timeline.makespan - 1e-9


class Channels:
    """The independent model: a process for each stage, written as the runtime's loops are, that sends and receives."""

    def __init__(self):
        self.arrivals = {}

    def run(self, processes):
        times, waiting = [0.0] * len(processes), [None] * len(processes)
        finished = [False] * len(processes)
        while not all(finished):
            moved = False
            for i, process in enumerate(processes):
                while not finished[i] and (waiting[i] is None or waiting[i] in self.arrivals):
                    if waiting[i] is not None:
                        times[i] = max(times[i], self.arrivals[waiting[i]])
                        waiting[i] = None
                    try:
                        asked = next(process)
                    except StopIteration:
                        finished[i] = moved = True
                        break
                    moved = True
                    if asked[0] == "receive":
                        waiting[i] = asked[1]
                    elif asked[0] == "work":
                        times[i] += asked[1]
                    else:
                        self.arrivals[asked[1]] = times[i] + asked[2]
            assert moved, "deadlock"
        return max(times)


def process(processor, plan, costs, windows, all_first):
    """A stage of a replica. windows: slots that drain together."""
    (replica, stage), last, width = divmod(processor, plan.stages), plan.stages - 1, plan.data_parallel
    for window in windows:
        ahead = len(window) if all_first else min(last - stage, len(window))
        todo = [("f", index) for index in window[:ahead]]
        pending = list(window)
        for position in range(ahead, len(window)):
            todo += [("f", window[position]), ("b", pending.pop(0))]
        todo += [("b", index) for index in pending]
        for what, slot in todo:
            index = slot * width + replica
            if not plan.microbatches[index].noop:
                if what == "f":
                    if stage:
                        yield ("receive", ("f", stage, index))
                    yield ("work", costs.forward[stage, index])
                    if stage < last:
                        yield ("send", ("f", stage + 1, index), costs.transfer[index])
                else:
                    if stage < last:
                        yield ("receive", ("b", stage, index))
                    yield ("work", costs.backward[stage, index])
                    if stage:
                        yield ("send", ("b", stage - 1, index), costs.transfer[index])
            ended = [one for one in range(slot * width, slot * width + width) if plan.microbatches[one].step_after]
            if what == "b" and ended:
                for other in range(width):
                    yield ("send", ("reduce", stage, slot, replica, other), 0.0)
                for other in range(width):
                    yield ("receive", ("reduce", stage, slot, other, replica))
                yield ("work", sum(costs.step[stage, one] for one in ended))


@pytest.mark.parametrize("schedule", IN_ORDER)
def test_200_random_cases_equal_the_processes(schedule):
    for seed in range(200):
        draw = random.Random(seed)
        replicas, slots = draw.choice([1, 1, 2, 3]), draw.randint(1, 14)
        stepping = [draw.random() < 0.3 for _ in range(slots)]
        steps = [slot * replicas + draw.randrange(replicas) for slot in range(slots) if stepping[slot]]
        noops = [index for index in range(slots * replicas) if index not in steps and draw.random() < 0.2]
        plan = a_plan(slots * replicas, draw.randint(1, 6), steps, noops, replicas)
        costs = random_costs(plan, seed)
        windows, window = [], []
        for slot, steps_here in enumerate(stepping):
            window.append(slot)
            if schedule != "stream" and steps_here:
                windows.append(window)
                window = []
        windows += [window] if window else []
        count = plan.stages * replicas
        processes = [process(processor, plan, costs, windows, schedule == "gpipe") for processor in range(count)]
        assert simulate(plan, costs, schedule).makespan == pytest.approx(Channels().run(processes), rel=1e-12), seed


def ticks(plan, costs, workload):
    """The independent model of mLoRA's stages: whole seconds, one after the other, in which a free stage chooses."""
    stages, now, done = plan.stages, 0, 0
    real = [index for index, one in enumerate(plan.microbatches) if not one.noop]
    batches = [
        {(one.adapter, workload.jobs[one.adapter].batch_of(one.samples[0])) for one in microbatch.segments}
        for microbatch in plan.microbatches
    ]
    stepped, inside = [0] * len(workload.jobs), [0] * stages
    waiting = [{"f": [], "b": []} for _ in range(stages)]
    waiting[0]["f"] = list(real)
    doing, coming = [None] * stages, []  # (end, what, index), (time, stage, what, index)
    while done < len(real):
        for stage in range(stages):
            while doing[stage] and doing[stage][0] == now:
                _, what, index = doing[stage]
                doing[stage] = None
                delay = costs.transfer[index]
                if what == "f":
                    target = (now + delay, stage + 1, "f", index) if stage + 1 < stages else (now, stage, "b", index)
                    coming.append(target)
                if what == "b":
                    inside[stage] -= 1
                    if stage:
                        coming.append((now + delay, stage - 1, "b", index))
                    if plan.microbatches[index].step_after:
                        doing[stage] = (now + costs.step[stage, index], "s", index)
                ends = what == "s" or (what == "b" and not plan.microbatches[index].step_after)
                if ends and not stage:
                    done += 1
                    for adapter in plan.microbatches[index].step_after:
                        stepped[adapter] += 1
        for time, stage, what, index in sorted(coming):
            if time == now:
                waiting[stage][what].append(index)
        coming = [one for one in coming if one[0] > now]
        for stage in range(stages):
            if doing[stage]:
                continue
            if waiting[stage]["b"]:
                index = waiting[stage]["b"].pop(0)
                doing[stage] = (now + costs.backward[stage, index], "b", index)
            elif waiting[stage]["f"] and inside[stage] < stages - stage:
                index = waiting[stage]["f"][0]
                if stage or all(stepped[adapter] >= batch for adapter, batch in batches[index]):
                    waiting[stage]["f"].pop(0)
                    inside[stage] += 1
                    doing[stage] = (now + costs.forward[stage, index], "f", index)
        now += 1
    return now - 1


def test_200_random_cases_of_mloras_order_equal_the_ticks(make_job, make_workload):
    for seed in range(200):
        draw = random.Random(seed)
        stages = draw.randint(1, 5)
        jobs = [
            make_job(f"a{index}", (4,) * draw.randint(1, 8), global_batch_size=draw.randint(1, 4))
            for index in range(draw.randint(1, 5))
        ]
        workload = make_workload(*jobs)
        plan = mlora.plan(workload, "mlora", stages, 8)
        shape, steps = (stages, len(plan.microbatches)), [bool(one.step_after) for one in plan.microbatches]
        numbers = np.random.default_rng(seed)
        costs = Costs(
            numbers.integers(1, 5, shape).astype(float), numbers.integers(1, 9, shape).astype(float),
            numbers.integers(1, 4, shape) * np.array(steps, float), numbers.integers(1, 3, shape[1:]).astype(float),
        )  # fmt: skip
        assert simulate(plan, costs, "greedy", workload).makespan == ticks(plan, costs, workload), seed


def test_orders_that_wait_for_each_other_are_refused():
    plan = a_plan(1, 2)
    orders = [[(BACKWARD, 0), (FORWARD, 0)], [(FORWARD, 0), (BACKWARD, 0)]]
    with pytest.raises(UserError, match="stage 0 waits for ever for the backward of microbatch 0"):
        run_orders(orders, equal_costs(plan), np.array([10]))


def test_mistakes_are_named():
    plan = a_plan(3, 2)
    with pytest.raises(UserError, match="unknown schedule 'zigzag'; known: flush, gpipe, greedy, sharded, stream"):
        simulate(plan, equal_costs(plan), "zigzag")
    with pytest.raises(UserError, match="costs: 2 stages and 2 microbatches, but the plan has 2 and 3"):
        simulate(plan, equal_costs(a_plan(2, 2)))
    with pytest.raises(UserError, match="backward has the shape"):
        Costs(np.ones((2, 3)), np.ones((2, 2)), np.ones((2, 3)), np.ones(3))
    with pytest.raises(UserError, match="step has times that are negative or not finite"):
        Costs(np.ones((2, 3)), np.ones((2, 3)), -np.ones((2, 3)), np.ones(3))
    with pytest.raises(UserError, match="greedy: needs the plan's workload"):
        simulate(plan, equal_costs(plan), "greedy")
    assert set(SCHEDULES) == {"stream", "flush", "gpipe", "greedy", "sharded"}
