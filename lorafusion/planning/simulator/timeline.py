"""When each operation of a schedule runs, and what follows from it: makespan, bubbles, throughput, memory."""

from __future__ import annotations

from collections.abc import Iterator
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

    def peak_in_flight(self) -> list[tuple[int, int]]:
        """For each stage the most microbatches, and the most tokens, whose activations a processor holds at once."""
        peaks = np.zeros((self.stages, 2), np.int64)
        for processor, (kinds, microbatches) in enumerate(zip(self.kinds, self.microbatches, strict=True)):
            held = self.tokens[microbatches] * np.select([kinds == FORWARD, kinds == BACKWARD], [1, -1])
            own = peaks[processor % self.stages]
            own[:] = np.maximum(own, [np.sign(held).cumsum().max(initial=0), held.cumsum().max(initial=0)])
        return [(count, tokens) for count, tokens in peaks.tolist()]


def run_orders(orders: list[list[Operation]], costs: Costs, tokens: np.ndarray, replicas: int = 1) -> Timeline:
    """The timeline of processors that do their operations in fixed orders, each as early as it can.

    A forward waits for the stage before, a backward for the stage after, a step for the backwards of all replicas of
    its slot. No-ops (no tokens) take no time and wait for nobody. Raises `UserError` for orders that wait for each
    other.
    """
    stages = costs.stages
    forward, backward, step = costs.forward.tolist(), costs.backward.tolist(), costs.step.tolist()
    transfer, real = costs.transfer.tolist(), (tokens > 0).tolist()
    count = costs.microbatches
    # When a stage's result is there; None until it is known.
    forward_end: list[list[float | None]] = [[None] * count for _ in range(stages)]
    backward_end: list[list[float | None]] = [[None] * count for _ in range(stages)]
    starts: list[list[float]] = [[] for _ in orders]
    ends: list[list[float]] = [[] for _ in orders]
    now, place = [0.0] * len(orders), [0] * len(orders)
    sweep = [*range(len(orders)), *reversed(range(len(orders)))]
    left = sum(map(len, orders))
    while left:
        before = left
        for processor in sweep:
            stage, order, time, at = processor % stages, orders[processor], now[processor], place[processor]
            begun, ended = starts[processor], ends[processor]
            own_forward, own_backward = forward_end[stage], backward_end[stage]
            first, last = stage == 0, stage == stages - 1
            earlier = forward_end[stage - 1] if not first else own_forward
            later = backward_end[stage + 1] if not last else own_forward
            while at < len(order):
                kind, index = order[at]
                if kind == STEP:
                    slot = range(index - index % replicas, index - index % replicas + replicas)
                    arrivals = [own_backward[one] for one in slot]
                    if None in arrivals:
                        break
                    start = max(time, *arrivals)
                    time = start + sum(step[stage][one] for one in slot)  # every replica steps all that ended
                elif not real[index]:
                    start = time
                    (own_forward if kind == FORWARD else own_backward)[index] = time
                elif kind == FORWARD:
                    start = time
                    if not first:
                        arrival = earlier[index]
                        if arrival is None:
                            break
                        arrival += transfer[index]
                        if arrival > start:
                            start = arrival
                    time = start + forward[stage][index]
                    own_forward[index] = time
                else:
                    arrival = later[index]
                    if arrival is None:
                        break
                    start = time
                    if not last:
                        arrival += transfer[index]
                        if arrival > start:
                            start = arrival
                    time = start + backward[stage][index]
                    own_backward[index] = time
                begun.append(start)
                ended.append(time)
                at += 1
            left -= at - place[processor]
            now[processor], place[processor] = time, at
        if left == before:
            stuck = next(index for index, order in enumerate(orders) if place[index] < len(order))
            kind, index = orders[stuck][place[stuck]]
            raise UserError(
                f"schedule: stage {stuck % stages} waits for ever for the {KINDS[kind]} of microbatch {index}"
            )
    return Timeline.of_operations(stages, orders, starts, ends, tokens)
