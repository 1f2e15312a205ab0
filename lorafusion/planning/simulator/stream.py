"""1F1B without flush: the timeline that the scheduler asks for again and again, so it has a loop of its own.

Stage s does S-1-s forwards, then one forward and one backward in turn; an optimizer steps after the backward of the
microbatch that ends its global batch, on all replicas together. In turn k stage s does the forward of slot k and the
backward of slot k-(S-1-s): the first waits for what the stage before it does in this turn, the second for what the
stage after it did in the turn before. So one pass over the turns has every time, without looking for an operation that
can begin, in less than half the time of `run_orders`. Nothing happens in the turns of empty slots, which are left out:
few adapters on many stages have twenty for each slot that holds samples.
"""

from collections.abc import Iterator, Sequence

import numpy as np

from lorafusion.planning.simulator.costs import Costs
from lorafusion.planning.simulator.timeline import BACKWARD, FORWARD, STEP, Timeline


def simulate_stream(
    costs: Costs,
    tokens: np.ndarray,
    stepping: Sequence[bool],
    data_parallel: int = 1,
    places: np.ndarray | None = None,
) -> Timeline:
    """The timeline of microbatches, no-ops having no tokens. tokens: int64 [microbatches]; stepping: for each slot,
    does an optimizer step after it? places: int64 [slots], rising, for slots between which there are empty ones."""
    stages, slots, steps = costs.stages, len(stepping), np.flatnonzero(stepping)
    turns = np.arange(slots) if places is None else places
    real = tokens > 0
    forward, backward = costs.forward * real, costs.backward * real
    step = costs.step.reshape(stages, slots, data_parallel).sum(axis=2)  # every replica steps all that ended
    busy = np.flatnonzero(real.reshape(slots, data_parallel).any(axis=1))
    forwards, backwards, stepped = _starts(
        forward, backward, step, np.where(real, costs.transfer, -np.inf), stepping, _passes(stages, busy, turns)
    )
    kinds, microbatches, starts, ends = [], [], [], []
    for replica in range(data_parallel):
        indices = np.arange(slots) * data_parallel + replica
        for stage in range(stages):
            ahead = stages - 1 - stage
            # By turn, and in a turn the forward first, then the backward, then the step.
            order = np.argsort(np.concatenate([3 * turns, 3 * (turns + ahead) + 1, 3 * (turns[steps] + ahead) + 2]))
            seconds = np.concatenate([forward[stage, indices], backward[stage, indices], step[stage, steps]])[order]
            times = np.concatenate([forwards[stage, indices], backwards[stage, indices], stepped[stage, steps]])[order]
            # A no-op begins when what is before it ends.
            times[1:] = np.maximum(times[1:], np.maximum.accumulate(times + seconds)[:-1])
            kinds.append(np.repeat([FORWARD, BACKWARD, STEP], [slots, slots, len(steps)])[order])
            microbatches.append(np.concatenate([indices, indices, indices[steps]])[order])
            starts.append(times)
            ends.append(times + seconds)
    return Timeline(stages, kinds, microbatches, starts, ends, tokens)


def _passes(stages: int, busy: np.ndarray, turns: np.ndarray) -> Iterator[tuple[int, int, int]]:
    """The forwards and backwards of slots, each after all that it waits for: kind, stage, slot."""
    stage, at = np.indices((stages, len(busy)))
    slot = np.concatenate([busy[at], busy[at]], axis=None)
    turn = np.concatenate([turns[busy][at], turns[busy][at] + stages - 1 - stage], axis=None)
    kind = np.repeat([FORWARD, BACKWARD], stage.size)
    stage = np.tile(stage.ravel(), 2)
    order = np.argsort((turn * stages + stage) * 2 + kind)
    return zip(kind[order].tolist(), stage[order].tolist(), slot[order].tolist(), strict=True)


def _starts(
    forward: np.ndarray,
    backward: np.ndarray,
    step: np.ndarray,
    transfer: np.ndarray,
    stepping: Sequence[bool],
    passes: Iterator[tuple[int, int, int]],
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """When each forward and backward [stages, microbatches] and each step [stages, slots] begins, zero for those that
    do not happen. forward, backward: seconds [stages, microbatches]; step: [stages, slots]; transfer: [microbatches],
    -inf for those that wait for nobody."""
    stages, slots = step.shape
    replicas = len(transfer) // slots
    forward_seconds, backward_seconds, step_seconds = forward.tolist(), backward.tolist(), step.tolist()
    delay = transfer.tolist()
    forwards = [[0.0] * (slots * replicas) for _ in range(stages)]
    backwards = [[0.0] * (slots * replicas) for _ in range(stages)]
    steps = [[0.0] * slots for _ in range(stages)]
    free = [[0.0] * replicas for _ in range(stages)]
    for kind, stage, slot in passes:
        times, neighbour = free[stage], stage - 1 if kind == FORWARD else stage + 1
        begun, seconds = (forwards, forward_seconds) if kind == FORWARD else (backwards, backward_seconds)
        for replica in range(replicas):
            time, index = times[replica], slot * replicas + replica
            if 0 <= neighbour < stages:
                time = max(time, begun[neighbour][index] + seconds[neighbour][index] + delay[index])
            begun[stage][index] = time
            times[replica] = time + seconds[stage][index]
        if kind == BACKWARD and stepping[slot]:
            time = max(times)
            steps[stage][slot] = time
            times[:] = [time + step_seconds[stage][slot]] * replicas
    return np.array(forwards), np.array(backwards), np.array(steps)
