"""Plans in which jobs end early.

In the fastest plan nearly all jobs end near its end, however short they are. The packer's orders that take job by job
end them at two fifths of that time on average, and with a guard for the jobs with the longest way to go the whole takes
as long as before. So where people wait for their jobs, those orders are tried last: in the fastest way to pack, and in
a few with less in a microbatch.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np

from lorafusion.core.workload import Job
from lorafusion.planning.packer import BY_PRIORITY, EXACT, JOB_BY_JOB, Way
from lorafusion.planning.simulator.timeline import Timeline

AIMS = THROUGHPUT, COMPLETION = "throughput", "completion"
LONGER = 0.025  # of the makespan, that earlier ends of jobs may cost
LESS = (1, 0.75, 0.56)  # parts of the fastest target that are tried
PARTS = (EXACT, 4)  # of a target that may stay empty before other adapters are asked
JUDGED_SAMPLES = 10_000  # of all jobs together, by which the ends are judged

Simulate = Callable[[Way], tuple[Timeline, list[set[int]]]]  # the times of slots, and the adapters that step after each


class Ends(NamedTuple):
    """When the jobs end that are packed in a way, and all is done: seconds."""

    way: Way
    times: list[float]
    makespan: float


def soonest(jobs: Sequence[Job], stages: int, fastest: Way, simulate: Simulate) -> Way:
    """The way to pack in which jobs end earliest: those of the highest priority first of all, then those of the next.
    It takes LONGER more than the fastest way at most. The highest priority ends no later than in the fastest way, nor
    than if there were no priorities."""

    def ends_of(way: Way) -> Ends:
        timeline, ended = simulate(way)
        times = timeline.job_ends(ended)
        return Ends(way, [times[index] for index in range(len(jobs))], timeline.makespan)

    # On one GPU less in a microbatch brings nothing but more of them.
    targets = [max(1, int(fastest.target * share)) for share in LESS if stages > 1]
    fillings = [(fastest.target, fastest.slack), *((target, target // part) for target in targets for part in PARTS)]
    first = best = ends_of(fastest)
    for orders, priorities in ((JOB_BY_JOB, [0] * len(jobs)), (BY_PRIORITY, [job.priority for job in jobs])):
        if orders is BY_PRIORITY and len(set(priorities)) == 1:
            break
        means = partial(means_by_priority, [job.weight for job in jobs], priorities)
        best = min(best, first, key=means)
        for target, slack in dict.fromkeys(fillings):
            ramp = tuple(tokens for tokens in fastest.ramp if tokens < target)
            for order in orders:
                ends = ends_of(Way(target, order, slack, ramp))
                if means(ends) >= means(best):  # with more of a guard they end no earlier
                    break
                if ends.makespan <= first.makespan * (1 + LONGER):
                    best = ends
                    break
    return best.way


def means_by_priority(weights: Sequence[float], priorities: Sequence[int], ends: Ends) -> list[float]:
    """Of each priority, the highest first, the mean of its jobs' ends by their weights."""
    table = np.array([priorities, weights, ends.times])
    classes = [table[1:, table[0] == priority] for priority in sorted(set(priorities), reverse=True)]
    return [float(np.average(times, weights=counts)) for counts, times in classes]
