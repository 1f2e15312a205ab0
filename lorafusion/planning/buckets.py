"""Buckets: the few token counts that a plan's stages capture as CUDA graphs, and the padding to them.

A graph replays the work of a fixed number of tokens. So a microbatch is padded to one of a few, by tokens without an
adapter in a sample of their own. Each bucket more is less padding, but it must be captured for each microbatch in
flight, for two of them may not share what they keep. That is off the clock, and takes no memory that grows with the
tokens. So a bucket is worth it where it saves a small share of the work.
"""

from collections import Counter
from collections.abc import Callable, Iterable

import numpy as np

from lorafusion.core.plan import Bucket, Microbatch, Plan, bounds_of, make_plan
from lorafusion.core.workload import Workload
from lorafusion.planning.simulator import CostModel, costs_of, simulate

TILE = 128  # tokens that a bucket is a multiple of: rows of a GEMM's tile on a GPU
MOST_BUCKETS = 8
MOST_SIZES = 1024  # between which buckets are chosen; the choice takes the square of it
WORTH = 0.002  # of the padded tokens, that each bucket must save


def with_buckets(plan: Plan, workload: Workload, *, tile: int = TILE, most: int = MOST_BUCKETS) -> Plan:
    """A plan with its microbatches padded to at most so many buckets, each a multiple of `tile` or the capacity."""
    held = [microbatch.sample_tokens for microbatch in plan.microbatches if not microbatch.noop]
    sizes = bucket_sizes(held, plan.capacity, tile=tile, most=most)
    microbatches = [padded(microbatch, sizes) for microbatch in plan.microbatches]
    return make_plan(plan.system, workload, microbatches, stages=plan.stages, capacity=plan.capacity,
                     data_parallel=plan.data_parallel, flush=plan.flush,
                     buckets=_bounds(microbatches, workload))  # fmt: skip


def planned_with_buckets(planned: Callable[[CostModel], Plan], workload: Workload, costs: CostModel) -> Plan:
    """The faster of two plans with buckets, by the simulator: one for whatever buckets it gets, and one for those.
    planned: makes a plan by costs."""
    first = with_buckets(planned(costs.captured()), workload)
    second = with_buckets(planned(costs.captured([bucket.tokens for bucket in first.buckets])), workload)
    return min(first, second, key=lambda plan: simulate(plan, costs_of(plan, workload, costs)).makespan)


def bucket_sizes(
    held: Iterable[int], capacity: int, *, tile: int = TILE, most: int = MOST_BUCKETS, worth: float = WORTH
) -> list[int]:
    """The rising token counts that microbatches of `held` tokens are padded to: those with the least padded tokens,
    each bucket adding a share of `worth` to them. The largest holds the largest microbatch. Each is a multiple of
    `tile`, of a larger one where there were more than MOST_SIZES of them, but none is above the capacity."""
    counts = Counter(held)
    while True:
        rounded: Counter[int] = Counter()
        for tokens, count in counts.items():
            rounded[min(-(-tokens // tile) * tile, capacity)] += count
        if len(rounded) <= MOST_SIZES:
            break
        tile *= 2
    return _least_work(rounded, most, worth)


def _least_work(counts: Counter[int], most: int, worth: float) -> list[int]:
    """Which of the sizes, by dynamic programming over the number of buckets. counts: microbatches of each size."""
    sizes = np.array(sorted(counts))
    before = np.cumsum([0, *(counts[size] for size in sizes.tolist())])  # microbatches below each size
    # A bucket of size j takes the microbatches of sizes i to j: work[i, j].
    count = before[None, 1:] - before[:-1, None]
    work = np.where(count > 0, sizes * count, np.inf)
    least, begins = np.full(len(sizes) + 1, np.inf), []
    least[0] = 0.0
    ways: list[tuple[float, int]] = []
    for _ in range(min(most, len(sizes))):
        totals = least[:-1, None] + work
        begins.append(totals.argmin(axis=0))
        least = np.concatenate([[np.inf], totals.min(axis=0)])
        ways.append((float(least[-1]) * (1 + worth * len(begins)), len(begins)))
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
