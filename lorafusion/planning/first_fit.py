"""LoRAFusion's order with first-fit-decreasing packing: adapters in groups that take turns, batch by batch.

Within an adapter, batch j+1 waits for the step of batch j; between adapters nothing waits. So with more than one
stage the adapters form groups, long paired with short (head-tail on mean length, arXiv 2510.00206), and while one
group's step is under way in the pipeline another group's microbatches flow. Where the groups are too small to cover
the S-1 slots of the dependency rule, no-ops do.
"""

from lorafusion.core.plan import Microbatch, Plan, make_plan
from lorafusion.core.workload import Workload
from lorafusion.planning.common import batch_items, by_adapter, insert_noops, microbatches_of, require_samples_fit


def plan(workload: Workload, system: str, stages: int, capacity: int, data_parallel: int = 1) -> Plan:
    """A plan that packs each (global batch, group of adapters) by first-fit-decreasing."""
    require_samples_fit(workload, capacity)
    groups = group_adapters(workload, stages)
    order: list[Microbatch] = []
    for batch in range(max(len(job.batches) for job in workload.jobs)):
        for group in groups:
            order += pack(workload, group, batch, capacity)
    microbatches = insert_noops(order, workload, stages, data_parallel)
    return make_plan(system, workload, microbatches, stages=stages, capacity=capacity, data_parallel=data_parallel)


def group_adapters(workload: Workload, stages: int) -> list[list[int]]:
    """Adapters that are packed together: all of them on one stage, else the longest with the shortest, and so on."""
    if stages == 1:
        return [list(range(len(workload.jobs)))]
    by_length = sorted(
        range(len(workload.jobs)),
        key=lambda adapter: (
            -workload.jobs[adapter].token_offsets[-1] / len(workload.jobs[adapter].samples),
            adapter,
        ),
    )
    groups = []
    while by_length:
        longest = by_length.pop(0)
        groups.append([longest, by_length.pop()] if by_length else [longest])
    return groups


def pack(workload: Workload, group: list[int], batch: int, capacity: int) -> list[Microbatch]:
    """One global batch of each adapter of a group in microbatches, fullest first; each adapter steps after its last."""
    items = batch_items(workload, group, batch)
    bins = []
    for indices in first_fit_decreasing([tokens for tokens, _, _ in items], capacity):
        content = by_adapter(items[index][1:] for index in indices)
        bins.append((sum(items[index][0] for index in indices), content))
    return microbatches_of(workload, [content for _, content in sorted(bins, key=lambda loaded: -loaded[0])])


def first_fit_decreasing(lengths: list[int], capacity: int) -> list[list[int]]:
    """The indices of lengths in bins: longest first, each into the first bin with room."""
    bins: list[list[int]] = []
    loads: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        place = next((i for i, load in enumerate(loads) if load + lengths[index] <= capacity), len(bins))
        if place == len(bins):
            bins.append([])
            loads.append(0)
        bins[place].append(index)
        loads[place] += lengths[index]
    return bins
