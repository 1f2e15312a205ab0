"""When each operation of a schedule runs, and what follows from it: makespan, bubbles, throughput, memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from lorafusion.core.schema import UserError
from lorafusion.planning.simulator.costs import Costs

FORWARD, BACKWARD, STEP = range(3)
KINDS = ("forward", "backward", "step")
Operation = tuple[int, int]  # kind, microbatch


@dataclass(frozen=True)
class Timeline:
    """The operations of every stage in the order in which it does them.

    kinds, microbatches: int64, starts, ends: seconds in float64, each a list with an array [operations] of every
    processor. Processor replica * stages + stage is that stage of a data-parallel replica. tokens: int64
    [microbatches].
    """

    stages: int
    kinds: list[np.ndarray]
    microbatches: list[np.ndarray]
    starts: list[np.ndarray]
    ends: list[np.ndarray]
    tokens: np.ndarray

    @classmethod
    def of_operations(
        cls,
        stages: int,
        operations: list[list[Operation]],
        starts: list[list[float]],
        ends: list[list[float]],
        tokens: np.ndarray,
    ) -> Timeline:
        """From a list of operations, of their starts and of their ends for each processor."""
        pairs = [np.array(row, np.int64).reshape(-1, 2) for row in operations]
        begun, ended = ([np.array(times, float) for times in lists] for lists in (starts, ends))
        return cls(stages, [pair[:, 0] for pair in pairs], [pair[:, 1] for pair in pairs], begun, ended, tokens)

    @property
    def processors(self) -> int:
        return len(self.kinds)

    def of(self, processor: int) -> Iterator[tuple[int, int, float, float]]:
        """A processor's operations: kind, microbatch, start and end."""
        columns = (self.kinds, self.microbatches, self.starts, self.ends)
        yield from zip(*(column[processor].tolist() for column in columns), strict=True)

    @cached_property
    def makespan(self) -> float:
        """Seconds from the first forward to the last step."""
        return max((float(ends[-1]) for ends in self.ends if len(ends)), default=0.0)

    @cached_property
    def steady_window(self) -> tuple[float, float]:
        """Without fill and drain: from when the last stage has its first microbatch to when the first stage has done
        its last forward. The whole run where that is empty."""
        begin = max(float(starts[0]) for starts in self.starts)
        end = min(
            float(self.ends[processor][self.kinds[processor] == FORWARD].max())
            for processor in range(0, self.processors, self.stages)
        )
        return (begin, end) if begin < end else (0.0, self.makespan)

    def bubble(self, window: str = "steady") -> np.ndarray:
        """The idle share of each stage, mean of its replicas: float64 [stages]."""
        begin, end = self.steady_window if window == "steady" else (0.0, self.makespan)
        if end <= begin:
            return np.zeros(self.stages)
        busy = [
            np.clip(np.minimum(ends, end) - np.maximum(starts, begin), 0, None).sum()
            for starts, ends in zip(self.starts, self.ends, strict=True)
        ]
        return 1 - np.array(busy).reshape(-1, self.stages).mean(axis=0) / (end - begin)

    def throughput(self, window: str = "whole") -> float:
        """Tokens a second: of the whole run, or by the backwards of the first stages that end in the steady window."""
        if window == "whole":
            return float(self.tokens.sum()) / self.makespan
        begin, end = self.steady_window
        done = 0
        for processor in range(0, self.processors, self.stages):
            at = self.ends[processor]
            counted = (self.kinds[processor] == BACKWARD) & (begin < at) & (at <= end)
            done += int(self.tokens[self.microbatches[processor][counted]].sum())
        return done / (end - begin)

    def job_ends(self, stepping: Iterable[Iterable[int]]) -> dict[int, float]:
        """When each adapter's last step is done on all stages. stepping: the adapters that step after each slot."""
        last = {adapter: slot for slot, adapters in enumerate(stepping) for adapter in adapters}
        replicas = self.processors // self.stages
        ends = np.zeros(len(self.tokens) // replicas)
        for kinds, microbatches, times in zip(self.kinds, self.microbatches, self.ends, strict=True):
            steps = kinds == STEP
            np.maximum.at(ends, microbatches[steps] // replicas, times[steps])
        return {adapter: float(ends[slot]) for adapter, slot in last.items()}

    def peak_in_flight(self) -> list[tuple[int, int]]:
        """For each stage the most microbatches, and the most tokens, whose activations a processor holds at once."""
        peaks = np.zeros((self.stages, 2), np.int64)
        for processor, (kinds, microbatches) in enumerate(zip(self.kinds, self.microbatches, strict=True)):
            held = self.tokens[microbatches] * np.select([kinds == FORWARD, kinds == BACKWARD], [1, -1])
            peak = peaks[processor % self.stages]
            peak[:] = np.maximum(peak, [np.sign(held).cumsum().max(initial=0), held.cumsum().max(initial=0)])
        return [(count, tokens) for count, tokens in peaks.tolist()]


def run_orders(orders: list[list[Operation]], costs: Costs, tokens: np.ndarray, replicas: int = 1) -> Timeline:
    """The timeline of processors that do their operations in fixed orders, each as early as it can.

    A forward waits for the stage before, a backward for the stage after, a step for the backwards of all replicas of
    its slot. No-ops (no tokens) take no time and wait for nobody. Raises `UserError` for orders that wait for each
    other.
    """
    run = OrderedRun(orders, costs, tokens, replicas)
    sweep = [*range(len(orders)), *reversed(range(len(orders)))]
    while sum(map(run.advance, sweep)):
        pass
    return run.timeline()


class OrderedRun:
    """Processors that do operations in fixed orders. starts, ends: of each processor's operations that are done."""

    def __init__(self, orders: list[list[Operation]], costs: Costs, tokens: np.ndarray, replicas: int) -> None:
        self.orders, self.stages, self.replicas, self.tokens = orders, costs.stages, replicas, tokens
        self.starts: list[list[float]] = [[] for _ in orders]
        self.ends: list[list[float]] = [[] for _ in orders]
        self._seconds = [costs.forward.tolist(), costs.backward.tolist(), costs.step.tolist()]
        self._transfer, self._real = costs.transfer.tolist(), (tokens > 0).tolist()
        # When a stage's result is there, by kind, stage and microbatch; None until it is known.
        self._results: list[list[list[float | None]]] = [
            [[None] * costs.microbatches for _ in range(costs.stages)] for _ in (FORWARD, BACKWARD)
        ]

    def advance(self, processor: int) -> int:
        """Do what a processor can do by now; returns how many operations that are."""
        stage, order = processor % self.stages, self.orders[processor]
        starts, ends = self.starts[processor], self.ends[processor]
        done, time = len(ends), ends[-1] if ends else 0.0
        for place in range(done, len(order)):
            kind, microbatch = order[place]
            arrival = self._arrival(stage, kind, microbatch)
            if arrival is None:
                break
            start = max(time, arrival)
            time = start + self._duration(stage, kind, microbatch)
            if kind != STEP:
                self._results[kind][stage][microbatch] = time
            starts.append(start)
            ends.append(time)
        return len(ends) - done

    def undone(self) -> Iterator[tuple[int, float | None, float]]:
        """Of each processor that has not done all, when what its next operation waits for is there, None until that is
        known, and how long it takes."""
        for processor, (order, ends) in enumerate(zip(self.orders, self.ends, strict=True)):
            if len(ends) < len(order):
                place = processor % self.stages, *order[len(ends)]
                yield processor, self._arrival(*place), self._duration(*place)

    def do(self, processor: int, start: float, end: float) -> None:
        """Note when a processor's next operation began and ended."""
        kind, microbatch = self.orders[processor][len(self.ends[processor])]
        if kind != STEP:
            self._results[kind][processor % self.stages][microbatch] = end
        self.starts[processor].append(start)
        self.ends[processor].append(end)

    def timeline(self) -> Timeline:
        """Once all is done; `UserError` says who waits for ever."""
        for processor, _, _ in self.undone():
            kind, microbatch = self.orders[processor][len(self.ends[processor])]
            stage = processor % self.stages
            raise UserError(f"schedule: stage {stage} waits for ever for the {KINDS[kind]} of microbatch {microbatch}")
        return Timeline.of_operations(self.stages, self.orders, self.starts, self.ends, self.tokens)

    def _slot(self, microbatch: int) -> range:
        """The microbatches of all replicas of a microbatch's slot."""
        first = microbatch - microbatch % self.replicas
        return range(first, first + self.replicas)

    def _arrival(self, stage: int, kind: int, microbatch: int) -> float | None:
        """When all that an operation waits for is there; None until it is known."""
        if kind == STEP:
            results = self._results[BACKWARD][stage]
            ends = [end for index in self._slot(microbatch) if (end := results[index]) is not None]
            return max(ends) if len(ends) == self.replicas else None
        if not self._real[microbatch] or (kind == FORWARD and stage == 0):
            return 0.0
        if kind == BACKWARD and stage == self.stages - 1:
            return self._results[FORWARD][stage][microbatch]
        end = self._results[kind][stage - 1 if kind == FORWARD else stage + 1][microbatch]
        return None if end is None else end + self._transfer[microbatch]

    def _duration(self, stage: int, kind: int, microbatch: int) -> float:
        seconds = self._seconds[kind][stage]
        if kind == STEP:
            return sum(seconds[index] for index in self._slot(microbatch))  # every replica steps all that ended
        return seconds[microbatch] if self._real[microbatch] else 0.0
