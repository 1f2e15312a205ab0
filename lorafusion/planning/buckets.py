"""Buckets: the few token counts that a plan's stages capture as CUDA graphs, and the padding to them.

A graph replays the work of a fixed number of tokens. So a microbatch is padded to one of a few, by tokens without an
adapter in a sample of their own. Each bucket more is less padding, but one capture more of each microbatch in flight,
for a stage's graphs of two microbatches may not share what they keep.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import numpy as np

from lorafusion.core.plan import Bucket, Microbatch, Plan, bounds_of, make_plan
from lorafusion.core.workload import Workload

TILE = 128  # tokens that a bucket is a multiple of: rows of a GEMM's tile on a GPU
MOST_BUCKETS = 8
MOST_SIZES = 1024  # between which buckets are chosen; the choice takes the square of it
# Passes of a microbatch that a capture takes: two to warm up, and the one that is captured. Not measured yet.
CAPTURE = 3


def with_buckets(
    plan: Plan, workload: Workload, *, tile: int = TILE, most: int = MOST_BUCKETS, capture: float = CAPTURE
) -> Plan:
    """A plan with its microbatches padded to at most so many buckets, each a multiple of `tile` or the capacity."""
    held = [microbatch.sample_tokens for microbatch in plan.microbatches if not microbatch.noop]
    sizes = bucket_sizes(held, plan.capacity, tile=tile, most=most, price=capture * plan.stages * plan.data_parallel)
    microbatches = [padded(microbatch, sizes) for microbatch in plan.microbatches]
    return make_plan(plan.system, workload, microbatches, stages=plan.stages, capacity=plan.capacity,
                     data_parallel=plan.data_parallel, flush=plan.flush,
                     buckets=_bounds(microbatches, workload))  # fmt: skip


def bucket_sizes(
    held: Iterable[int], capacity: int, *, tile: int = TILE, most: int = MOST_BUCKETS, price: float = 0
) -> list[int]:
    """The rising token counts that microbatches of `held` tokens are padded to: those with the least padded tokens and
    `price` times the tokens of each bucket. The largest holds the largest microbatch. Each is a multiple of `tile`, of
    a larger one where there were more than MOST_SIZES of them, but none is above the capacity."""
    counts = Counter(held)
    while True:
        rounded: Counter[int] = Counter()
        for tokens, count in counts.items():
            rounded[min(-(-tokens // tile) * tile, capacity)] += count
        if len(rounded) <= MOST_SIZES:
            break
        tile *= 2
    return _least_work(rounded, most, price)


def _least_work(counts: Counter[int], most: int, price: float) -> list[int]:
    """Which of the sizes, by dynamic programming over the number of buckets. counts: microbatches of each size."""
    sizes = np.array(sorted(counts))
    before = np.cumsum([0, *(counts[size] for size in sizes.tolist())])  # microbatches below each size
    # A bucket of size j takes the microbatches of sizes i to j: work[i, j].
    count = before[None, 1:] - before[:-1, None]
    work = np.where(count > 0, sizes * (count + price), np.inf)
    least, begins = np.full(len(sizes) + 1, np.inf), []
    least[0] = 0.0
    ways: list[tuple[float, int]] = []
    for _ in range(min(most, len(sizes))):
        totals = least[:-1, None] + work
        begins.append(totals.argmin(axis=0))
        least = np.concatenate([[np.inf], totals.min(axis=0)])
        ways.append((float(least[-1]), len(begins)))
    chosen, end = [], len(sizes)
    for begin in reversed(begins[: min(ways)[1]]):
        chosen.append(int(sizes[end - 1]))
        end = int(begin[end - 1])
    return chosen[::-1]


def padded(microbatch: Microbatch, sizes: Iterable[int]) -> Microbatch:
    """A microbatch in the smallest of rising buckets that holds it; a no-op as it is."""
    if microbatch.noop:
        return microbatch
    bucket = next(size for size in sizes if size >= microbatch.sample_tokens)
    return microbatch.model_copy(update={"bucket": bucket})


def _bounds(microbatches: Iterable[Microbatch], workload: Workload) -> tuple[Bucket, ...]:
    """The least buckets for padded microbatches."""
    bounds: dict[int, Bucket] = {}
    for microbatch in microbatches:
        if microbatch.noop:
            continue
        bound = bounds_of(microbatch, workload)
        other = bounds.get(bound.tokens, bound)
        most = {name: max(value, getattr(other, name)) for name, value in bound}
        bounds[bound.tokens] = bound.model_copy(update=most)
    return tuple(bounds[tokens] for tokens in sorted(bounds))
