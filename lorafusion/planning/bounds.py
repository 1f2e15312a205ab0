"""How few slots any plan needs, by its tokens and by the dependency rule; and how little time.

A slot holds D microbatches, one for each data-parallel replica, of at most C tokens each.

*Tokens.* All tokens have to be somewhere: slots >= ceil(T / (C D)).

*Dependencies.* Let global batch b of an adapter need at least m_b microbatches: the larger of ceil(T_b / C) and the
number of its samples above C / 2, of which no two share a microbatch. Its samples then lie in at least
k_b = ceil(m_b / D) slots, so its last slot is at least k_b - 1 after its first. By the rule the first slot of batch b+1
is at least S after the last of batch b. From the first slot of the first batch to the last of the last that makes
sum(k_b - 1) + S (B - 1), so slots >= sum(k_b) + (S - 1) (B - 1) for each adapter, and at least the largest of these.
Neither bound can always be met: samples cannot be split, and adapters that wait at the same time leave slots empty.

*Time.* A microbatch costs no more than its parts would. So a stage is busy for at least as long as with all tokens in
one microbatch, after a forward of some sample on all stages before it, and before a backward on all of them. The same
holds between a global batch's first forward on the first stage and its step there; there the longest sample goes
through all stages besides. An adapter's global batches follow each other.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lorafusion.core.workload import Job, Workload
from lorafusion.planning.simulator.costs import CostModel


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


def time_bound(jobs: Sequence[Job], model: CostModel) -> float:
    """Seconds that every plan of one pipeline takes at least, in 1F1B without flush."""
    chains = []
    batches = [[np.array([job.sample_at(position).tokens for position in batch]) for batch in job.batches[job.start :]]
               for job in jobs]  # fmt: skip
    for each in batches:
        longest = np.array([lengths.max() for lengths in each])
        through = _passes(model, longest, longest.astype(float) ** 2).sum(axis=0)
        chains.append(float(np.maximum(_busy(model, each), through).sum()))
    return max(*chains, float(_busy(model, [np.concatenate([part for each in batches for part in each])])[0]))


def _busy(model: CostModel, batches: list[np.ndarray]) -> np.ndarray:
    """For each set of samples the seconds from its first forward to its last backward, by its busiest stage."""
    shortest = np.array([lengths.min() for lengths in batches])
    tokens, squares = (np.array([(lengths.astype(float) ** power).sum() for lengths in batches]) for power in (1, 2))
    filling = _passes(model, shortest, shortest.astype(float) ** 2)
    return (_passes(model, tokens, squares) + np.cumsum(filling, axis=0) - filling).max(axis=0)


def _passes(model: CostModel, tokens: np.ndarray, squares: np.ndarray) -> np.ndarray:
    """Seconds of both passes of microbatches of one adapter on each stage [stages, microbatches]."""
    costs = model.costs(tokens, squares, np.ones(len(tokens)), np.zeros(len(tokens)))
    return costs.forward + costs.backward
