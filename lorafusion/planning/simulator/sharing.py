"""Processes that share the cores of a machine: where a CPU trains, and not a GPU.

Those that work at once go equally fast: each has a core as long as there are enough, and else the share of one that
falls to it. So one clock of work serves all of them: an operation ends when that clock has gone on by what the
operation takes alone.
"""

from __future__ import annotations

import math

import numpy as np

from lorafusion.planning.simulator.costs import Costs
from lorafusion.planning.simulator.timeline import OrderedRun, Timeline


def speed(costs: Costs, busy: int) -> float:
    """Of each of some busy processes, over that of one alone."""
    return 1.0 if busy <= costs.cores else costs.cores / busy


def run_shared(run: OrderedRun, costs: Costs) -> Timeline:
    """As `run_orders`, of processors that are processes on some cores. Raises `UserError` for orders that wait for each
    other."""
    time, worked = 0.0, 0.0
    busy: dict[int, tuple[float, float]] = {}  # processors: the start, and the end by the clock of work
    while True:
        coming = math.inf
        for processor, arrival, seconds in run.undone():
            if processor in busy or arrival is None:
                continue
            if arrival <= time:
                busy[processor] = time, worked + seconds
            else:
                coming = min(coming, arrival)
        if not busy and math.isinf(coming):
            return run.timeline()
        rate = speed(costs, len(busy))
        first = min((end for _, end in busy.values()), default=math.inf)
        until = min(coming, time + (first - worked) / rate)
        worked = first if until < coming else worked + (until - time) * rate
        time = until
        for processor, (start, end) in list(busy.items()):
            if end <= worked:
                del busy[processor]
                run.do(processor, start, time)


def ends_together(work: np.ndarray, costs: Costs) -> np.ndarray:
    """When each of some processes is done that begin together; work: what each takes alone."""
    ends, time, done = np.zeros(len(work)), 0.0, 0.0
    for rank, index in enumerate(np.argsort(work, kind="stable")):
        time += (work[index] - done) / speed(costs, len(work) - rank)
        ends[index], done = time, work[index]
    return ends
