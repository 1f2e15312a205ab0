"""How few slots any plan needs, by its tokens and by the dependency rule; and how little time.

A slot holds D microbatches, one for each data-parallel replica, of at most C tokens each.

*Tokens.* All tokens have to be somewhere: slots >= ceil(T / (C D)).

*Dependencies.* Let global batch b of an adapter need at least m_b microbatches: the larger of ceil(T_b / C) and the
number of its samples above C / 2, of which no two share a microbatch. Its samples then lie in at least
k_b = ceil(m_b / D) slots, so its last slot is at least k_b - 1 after its first. By the rule the first slot of batch b+1
is at least S after the last of batch b. From the first slot of the first batch to the last of the last that makes
sum(k_b - 1) + S (B - 1), so slots >= sum(k_b) + (S - 1) (B - 1) for each adapter, and at least the largest of these.
Neither bound can always be met: samples cannot be split, and adapters that wait at the same time leave slots empty.

*Time.* A stage is busy with n microbatches for no less than with n equal ones that share all tokens and nothing is lost
to tiles, and n is at least what a packing of the samples needs. Before come the forwards of some sample on the stages
before it, after that its backwards. A global batch alone takes, from its first forward to its step on the first stage,
no less than its busiest stage has to do, and no less than its MOST longest samples in the best of all ways to put them
into microbatches one after another, where only the order of forwards, that of backwards, and that of both on the last
stage are kept. An adapter's global batches follow each other.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence

import numpy as np

from lorafusion.core.workload import Job, Workload
from lorafusion.planning.simulator.costs import CapturedCosts, CostModel, Costs

MOST = 4  # samples of a global batch, of which all ways to put them into microbatches are tried


def fewest_slots(job: Job, capacity: int, data_parallel: int = 1) -> list[int]:
    """For each global batch of a job the slots that its samples need at least, alone."""
    lengths = np.array([sample.tokens for sample in job.samples])
    starts = np.arange(0, len(lengths), job.global_batch_size)  # a batch ends with its epoch
    tokens, halves = np.add.reduceat(lengths, starts), np.add.reduceat(2 * lengths > capacity, starts, dtype=int)
    slots = -(-np.maximum(-(-tokens // capacity), halves) // data_parallel)
    return (slots.tolist() * job.epochs)[: len(job.batches)]


def token_bound(workload: Workload, capacity: int, data_parallel: int = 1) -> int:
    """Slots without which the tokens have no room."""
    return -(-workload.tokens // (capacity * data_parallel))


def dependency_bound(workload: Workload, stages: int, capacity: int, data_parallel: int = 1) -> int:
    """Slots without which an adapter's global batches cannot follow each other."""
    return max(
        sum(fewest_slots(job, capacity, data_parallel)[job.start :]) + (stages - 1) * (len(job.batches) - job.start - 1)
        for job in workload.jobs
    )


def lower_bound(workload: Workload, stages: int, capacity: int, data_parallel: int = 1) -> int:
    """Slots that every plan has at least, no-ops included."""
    tokens = token_bound(workload, capacity, data_parallel)
    return max(tokens, dependency_bound(workload, stages, capacity, data_parallel))


