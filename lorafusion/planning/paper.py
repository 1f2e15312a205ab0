"""The published algorithm (arXiv 2510.00206): groups of adapters, two integer programs, merging, no-ops.

1. Adapters are paired, the longest samples with the shortest, for as long as the other adapters keep the pipeline busy
   during a group's optimizer step; else they stay alone.
2. Each global batch of each group is packed by itself: first-fit-decreasing, then as few microbatches as the first
   program finds, then as empty a last one as the second finds. The packings do not depend on each other.
3. The last microbatch of a group's batch is filled with samples of the last one of the next group's.
4. No-ops are put in where the dependency rule asks for them.

What the authors' program does otherwise, and wrongly, is tested for in tests/planning/test_paper.py. This one is
exact: plans pass the checker, and the programs have a limit that no clock moves. Slow, and kept to be compared with.
"""

import math
import statistics
from concurrent.futures import ProcessPoolExecutor

from lorafusion.core.plan import Plan, make_plan
from lorafusion.core.progress import progress
from lorafusion.core.workload import Job, Workload
from lorafusion.planning.common import Item, batch_items, by_adapter, insert_noops, microbatches_of, require_samples_fit
from lorafusion.planning.first_fit import first_fit_decreasing
from lorafusion.planning.programs import emptiest_bin, fewest_bins

SPREAD = 0.25  # standard deviations below its mean that a batch of an adapter is counted, when groups are formed
MUCH_WORK = 50_000  # squared samples of all tasks, from which on processes share them and a progress bar shows

Bin = dict[int, list[int]]  # adapter -> positions
Task = tuple[list[Item], int]  # of a group's global batch; capacity


def plan(workload: Workload, system: str, stages: int, capacity: int, data_parallel: int = 1) -> Plan:
    """The published algorithm's plan."""
    require_samples_fit(workload, capacity)
    groups = group_adapters(workload.jobs, stages, capacity)
    batches = max(len(job.batches) for job in workload.jobs)
    tasks = [(batch_items(workload, group, batch), capacity) for batch in range(batches) for group in groups]
    steps = _packed([task for task in tasks if task[0]])
    merge(workload, steps, stages, capacity)
    order = microbatches_of(workload, [content for step in steps for content in step])
    microbatches = insert_noops(order, workload, stages, data_parallel)
    return make_plan(system, workload, microbatches, stages=stages, capacity=capacity, data_parallel=data_parallel)


def group_adapters(jobs: tuple[Job, ...], stages: int, capacity: int) -> list[list[int]]:
    """Pairs of adapters, long with short, such that all others have at least S - 1 microbatches; else single ones."""
    lengths = [[sample.tokens for sample in job.samples] for job in jobs]
    means = [statistics.fmean(each) for each in lengths]
    fewest = [
        math.ceil(job.global_batch_size * max(0.0, mean - SPREAD * statistics.pstdev(each)) / capacity)
        for job, mean, each in zip(jobs, means, lengths, strict=True)
    ]
    waiting = sorted(range(len(jobs)), key=lambda adapter: (-means[adapter], adapter))
    groups = []
    while waiting:
        pair = [waiting[0], waiting[-1]]
        if len(waiting) > 1 and sum(fewest) - sum(fewest[adapter] for adapter in pair) >= stages - 1:
            groups.append(pair)
            waiting = waiting[1:-1]
        else:
            groups.append([waiting.pop(0)])
    return groups


def pack_task(task: Task) -> list[Bin]:
    """The bins of one task, fullest first."""
    items, capacity = task
    tokens = [item.tokens for item in items]
    packed = first_fit_decreasing(tokens, capacity)
    if len(packed) > -(-sum(tokens) // capacity):  # else no fewer are possible
        packed = fewest_bins(tokens, capacity, len(packed) - 1) or packed
    smallest = min(_loads(tokens, packed))
    emptier = emptiest_bin(tokens, capacity, len(packed))
    if emptier is not None and min(_loads(tokens, emptier)) < smallest:
        packed = emptier
    fullest_first = sorted(packed, key=lambda content: (-sum(tokens[i] for i in content), content))
    return [by_adapter(items[i][1:] for i in content) for content in fullest_first]


def _loads(tokens: list[int], packed: list[list[int]]) -> list[int]:
    return [sum(tokens[i] for i in content) for content in packed]


def _packed(tasks: list[Task]) -> list[list[Bin]]:
    if sum(len(task[0]) ** 2 for task in tasks) < MUCH_WORK:
        return [pack_task(task) for task in tasks]
    with ProcessPoolExecutor() as pool, progress() as bar:
        return list(bar.track(pool.map(pack_task, tasks, chunksize=4), len(tasks), description="packing"))


def merge(workload: Workload, steps: list[list[Bin]], stages: int, capacity: int) -> None:
    """Fill the last bin of each step with samples of the last one of the next, shortest first, where the adapter's
    batch before has ended S slots ago. A bin that is emptied goes."""
    place = index = 0  # place: of the current step's first bin in the order
    ended: dict[int, int] = {}  # where an adapter's latest batch has ended
    while index + 1 < len(steps):
        current, following = steps[index], steps[index + 1]
        for offset, content in enumerate(current):
            ended |= dict.fromkeys(content, place + offset)
        place += len(current)
        room, source = capacity - _tokens(workload, current[-1]), following[-1]
        waiting = [
            (workload.jobs[adapter].sample_at(position).tokens, adapter, position)
            for adapter, positions in source.items()
            if place - 1 - ended.get(adapter, -stages) >= stages
            for position in positions
        ]
        for tokens, adapter, position in sorted(waiting):
            if tokens > room:
                break
            room -= tokens
            current[-1].setdefault(adapter, []).append(position)
            ended[adapter] = place - 1
            source[adapter].remove(position)
            if not source[adapter]:
                del source[adapter]
        if not source:
            following.pop()
        if following:
            index += 1
        else:
            del steps[index + 1]
            place -= len(current)  # the same step looks at the one after


def _tokens(workload: Workload, content: Bin) -> int:
    return sum(sum(workload.jobs[adapter].lengths_at(positions)) for adapter, positions in content.items())
