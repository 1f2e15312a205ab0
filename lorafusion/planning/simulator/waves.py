"""A part of a run in 1F1B without flush, for many changes of it at once.

What comes before a change gives times at which each stage is free, what comes after it the longest path from there to
the end, which is the same walk backwards; neither depends on the change. Stage s does the turn k of `stream` in *wave*
2 k + s, which needs only what the wave before made. So the stages of a wave, every other one, are a row of arrays
[stages, changes].
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.lib.stride_tricks import as_strided

NEVER = -np.inf


class Times(NamedTuple):
    """Seconds of slots: forward, backward, step [stages, slots, ...], of a transfer [slots, ...]; -inf for one that
    nobody waits for."""

    forward: np.ndarray
    backward: np.ndarray
    step: np.ndarray
    transfer: np.ndarray

    def between(self, begin: int, end: int) -> Times:
        return Times(*(array[..., begin:end] for array in self))


class State(NamedTuple):
    """A cut through a run, for even and odd stages apart, arrays [stages, changes]: when each is free, when its last
    forward and its last backward are done. Forwards of odd stages begin with a row for a stage before the first,
    backwards end with one for a stage after the last."""

    free: tuple[np.ndarray, np.ndarray]
    forward: tuple[np.ndarray, np.ndarray]
    backward: tuple[np.ndarray, np.ndarray]

    def spread(self, changes: int) -> State:
        """The same cut for a number of changes; with one, a copy."""
        return State(*((np.repeat(even, changes, axis=1), np.repeat(odd, changes, axis=1)) for even, odd in self))


def empty_pipeline(stages: int) -> State:
    """The cut before a run; for the longest paths to its end, that after it."""
    even, odd = (stages + 1) // 2, stages // 2

    def never(rows: int) -> np.ndarray:
        return np.full((rows, 1), NEVER)

    return State(
        (np.zeros((even, 1)), np.zeros((odd, 1))),
        (never(even), never(odd + 1)),
        (never(even + 1), never(odd + 1)),
    )


class Waves:
    """A walk through the waves of turns from one on. times: of S - 1 slots before it, and of those after."""

    def __init__(self, times: Times) -> None:
        stages, slots = times.forward.shape[:2]
        self.forward = [_diagonal(times.forward, stages, parity, ahead=True) for parity in (0, 1)]
        self.backward = [_diagonal(times.backward, stages, parity, ahead=False) for parity in (0, 1)]
        self.step = [_diagonal(times.step, stages, parity, ahead=False) for parity in (0, 1)]
        transfer = np.broadcast_to(times.transfer, (stages, *times.transfer.shape))
        self.sent = [_diagonal(transfer, stages, parity, ahead=True) for parity in (0, 1)]
        self.returned = [_diagonal(transfer, stages, parity, ahead=False) for parity in (0, 1)]

    def go(self, state: State, turn: int, parity: int) -> None:
        """The next wave of the even or the odd stages, in place."""
        free, before, after, done, back = _near(state, parity)
        np.add(before, self.sent[parity][turn], out=done)
        np.maximum(free, done, out=done)
        done += self.forward[parity][turn]
        np.add(after, self.returned[parity][turn], out=back)
        np.maximum(done, back, out=back)
        back += self.backward[parity][turn]
        np.add(back, self.step[parity][turn], out=free)

    def back(self, left: State, turn: int, parity: int) -> None:
        """The same wave for the longest paths to the end, from what follows to what comes before it, in place."""
        free, before, after, done, back = _near(left, parity)
        np.add(free, self.step[parity][turn], out=free)
        np.maximum(free, back, out=free)
        free += self.backward[parity][turn]
        np.add(free, self.returned[parity][turn], out=after)
        np.maximum(free, done, out=free)
        free += self.forward[parity][turn]
        np.add(free, self.sent[parity][turn], out=before)


def _near(state: State, parity: int) -> tuple[np.ndarray, ...]:
    """Views of what a wave of the even or the odd stages reads and writes: when they are free, the forwards of the
    stages before them and the backwards of those after them, and their own forwards and backwards."""
    free, other = state.free[parity], 1 - parity
    count = len(free)
    before, after = state.forward[other][:count], state.backward[other][parity : count + parity]
    return free, before, after, state.forward[parity][parity : count + parity], state.backward[parity][:count]


def _diagonal(array: np.ndarray, stages: int, parity: int, ahead: bool) -> np.ndarray:
    """A view [turns, stages of a parity, ...] of what they do in each wave, without a copy: in a wave each stage is one
    turn behind the one two before it, and its backward is as many slots behind its forward as stages come after it."""
    count, (of_stage, of_slot, *rest) = (stages + 1 - parity) // 2, array.strides
    first = array[min(parity, stages - 1), stages - 1 if ahead else parity :]
    turns = array.shape[1] - stages + 1
    between = 2 * of_stage + (-of_slot if ahead else of_slot)
    return as_strided(first, (turns, count, *array.shape[2:]), (of_slot, between, *rest), writeable=False)