def fewest_microbatches(tokens: np.ndarray, capacity: int) -> int:
    """Bins of a capacity that items need at least (Martello and Toth, L2). tokens: int64 [items], at most the capacity.

    Of items above capacity - k, for any k up to half of it, none shares a bin with one of k or more; of those above
    half of it no two do; what these leave empty is all that the others of k or more can have before further bins."""
    tokens = np.sort(tokens)
    total, half = np.concatenate([[0], np.cumsum(tokens)]), np.searchsorted(tokens, capacity // 2, "right")
    least = np.concatenate([[0], tokens[:half]])  # k
    begin, alone = np.searchsorted(tokens, least), np.searchsorted(tokens, capacity - least, "right")
    large = alone - half
    more = total[half] - total[begin] - (large * capacity - (total[alone] - total[half]))
    return int((len(tokens) - half + np.maximum(0, -(-more // capacity))).max())


def time_bound(jobs: Sequence[Job], model: CostModel, capacity: int) -> float:
    """Seconds that every plan of one pipeline takes at least, in 1F1B without flush; without padding to buckets."""
    if isinstance(model, CapturedCosts):
        model = model.captured()  # a mean microbatch has no bucket
    batches = [[job.lengths_at(batch) for batch in job.batches[job.start :]] for job in jobs]
    slots = [sum(fewest_slots(job, capacity)[job.start :]) for job in jobs]
    step = model.layers[0] * (model.step + model.reduction)
    chains = [sum(_alone(model, each, capacity)) + len(each) * step for each in batches]
    tokens = np.array([count for each in batches for batch in each for count in batch])
    counts = np.arange(max(fewest_microbatches(tokens, capacity), *slots), max(tokens.size, sum(slots)) + 1)
    return max(*chains, _busy(model, tokens, counts, sum(slots), sum(map(len, batches))))


def _busy(model: CostModel, tokens: np.ndarray, counts: np.ndarray, parts: int, steps: int) -> float:
    """Seconds from the first forward to the last backward of samples in the best of some counts of microbatches, by its
    busiest stage. parts: of adapters' global batches in microbatches, at least."""
    squares, adapters = (tokens.astype(float) ** 2).sum() / counts, np.maximum(parts / counts, 1)
    whole = model.model_copy(update={"tile": 1}).costs(tokens.sum() // counts, squares, adapters, steps / counts)
    shortest = tokens.min(keepdims=True).astype(float)
    busy = (whole.forward + whole.backward + whole.step) * counts + _around(model, shortest)
    return float(busy.max(axis=0).min())


def _around(model: CostModel, shortest: np.ndarray) -> np.ndarray:
    """Seconds [stages, samples] before the first forward on a stage and after its last backward, at least."""
    costs = model.costs(shortest, shortest**2, np.ones(len(shortest)), np.zeros(len(shortest)))
    both = costs.forward + costs.backward + 2 * costs.transfer
    return np.cumsum(both, axis=0) - both


def _alone(model: CostModel, batches: list[list[int]], capacity: int) -> np.ndarray:
    """Seconds of each of an adapter's global batches, alone in the pipeline, at least."""
    totals, squares = (np.array([sum(count**power for count in batch) for batch in batches], float) for power in (1, 2))
    whole = model.costs(totals, squares, np.ones(len(batches)), np.zeros(len(batches)))
    around = _around(model, np.array([min(batch) for batch in batches], float))
    seconds, longest = (whole.forward + whole.backward + around).max(axis=0), defaultdict(list)
    for index, batch in enumerate(batches):
        longest[min(len(batch), MOST)].append(index)
    for count, indices in longest.items():
        lengths = np.array([sorted(batches[index])[-count:] for index in indices], float)
        held = np.arange(1 << count)[:, None] >> np.arange(count) & 1  # of each set of samples, by its bits
        tokens, squares = (lengths**power @ held.T for power in (1, 2))
        costs = model.costs(tokens.ravel(), squares.ravel(), np.ones(tokens.size), np.zeros(tokens.size))
        orders = defaultdict(list)
        for order in _orders((1 << count) - 1):
            orders[len(order)].append(order)
        ways = [_through(costs, tokens, np.array(each), capacity) for each in orders.values()]
        seconds[indices] = np.maximum(seconds[indices], np.min(ways, axis=0))
    return seconds


def _orders(left: int) -> Iterator[tuple[int, ...]]:
    """Every way to divide a set of samples into sets one after another, each by its bits."""
    if not left:
        yield ()
    part = left
    while part:
        yield from ((part, *rest) for rest in _orders(left & ~part))
        part = (part - 1) & left


def _through(costs: Costs, tokens: np.ndarray, orders: np.ndarray, capacity: int) -> np.ndarray:
    """Seconds of each batch [batches] in the best of some orders [orders, microbatches] of sets. costs: of all sets of
    all batches; tokens: [batches, sets]."""
    forward, backward = (array.reshape(-1, *tokens.shape)[..., orders] for array in (costs.forward, costs.backward))
    transfer, last = costs.transfer.reshape(tokens.shape)[..., orders], costs.stages - 1
    done, back = np.zeros(forward.shape[:-1]), np.zeros(forward.shape[:-1])
    for index in range(orders.shape[1]):
        for stage in range(last + 1):
            arrived = done[stage - 1] + transfer[..., index] if stage else 0.0
            done[stage] = np.maximum(done[stage], arrived) + forward[stage, ..., index]
        done[last] += backward[last, ..., index]
        back[last] = done[last]
        for stage in range(last - 1, -1, -1):
            back[stage] = np.maximum(back[stage], back[stage + 1] + transfer[..., index]) + backward[stage, ..., index]
    both = forward[..., 0] + backward[..., -1]
    busy = (forward + backward).sum(axis=-1) + np.cumsum(both, axis=0) - both
    fits = (tokens <= capacity)[:, orders].all(axis=-1)
    return np.where(fits, np.maximum(back[0], busy.max(axis=0)), np.inf).min(axis=-1)
