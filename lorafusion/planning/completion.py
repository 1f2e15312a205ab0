"""Plans in which jobs end early.

In the fastest plan nearly all jobs end near its end, however short they are. The packer's orders that take job by job
end them at two fifths of that time on average, and with a guard for the jobs with the longest way to go the whole takes
as long as before. So where people wait for their jobs, those orders are tried last: in the fastest way to pack, and in
a few with less in a microbatch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from lorafusion.core.workload import Job
from lorafusion.planning.packer import EXACT, JOB_BY_JOB, Way
from lorafusion.planning.simulator.timeline import Timeline

AIMS = THROUGHPUT, COMPLETION = "throughput", "completion"
LONGER = 0.025  # of the makespan, that earlier ends of jobs may cost
LESS = (1, 0.75, 0.56)  # parts of the fastest target that are tried
PARTS = (EXACT, 4)  # of a target that may stay empty before other adapters are asked
JUDGED_SAMPLES = 10_000  # of all jobs together, by which the ends are judged

Simulate = Callable[[Way], tuple[Timeline, list[set[int]]]]  # the times of slots, and the adapters that step after each


class Ends(NamedTuple):
    """When jobs end that are packed in a way. makespan: seconds. means: of each priority, the highest first, the mean
    of its jobs' ends by their weights."""

    way: Way
    makespan: float
    means: tuple[float, ...]


def soonest(jobs: Sequence[Job], stages: int, fastest: Way, simulate: Simulate) -> Way:
    """The way to pack in which jobs end earliest: those of the highest priority first of all, then those of the next.
    It takes LONGER more than the fastest way at most."""
    best = ends_of(jobs, fastest, simulate)
    most = best.makespan * (1 + LONGER)
    # On one GPU less in a microbatch brings nothing but more of them.
    targets = [max(1, int(fastest.target * share)) for share in LESS if stages > 1]
    fillings = [(fastest.target, fastest.slack), *((target, target // part) for target in targets for part in PARTS)]
    for target, slack in dict.fromkeys(fillings):
        for order in JOB_BY_JOB:
            ends = ends_of(jobs, Way(target, order, slack), simulate)
            if ends.means >= best.means:  # with more of a guard they end no earlier
                break
            if ends.makespan <= most:
                best = ends
                break
    return best.way


def ends_of(jobs: Sequence[Job], way: Way, simulate: Simulate) -> Ends:
    """When the jobs end in a way to pack."""
    timeline, ended = simulate(way)
    ends, means = timeline.job_ends(ended), []
    for priority in sorted({job.priority for job in jobs}, reverse=True):
        weights = {index: job.weight for index, job in enumerate(jobs) if job.priority == priority}
        means.append(float(np.average([ends[index] for index in weights], weights=list(weights.values()))))
    return Ends(way, timeline.makespan, tuple(means))
