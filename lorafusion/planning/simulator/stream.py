"""1F1B without flush: the timeline that the scheduler asks for again and again, so it has a loop of its own.

Stage s does S-1-s forwards, then one forward and one backward in turn; an optimizer steps after the backward of the
microbatch that ends its global batch, on all replicas together. In turn k stage s does the forward of slot k and the
backward of slot k-(S-1-s): the first waits for what the stage before it does in this turn, the second for what the
stage after it did in the turn before. So one pass over the turns has every time, without looking for an operation that
can begin, in less than half the time of `run_orders`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lorafusion.planning.simulator.costs import Costs
from lorafusion.planning.simulator.timeline import BACKWARD, FORWARD, STEP, Timeline


def simulate_stream(costs: Costs, tokens: np.ndarray, stepping: Sequence[bool], data_parallel: int = 1) -> Timeline:
    """The timeline of microbatches, no-ops having no tokens. tokens: int64 [microbatches]; stepping: for each slot,
    does an optimizer step after it?"""
    stages, slots, steps = costs.stages, len(stepping), np.flatnonzero(stepping)
    real = tokens > 0
    forward, backward = costs.forward * real, costs.backward * real
    step = costs.step.reshape(stages, slots, data_parallel).sum(axis=2)  # every replica steps all that ended
    forwards, backwards, stepped = _starts(
        forward, backward, step, np.where(real, costs.transfer, -np.inf), stepping, data_parallel
    )
    kinds, microbatches, starts, ends = [], [], [], []
    turns = np.arange(slots)
    for replica in range(data_parallel):
        indices = turns * data_parallel + replica
        for stage in range(stages):
            ahead = min(stages - 1 - stage, slots)
            # By turn, and in a turn the forward first, then the backward, then the step.
            order = np.argsort(np.concatenate([3 * turns, 3 * (turns + ahead) + 1, 3 * (steps + ahead) + 2]))
            seconds = [forward[stage, indices], backward[stage, indices], step[stage, steps]]
            times = [forwards[stage, indices], backwards[stage, indices], stepped[stage]]
            kinds.append(np.repeat([FORWARD, BACKWARD, STEP], [slots, slots, len(steps)])[order])
            microbatches.append(np.concatenate([indices, indices, indices[steps]])[order])
            starts.append(np.concatenate(times)[order])
            ends.append(np.concatenate([at + taken for at, taken in zip(times, seconds, strict=True)])[order])
    return Timeline(stages, kinds, microbatches, starts, ends, tokens)


def _starts(
    forward: np.ndarray,
    backward: np.ndarray,
    step: np.ndarray,
    transfer: np.ndarray,
    stepping: Sequence[bool],
    replicas: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """When each forward and backward [stages, microbatches] and each step [stages, slots with a step] begins. forward,
    backward: seconds [stages, microbatches]; step: [stages, slots]; transfer: [microbatches], -inf for those that wait
    for nobody."""
    stages, slots = step.shape
    forward_seconds, backward_seconds, step_seconds = forward.tolist(), backward.tolist(), step.tolist()
    delay = transfer.tolist()
    forwards = [[0.0] * (slots * replicas) for _ in range(stages)]
    backwards = [[0.0] * (slots * replicas) for _ in range(stages)]
    steps: list[list[float]] = [[] for _ in range(stages)]
    free = [[0.0] * replicas for _ in range(stages)]
    done = [0.0] * replicas  # when the stage before has done its forward of this turn
    for turn in range(slots + stages - 1):
        for stage in range(stages):
            times, slot = free[stage], turn - (stages - 1 - stage)
            for replica in range(replicas):
                time = times[replica]
                if turn < slots:
                    index = turn * replicas + replica
                    if stage:
                        time = max(time, done[replica] + delay[index])
                    forwards[stage][index] = time
                    time += forward_seconds[stage][index]
                    done[replica] = time
                if 0 <= slot < slots:
                    index = slot * replicas + replica
                    if stage < stages - 1:
                        ended = backwards[stage + 1][index] + backward_seconds[stage + 1][index]
                        time = max(time, ended + delay[index])
                    backwards[stage][index] = time
                    time += backward_seconds[stage][index]
                times[replica] = time
            if 0 <= slot < slots and stepping[slot]:
                time = max(times)
                steps[stage].append(time)
                times[:] = [time + step_seconds[stage][slot]] * replicas
    return np.array(forwards), np.array(backwards), np.array(steps)
