"""Which adapters train on which GPUs: groups of replicas with adapters of their own.

A group holds the states of its own adapters alone, and reduces gradients over its own replicas alone. So many adapters
train faster in many small groups than in one gang, as long as each group has adapters enough to keep its stages busy.
Adapters whose states do not fit all at once train in more groups than there are places, one after another.
"""

import heapq
from collections.abc import Sequence


def distribute(seconds: Sequence[float], sizes: Sequence[int], groups: int, room: float) -> list[list[int]] | None:
    """Jobs by group: each job, the longest first, joins the group with the least to do, of those that have room for it.

    seconds, sizes: of each job; room: the largest sum of sizes in a group. None where a job finds no room. The longest
    group takes at most 4/3 of the best possible where room does not matter (Graham, 1969)."""
    waiting = [(0.0, index) for index in range(groups)]  # a heap: what each group has to do
    free = [room] * groups
    members: list[list[int]] = [[] for _ in range(groups)]
    for job in sorted(range(len(seconds)), key=lambda job: (-seconds[job], job)):
        full = []
        while waiting and free[waiting[0][1]] < sizes[job]:
            full.append(heapq.heappop(waiting))
        if not waiting:
            return None
        load, index = waiting[0]
        heapq.heapreplace(waiting, (load + seconds[job], index))
        free[index] -= sizes[job]
        members[index].append(job)
        for entry in full:
            heapq.heappush(waiting, entry)
    return [sorted(jobs) for jobs in members]


def makespan(seconds: Sequence[float], at_once: int) -> float:
    """Seconds until all groups have ended, of which so many train at once, the others as soon as there is a place."""
    if at_once >= len(seconds):
        return max(seconds)
    ends = [0.0] * at_once
    for group in seconds:
        heapq.heapreplace(ends, ends[0] + group)
    return max(ends)


def places(gpus: int, size: int, per_node: int) -> int:
    """How many groups of so many GPUs there is room for. A group that fits on a node is on one; a larger one has as
    many GPUs on each of its nodes, and these nodes for itself."""
    if size <= per_node:
        nodes, rest = divmod(gpus, per_node)
        return nodes * (per_node // size) + rest // size
    nodes = nodes_of(size, per_node)
    return 0 if size % nodes else gpus // per_node // nodes


def nodes_of(size: int, per_node: int) -> int:
    """Nodes of a group of so many GPUs."""
    return -(-size // per_node)
