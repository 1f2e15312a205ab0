"""Packed slot by slot, to the tokens a microbatch that the simulator finds fastest.

Full microbatches are the fewest, but not always the fastest: where the dependency rule leaves slots empty or nearly so,
smaller microbatches of equal size take the same turns with less waiting. So the capacity is an upper limit here, and a
few lower ones are tried on the first samples of the jobs.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from lorafusion.plan import Microbatch, Plan, make_plan
from lorafusion.scheduler.common import NOOP, by_adapter, microbatches_of, require_samples_fit
from lorafusion.scheduler.packer import Item, Packer
from lorafusion.simulator.costs import CostModel, Costs, even_costs
from lorafusion.simulator.schedules import simulate_stream
from lorafusion.workload import Job, Workload

FRACTIONS = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.22, 0.16)  # of the capacity, that are tried
TRIED_SAMPLES, TRIED_BATCHES = 2000, 3  # of all jobs together, or global batches of each where that is more
COMPARED_SAMPLES = 20_000
GOOD_BUBBLE = 0.015  # of full microbatches, beyond what uneven stages cost, with which nothing else is tried
GAIN = 0.01  # of the throughput, for which a lower capacity is worth more microbatches

Slots = list[tuple[list[list[Item]], set[int]]]


def plan(
    workload: Workload,
    system: str,
    stages: int,
    capacity: int,
    data_parallel: int = 1,
    costs: CostModel | None = None,
) -> Plan:
    """A plan of little waiting; costs: of the stages, by default of equal ones."""
    require_samples_fit(workload, capacity)
    model = costs or even_costs(stages)
    target = fastest(workload, stages, capacity, data_parallel, model).target
    return _plan(workload, system, stages, capacity, data_parallel, target)


def fewest(workload: Workload, system: str, stages: int, capacity: int, data_parallel: int = 1) -> Plan:
    """A plan of few microbatches, whatever the time: all as full as can be."""
    require_samples_fit(workload, capacity)
    return _plan(workload, system, stages, capacity, data_parallel, capacity)


def _plan(workload: Workload, system: str, stages: int, capacity: int, data_parallel: int, target: int) -> Plan:
    microbatches = [
        microbatch
        for bins, ended in pack(workload.jobs, stages, capacity, data_parallel, target)
        for microbatch in slot_microbatches(workload, bins, ended, data_parallel)
    ]
    return make_plan(system, workload, microbatches, stages=stages, capacity=capacity, data_parallel=data_parallel)


def pack(
    jobs: tuple[Job, ...],
    stages: int,
    capacity: int,
    data_parallel: int,
    target: int,
    samples: int | None = None,
) -> Slots:
    """The slots of jobs, empty ones included; not many more than hold a number of samples, where it is given."""
    packer = Packer(stages, capacity, data_parallel, target)
    for adapter, job in enumerate(jobs):
        packer.add(adapter, job)
    slots: Slots = []
    placed = 0
    while packer.streams and (samples is None or placed < samples):
        slots.append(packer.next_slot())
        placed += sum(map(len, slots[-1][0]))
    return slots


def slot_microbatches(
    workload: Workload, bins: list[list[Item]], ended: set[int], data_parallel: int
) -> list[Microbatch]:
    """A slot's microbatches, of which each adapter's last one steps it; no-ops where bins are missing."""
    contents = [by_adapter((item.adapter, item.position) for item in items) for items in bins]
    return microbatches_of(workload, contents, ended) + [NOOP] * (data_parallel - len(bins))


class Trial(NamedTuple):
    """Tokens of a microbatch with what the simulator predicts for them, steady: tokens a second, the bubble, and what
    of it stages of equal size would have too."""

    target: int
    throughput: float
    bubble: float
    waiting: float


def fastest(workload: Workload, stages: int, capacity: int, data_parallel: int, model: CostModel) -> Trial:
    """The tokens of a microbatch, up to the capacity, at which the first samples train at the highest simulated
    throughput; of those within GAIN of it the most."""

    def trial(tried: int, samples: int) -> Trial:
        slots = pack(workload.jobs, stages, capacity, data_parallel, tried, samples)
        costs, tokens = _costs(slots, data_parallel, model)
        timeline = simulate_stream(costs, tokens, [bool(ended) for _, ended in slots], data_parallel)
        bubble = float(timeline.bubble("steady").mean())
        return Trial(tried, timeline.throughput("steady"), bubble, bubble - _uneven(costs))

    first = max(TRIED_SAMPLES, TRIED_BATCHES * sum(job.global_batch_size for job in workload.jobs))
    full = trial(capacity, first)
    if full.waiting <= GOOD_BUBBLE:
        return full
    trials = [full]
    for tried in (int(capacity * fraction) for fraction in FRACTIONS):
        if tried < 1 or _falling([one.throughput for one in trials]):
            break
        trials.append(trial(tried, first))
    most = max(one.throughput for one in trials)
    best = next(one for one in trials if one.throughput >= most * (1 - GAIN))
    if best is full:
        return full
    # The first samples may mislead: a lower capacity must be faster with more of them too.
    full, best = trial(capacity, COMPARED_SAMPLES), trial(best.target, COMPARED_SAMPLES)
    return best if best.throughput > full.throughput * (1 + GAIN) else full


def _falling(values: list[float]) -> bool:
    """Were the last two below the largest, and the last the lowest of them?"""
    return len(values) > 2 and values[-1] < values[-2] < max(values) * (1 - GAIN / 2)


def _uneven(costs: Costs) -> float:
    """The bubble that no order takes away: the idle share of stages that have less to do than the slowest."""
    work = costs.forward.sum(axis=1) + costs.backward.sum(axis=1)
    return 1 - float(work.mean() / work.max())


def _costs(slots: Slots, data_parallel: int, model: CostModel) -> tuple[Costs, np.ndarray]:
    """The cost table of slots and their microbatches' tokens."""
    held, steps = [], []
    for bins, ended in slots:
        bins = bins + [[]] * (data_parallel - len(bins))
        held += [
            (sum(one.tokens for one in items), sum(one.tokens**2 for one in items), len({one.adapter for one in items}))
            for items in bins
        ]
        steps += [len(ended)] + [0] * (data_parallel - 1)
    tokens, squares, adapters = (np.array(column, float) for column in zip(*held, strict=True))
    return model.costs(tokens, squares, adapters, np.array(steps, float)), tokens.astype(np.int64)
