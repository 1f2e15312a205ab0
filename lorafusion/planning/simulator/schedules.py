"""In which order a stage does its forwards and backwards.

`stream`    1F1B without flush, in the plan's order, no-ops keeping their slots: LoRAFusion's executor.
`flush`     1F1B that drains after each slot with a step, as megatron-core's does at each global batch.
`gpipe`     all forwards of a global batch, then all its backwards.
`greedy`    mLoRA's: a stage does a backward if one is there, else a forward if fewer than S - stage are under way; the
            head waits until an adapter's step is done before its next global batch enters. Needs no no-ops.
`sharded`   fully sharded data parallel: no stages; every rank waits for the slowest at each pass of a slot.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Iterator

import numpy as np

from lorafusion.core.plan import Plan
from lorafusion.core.schema import UserError, one_of
from lorafusion.core.workload import Workload
from lorafusion.planning.simulator.costs import Costs
from lorafusion.planning.simulator.sharing import ends_together, run_shared
from lorafusion.planning.simulator.stream import simulate_stream
from lorafusion.planning.simulator.timeline import BACKWARD, FORWARD, STEP, Operation, OrderedRun, Timeline, run_orders


def simulate(plan: Plan, costs: Costs, schedule: str | None = None, workload: Workload | None = None) -> Timeline:
    """The timeline of a plan; without a schedule, the one that its executor has: `flush` or `stream`.

    workload: that the plan is for, which `greedy` needs to know an adapter's global batches. Raises `UserError` for an
    unknown schedule, a table of other sizes, and a schedule that the plan cannot have.
    """
    name = schedule or ("flush" if plan.flush else "stream")
    one_of("schedule", name, set(SCHEDULES), "simulate")
    if costs.stages != plan.stages or costs.microbatches != len(plan.microbatches):
        raise UserError(
            f"costs: {costs.stages} stages and {costs.microbatches} microbatches, but the plan has {plan.stages} and "
            f"{len(plan.microbatches)}"
        )
    tokens = np.array([microbatch.tokens for microbatch in plan.microbatches], np.int64)
    return SCHEDULES[name](plan, costs, tokens, workload)


def _stepping(plan: Plan) -> list[bool]:
    """For each slot, does an optimizer step after it?"""
    return [any(microbatch.step_after for microbatch in replicas) for replicas in plan.slots()]


def _windows(stepping: list[bool]) -> Iterator[range]:
    """Runs of slots, each ended by one with a step."""
    begin = 0
    for slot, steps in enumerate(stepping):
        if steps:
            yield range(begin, slot + 1)
            begin = slot + 1
    if begin < len(stepping):
        yield range(begin, len(stepping))


def _orders(
    stages: int, stepping: list[bool], data_parallel: int, ahead_of_all: bool = False, flush: bool = True
) -> list[list[Operation]]:
    """Every processor's operations. ahead_of_all: all forwards of a window come before its backwards. flush: windows
    end with steps."""
    orders, windows = [], list(_windows(stepping)) if flush else [range(len(stepping))]
    for replica in range(data_parallel):
        for stage in range(stages):
            order: list[Operation] = []
            for window in windows:
                ahead = len(window) if ahead_of_all else min(stages - 1 - stage, len(window))
                for turn in range(len(window) + ahead):
                    if turn < len(window):
                        order.append((FORWARD, window[turn] * data_parallel + replica))
                    if turn >= ahead:
                        slot = window[turn - ahead]
                        order.append((BACKWARD, slot * data_parallel + replica))
                        if stepping[slot]:
                            order.append((STEP, slot * data_parallel + replica))
            orders.append(order)
    return orders


def _stream(plan: Plan, costs: Costs, tokens: np.ndarray, workload: Workload | None) -> Timeline:
    if costs.cores:
        return _in_orders(_orders(plan.stages, _stepping(plan), plan.data_parallel, flush=False), plan, costs, tokens)
    return simulate_stream(costs, tokens, _stepping(plan), plan.data_parallel)


def _in_orders(orders: list[list[Operation]], plan: Plan, costs: Costs, tokens: np.ndarray) -> Timeline:
    if costs.cores:
        return run_shared(OrderedRun(orders, costs, tokens, plan.data_parallel), costs)
    return run_orders(orders, costs, tokens, plan.data_parallel)


def _draining(ahead_of_all: bool) -> Callable[..., Timeline]:
    def schedule(plan: Plan, costs: Costs, tokens: np.ndarray, workload: Workload | None) -> Timeline:
        orders = _orders(plan.stages, _stepping(plan), plan.data_parallel, ahead_of_all)
        return _in_orders(orders, plan, costs, tokens)

    return schedule


def _sharded(plan: Plan, costs: Costs, tokens: np.ndarray, workload: Workload | None) -> Timeline:
    if plan.stages > 1:
        raise UserError(f"schedule sharded: has no stages, but the plan has {plan.stages}")
    width, time = plan.data_parallel, 0.0
    operations: list[list[Operation]] = [[] for _ in range(width)]
    starts: list[list[float]] = [[] for _ in range(width)]
    ends: list[list[float]] = [[] for _ in range(width)]
    for slot, steps in enumerate(_stepping(plan)):
        of_slot = range(slot * width, (slot + 1) * width)
        passes = [(FORWARD, costs.forward[0, of_slot]), (BACKWARD, costs.backward[0, of_slot])]
        if steps:
            passes.append((STEP, np.full(width, costs.step[0, of_slot].sum())))
        for kind, seconds in passes:
            done = time + (ends_together(seconds, costs) if costs.cores else seconds)
            for replica, index in enumerate(of_slot):
                operations[replica].append((kind, index))
                starts[replica].append(time)
                ends[replica].append(float(done[replica]))
            time = max(seconds[-1] for seconds in ends)  # layers are gathered together: nobody is ahead by a pass
    return Timeline.of_operations(1, operations, starts, ends, tokens)


def _greedy(plan: Plan, costs: Costs, tokens: np.ndarray, workload: Workload | None) -> Timeline:
    if workload is None:
        raise UserError("schedule greedy: needs the plan's workload, to know where global batches begin")
    if plan.data_parallel > 1:
        raise UserError(f"schedule greedy: has no data parallelism, but the plan has {plan.data_parallel} replicas")
    return _Greedy(plan, costs, tokens, workload).run()


class _Greedy:
    """Stages that choose what to do when they are free; events are arrivals and ends, in the order of time."""

    def __init__(self, plan: Plan, costs: Costs, tokens: np.ndarray, workload: Workload) -> None:
        self.plan, self.costs, self.tokens, self.stages = plan, costs, tokens, plan.stages
        self.forwards: list[deque[int]] = [deque() for _ in range(self.stages)]
        self.backwards: list[deque[int]] = [deque() for _ in range(self.stages)]
        self.forwards[0].extend(index for index, item in enumerate(plan.microbatches) if not item.noop)
        self.under_way, self.busy = [0] * self.stages, [False] * self.stages
        self.batches = [  # of each microbatch: (adapter, global batch)
            [(part.adapter, workload.jobs[part.adapter].batch_of(part.samples[0])) for part in microbatch.segments]
            for microbatch in plan.microbatches
        ]
        self.stepped = [0] * len(workload.jobs)  # global batches whose step the head has done
        self.operations: list[list[Operation]] = [[] for _ in range(self.stages)]
        self.starts: list[list[float]] = [[] for _ in range(self.stages)]
        self.ends: list[list[float]] = [[] for _ in range(self.stages)]
        self.events: list[tuple[float, int, int, int]] = []  # time, stage, kind or ARRIVED + kind, microbatch

    def run(self) -> Timeline:
        self.choose(0, 0.0)
        while self.events:
            now = self.events[0][0]
            touched = set()
            while self.events and self.events[0][0] == now:
                _, stage, kind, index = heapq.heappop(self.events)
                touched.add(stage)
                self.happened(now, stage, kind, index)
            for stage in sorted(touched):
                self.choose(stage, now)
        return Timeline.of_operations(self.stages, self.operations, self.starts, self.ends, self.tokens)

    def happened(self, now: float, stage: int, kind: int, index: int) -> None:
        """An operation's end, or the arrival of what it sent (kinds from ARRIVED on)."""
        if kind >= ARRIVED:
            (self.forwards if kind - ARRIVED == FORWARD else self.backwards)[stage].append(index)
            return
        steps = self.plan.microbatches[index].step_after
        if kind == STEP:
            self.busy[stage] = False
            if not stage:
                for adapter in steps:
                    self.stepped[adapter] += 1
            return
        self.busy[stage] = kind == BACKWARD and bool(steps)  # the step follows
        sent = now + float(self.costs.transfer[index])
        if kind == FORWARD:
            if stage + 1 < self.stages:
                heapq.heappush(self.events, (sent, stage + 1, ARRIVED + FORWARD, index))
            else:
                self.backwards[stage].append(index)
            return
        self.under_way[stage] -= 1
        if stage:
            heapq.heappush(self.events, (sent, stage - 1, ARRIVED + BACKWARD, index))

    def choose(self, stage: int, now: float) -> None:
        if self.busy[stage]:
            return
        if self.backwards[stage]:
            index = self.backwards[stage].popleft()
            self.begin(stage, BACKWARD, index, now, float(self.costs.backward[stage, index]))
        elif self.forwards[stage] and self.under_way[stage] < self.stages - stage and self.may_enter(stage):
            index = self.forwards[stage].popleft()
            self.under_way[stage] += 1
            self.begin(stage, FORWARD, index, now, float(self.costs.forward[stage, index]))

    def may_enter(self, stage: int) -> bool:
        if stage:
            return True
        return all(self.stepped[adapter] >= batch for adapter, batch in self.batches[self.forwards[0][0]])

    def begin(self, stage: int, kind: int, index: int, now: float, seconds: float) -> None:
        self.operations[stage].append((kind, index))
        self.starts[stage].append(now)
        self.ends[stage].append(now + seconds)
        self.busy[stage] = True
        heapq.heappush(self.events, (now + seconds, stage, kind, index))
        if kind == BACKWARD and self.plan.microbatches[index].step_after:
            self.begin(stage, STEP, index, now + seconds, float(self.costs.step[stage, index]))


ARRIVED = 10
SCHEDULES: dict[str, Callable[[Plan, Costs, np.ndarray, Workload | None], Timeline]] = {
    "stream": _stream,
    "flush": _draining(ahead_of_all=False),
    "gpipe": _draining(ahead_of_all=True),
    "greedy": _greedy,
    "sharded": _sharded,
}
