"""mLoRA's order (LoRAPP of arXiv 2312.02515, 1F1B mode): adapters take turns by whole global batches.

Reproduced, from the paper's sections 3.2 and 3.3 and the released code at 4abf120: microbatches of a fixed number of
consecutive samples of one adapter, never by tokens; all adapters resident, in the order given, batch j of each before
batch j+1 of any; rows padded to the longest of a microbatch, rounded up to 8; BatchLoRA where there are more adapters
than stages, which merges them into as many groups as there are stages; and the guard that no batch of an adapter enters
before the step of its last one. Where too few adapters are left to cover those S-1 slots, the pipeline waits: these
no-ops are mLoRA's own bubble, not a fault of the plan.

Switches: `row_multiple` None packs without padding, as LoRAFusion's authors ran it; `split` False takes whole global
batches, as the released code does, which cannot divide them; `batch_lora` False never merges.

Groups are made once: where adapters of one end, the others are not shared out anew. Where one sample of each adapter of
a group does not fit somewhere, there are more groups everywhere.

Not reproduced: the paper's preemptive priorities and memory model, which the released code does not have either; and
faults of that code that would make its result wrong: dropout that its backward pass forgets, steps after every
microbatch in the last epoch, a loss over padding, and one adapter more than is asked for.
"""

from collections.abc import Sequence
from itertools import zip_longest

from lorafusion.core.plan import Microbatch, Plan, make_plan
from lorafusion.core.schema import UserError
from lorafusion.core.workload import Workload
from lorafusion.planning.common import (
    cuts,
    insert_noops,
    largest_that_fits,
    microbatches_of,
    padded_length,
    require_samples_fit,
)

Content = dict[int, Sequence[int]]  # the positions that a microbatch holds of each adapter


def plan(
    workload: Workload,
    system: str,
    stages: int,
    capacity: int,
    data_parallel: int = 1,
    *,
    row_multiple: int | None = None,
    split: bool = True,
    batch_lora: bool = False,
) -> Plan:
    """Batch j of every group of adapters in turn, then batch j+1. Raises `UserError` where a sample, or without `split`
    a global batch, does not fit the capacity."""
    require_samples_fit(workload, capacity, row_multiple)
    groups = _groups(workload, stages if batch_lora else len(workload.jobs), capacity, row_multiple)
    by_group = []
    for group in groups:
        size = _size(workload, group, capacity, data_parallel, row_multiple, split)
        batches = _batches(group, _left(workload, group), size)
        by_group.append([_microbatches(workload, batch, row_multiple) for batch in batches])
    rounds = zip_longest(*by_group, fillvalue=[])
    order = [microbatch for batches in rounds for batch in batches for microbatch in batch]
    microbatches = insert_noops(order, workload, stages, data_parallel)
    return make_plan(system, workload, microbatches, stages=stages, capacity=capacity, data_parallel=data_parallel)


def _groups(workload: Workload, count: int, capacity: int, row_multiple: int | None) -> list[range]:
    """The adapters in `count` groups of neighbours, or in the next larger number of which one sample of each adapter
    of a group fits in a microbatch."""
    adapters = len(workload.jobs)
    for number in range(min(count, adapters), adapters + 1):
        borders = [index * adapters // number for index in range(number + 1)]
        groups = [range(*pair) for pair in zip(borders, borders[1:], strict=False)]
        if all(_fits(workload, group, 1, capacity, row_multiple) for group in groups):
            return groups
    raise AssertionError("one adapter alone fits, as each sample does")


def _size(
    workload: Workload, group: range, capacity: int, data_parallel: int, row_multiple: int | None, split: bool
) -> int:
    """Samples of an adapter in a microbatch."""
    largest = max(workload.jobs[adapter].global_batch_size for adapter in group)
    if split:
        return largest_that_fits(
            largest // data_parallel, lambda size: _fits(workload, group, size, capacity, row_multiple)
        )
    if not _fits(workload, group, largest, capacity, row_multiple):
        names = ", ".join(workload.jobs[adapter].name for adapter in group)
        raise UserError(f"a global batch of {names} exceeds the capacity of {capacity}; raise it, or split batches")
    return largest


def _fits(workload: Workload, group: range, size: int, capacity: int, row_multiple: int | None) -> bool:
    """Do `size` samples of each adapter fit in all rounds of an epoch, whatever of it is left? So the beginning of a
    run is cut as the whole is. In later epochs a batch may meet others, of an adapter whose epoch is longer."""
    epoch = [workload.jobs[adapter].batches_of_an_epoch for adapter in group]
    return all(
        padded_length(_lengths(workload, content), row_multiple) <= capacity
        for by_adapter in (epoch, _left(workload, group))
        for batch in _batches(group, by_adapter, size)
        for content in batch
    )


def _left(workload: Workload, group: range) -> list[Sequence[range]]:
    """The global batches that each adapter of a group has left."""
    return [workload.jobs[adapter].batches[workload.jobs[adapter].start :] for adapter in group]


def _batches(group: range, by_adapter: list[Sequence[range]], size: int) -> list[list[Content]]:
    """For each round of the global batches of a group's adapters its microbatches: `size` samples of each adapter."""
    batches = []
    for positions in zip_longest(*by_adapter, fillvalue=range(0)):
        parts = zip_longest(*(cuts(batch, size) for batch in positions), fillvalue=range(0))
        batches.append([{adapter: cut for adapter, cut in zip(group, part, strict=True) if cut} for part in parts])
    return batches


def _lengths(workload: Workload, content: Content) -> list[int]:
    return [tokens for adapter, positions in content.items() for tokens in workload.jobs[adapter].lengths_at(positions)]


def _microbatches(workload: Workload, batch: list[Content], row_multiple: int | None) -> list[Microbatch]:
    microbatches = microbatches_of(
        workload, [{adapter: list(cut) for adapter, cut in content.items()} for content in batch]
    )
    if row_multiple is None:
        return microbatches
    rows = [padded_length([max(_lengths(workload, content))], row_multiple) for content in batch]
    return [item.model_copy(update={"row_tokens": row}) for item, row in zip(microbatches, rows, strict=True)]
