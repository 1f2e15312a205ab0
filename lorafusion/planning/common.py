"""What the strategies share: microbatches from positions, fixed-size cuts, no-ops."""

from collections.abc import Callable, Container, Iterable, Sequence
from itertools import repeat
from typing import NamedTuple

from lorafusion.core.plan import Microbatch, Segment
from lorafusion.core.schema import UserError
from lorafusion.core.workload import Job, Workload

NOOP = Microbatch(noop=True)


def require_samples_fit(workload: Workload, capacity: int, row_multiple: int | None = None) -> None:
    """Raise unless every sample fits a microbatch by itself."""
    for job in workload.jobs:
        longest = max(job.samples, key=lambda sample: sample.tokens)
        if padded_length([longest.tokens], row_multiple) > capacity:
            padding = "" if row_multiple is None else f", padded to a multiple of {row_multiple}"
            raise UserError(
                f"workload {workload.name}: sample {longest.id} of {job.name!r} has {longest.tokens} tokens{padding}, "
                f"more than the capacity of {capacity}; raise the capacity or drop the sample"
            )


def padded_length(lengths: Sequence[int], row_multiple: int | None) -> int:
    """Tokens of a microbatch of samples: packed end to end, or each in a row as long as the longest, rounded up."""
    if row_multiple is None:
        return sum(lengths)
    return len(lengths) * -(-max(lengths) // row_multiple) * row_multiple


def segment(workload: Workload, adapter: int, positions: Iterable[int]) -> Segment:
    """A segment of an adapter's samples, in stream order."""
    ordered = tuple(sorted(positions))
    return Segment(adapter=adapter, samples=ordered, tokens=sum(workload.jobs[adapter].lengths_at(ordered)))


class Item(NamedTuple):
    """A sample that waits to be packed."""

    tokens: int
    adapter: int
    position: int


def job_items(adapter: int, job: Job, batch: int) -> list[Item]:
    """The samples of one of a job's global batches, in stream order."""
    positions = job.batches[batch]
    return list(map(Item, job.lengths_at(positions), repeat(adapter), positions))


def batch_items(workload: Workload, adapters: Iterable[int], batch: int) -> list[Item]:
    """The samples of one global batch of each adapter that has it still to do."""
    return [
        item
        for adapter in adapters
        if workload.jobs[adapter].start <= batch < len(workload.jobs[adapter].batches)
        for item in job_items(adapter, workload.jobs[adapter], batch)
    ]


def by_adapter(places: Iterable[tuple[int, int]]) -> dict[int, list[int]]:
    """The positions of each adapter, from pairs of both."""
    content: dict[int, list[int]] = {}
    for adapter, position in places:
        content.setdefault(adapter, []).append(position)
    return content


def microbatches_of(
    workload: Workload, contents: Sequence[dict[int, list[int]]], ended: Container[int] | None = None
) -> list[Microbatch]:
    """Microbatches of the positions that each holds by adapter, of one global batch of it; after the last one of each
    global batch its adapter steps, if it is among those ended (all have, where that is not said)."""

    def batch(adapter: int, content: dict[int, list[int]]) -> tuple[int, int]:
        return adapter, workload.jobs[adapter].batch_of(content[adapter][0])

    last = {batch(adapter, content): index for index, content in enumerate(contents) for adapter in content}
    return [
        Microbatch(
            segments=tuple(segment(workload, adapter, content[adapter]) for adapter in sorted(content)),
            step_after=tuple(
                adapter
                for adapter in sorted(content)
                if last[batch(adapter, content)] == index and (ended is None or adapter in ended)
            ),
        )
        for index, content in enumerate(contents)
    ]


def largest_microbatch(job: Job, capacity: int, data_parallel: int = 1) -> int:
    """Samples per microbatch for the systems that fix it, by one rule for all of them.

    The largest power of two, at most a replica's share of the global batch, of which no microbatch of the job exceeds
    the capacity.
    """

    def fits(size: int) -> bool:
        return all(
            sum(job.lengths_at(cut)) <= capacity for batch in job.batches_of_an_epoch for cut in cuts(batch, size)
        )

    return largest_that_fits(job.global_batch_size // data_parallel, fits)


def largest_that_fits(most: int, fits: Callable[[int], bool]) -> int:
    """The largest power of two, from 1 on and at most `most`, up to which all fit."""
    size = 1
    while 2 * size <= most and fits(2 * size):
        size *= 2
    return size


def cuts(batch: Sequence[int], size: int) -> list[Sequence[int]]:
    """A global batch in runs of `size` consecutive positions; the last may be shorter."""
    return [batch[start : start + size] for start in range(0, len(batch), size)]


def fixed_size_batches(
    workload: Workload, adapter: int, capacity: int, data_parallel: int = 1
) -> list[list[Microbatch]]:
    """For each global batch that an adapter has left its microbatches of a fixed size in samples, the last stepping."""
    job = workload.jobs[adapter]
    size = largest_microbatch(job, capacity, data_parallel)
    batches = []
    for batch in job.batches[job.start :]:
        parts = [segment(workload, adapter, cut) for cut in cuts(batch, size)]
        batches.append(
            [
                Microbatch(segments=(part,), step_after=(adapter,) if index == len(parts) - 1 else ())
                for index, part in enumerate(parts)
            ]
        )
    return batches


def insert_noops(
    microbatches: Iterable[Microbatch], workload: Workload, stages: int, data_parallel: int = 1
) -> list[Microbatch]:
    """The same order with the no-ops that the dependency rule asks for, each as late as can be, and in whole slots.

    A microbatch waits until `stages` slots after the last step of each of its adapters, which in an order where
    an adapter's global batches do not interleave is exactly the rule of `lorafusion.core.plan`.
    """
    out: list[Microbatch] = []
    earliest = [0] * len(workload.jobs)  # slots
    current = [-1] * len(workload.jobs)
    for microbatch in microbatches:
        start = len(out)
        for part in microbatch.segments:
            batch = workload.jobs[part.adapter].batch_of(part.samples[0])
            if batch != current[part.adapter]:
                start = max(start, earliest[part.adapter] * data_parallel)
                current[part.adapter] = batch
        out += [NOOP] * (start - len(out))
        for adapter in microbatch.step_after:
            earliest[adapter] = len(out) // data_parallel + stages
        out.append(microbatch)
    return out + [NOOP] * (-len(out) % data_parallel)
