"""Which steps share a Slurm job, in which they run one after another: a cluster would rather have a hundred jobs than
four hundred."""

import math
from collections import defaultdict
from collections.abc import Callable

from lorafusion.lab.cluster.request import Resources
from lorafusion.lab.cluster.site import Site
from lorafusion.lab.dag import Dag, Step

TURNS = 4  # jobs that each place in the queue takes in turn, at least: else some places would be empty at the end
WORTH = 60  # minutes that a job may ask for in any case: to start one takes a while, and steps need less than they ask


def groups_of(dag: Dag, site: Site, most: Callable[[Resources], float] = lambda needs: math.inf) -> dict[Step, str]:
    """The names of the jobs that steps share; a step that has a job for itself is not among them. most: minutes that
    the cluster lets a job take, by what it needs.

    Steps on several nodes share none. The others share one with steps of their kind that need the same. They come in
    the order of their priorities, so that the repeats of a measurement stay apart.
    """
    steps = [step for step in dag.of_target("all") if not step.kind.quick]
    turn = sum(step.resources.minutes for step in steps) / (TURNS * site.jobs)
    limit = min(site.group_minutes, max(turn, WORTH))
    alike: dict[tuple, list[Step]] = defaultdict(list)
    for step in sorted(steps, key=lambda step: -step.priority):
        if step.resources.nodes == 1:
            alike[step.kind.name, step.resources].append(step)
    shares: dict[str, list[list[Step]]] = defaultdict(list)
    for (kind, needs), members in alike.items():
        size = max(1, int(min(limit, most(needs)) // needs.minutes))
        parts = [members[first : first + size] for first in range(0, len(members), size)]
        shares[kind] += [part for part in parts if len(part) > 1]
    return {
        step: f"{kind}_{number}_of_{len(parts)}"
        for kind, parts in shares.items()
        for number, part in enumerate(parts, 1)
        for step in part
    }
