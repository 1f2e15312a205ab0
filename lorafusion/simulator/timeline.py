"""When each operation of a schedule runs, and what follows from it: makespan, bubbles, throughput, memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from lorafusion.errors import UserError
from lorafusion.simulator.costs import Costs

FORWARD, BACKWARD, STEP = range(3)
KINDS = ("forward", "backward", "step")
Operation = tuple[int, int]  # kind, microbatch


@dataclass(frozen=True)
class Timeline:
    """The operations of every stage in the order in which it does them.

    operations: for each processor a list of (kind, microbatch); starts, ends: seconds, as long. Processor
    replica * stages + stage is that stage of a data-parallel replica. tokens: int64 [microbatches].
    """

    stages: int
    operations: list[list[Operation]]
    starts: list[list[float]]
    ends: list[list[float]]
    tokens: np.ndarray

    def of(self, processor: int) -> Iterator[tuple[int, int, float, float]]:
        """A processor's operations: kind, microbatch, start and end."""
        for (kind, index), start, end in zip(
            self.operations[processor], self.starts[processor], self.ends[processor], strict=True
        ):
            yield kind, index, start, end

    @cached_property
    def makespan(self) -> float:
        """Seconds from the first forward to the last step."""
        return max((ends[-1] for ends in self.ends if ends), default=0.0)

    @cached_property
    def steady_window(self) -> tuple[float, float]:
        """Without fill and drain: from when the last stage has its first microbatch to when the first stage has done
        its last forward. The whole run where that is empty."""
        begin = max(starts[0] for starts in self.starts)
        end = min(
            max(end for kind, _, _, end in self.of(processor) if kind == FORWARD)
            for processor in range(0, len(self.operations), self.stages)
        )
        return (begin, end) if begin < end else (0.0, self.makespan)

    def bubble(self, window: str = "steady") -> np.ndarray:
        """The idle share of each stage, mean of its replicas: float64 [stages]."""
        begin, end = self.steady_window if window == "steady" else (0.0, self.makespan)
        if end <= begin:
            return np.zeros(self.stages)
        busy = [
            np.clip(np.minimum(ends, end) - np.maximum(starts, begin), 0, None).sum()
            for starts, ends in zip(map(np.array, self.starts), map(np.array, self.ends), strict=True)
        ]
        return 1 - np.array(busy).reshape(-1, self.stages).mean(axis=0) / (end - begin)

    def throughput(self, window: str = "whole") -> float:
        """Tokens a second: of the whole run, or by the backwards of the first stages that end in the steady window."""
        if window == "whole":
            return float(self.tokens.sum()) / self.makespan
        begin, end = self.steady_window
        done = sum(
            int(self.tokens[index])
            for processor in range(0, len(self.operations), self.stages)
            for kind, index, _, at in self.of(processor)
            if kind == BACKWARD and begin < at <= end
        )
        return done / (end - begin)

    def peak_in_flight(self) -> list[tuple[int, int]]:
        """For each stage the most microbatches, and the most tokens, whose activations a processor holds at once."""
        peaks = [(0, 0)] * self.stages
        for processor, operations in enumerate(self.operations):
            count = tokens = 0
            for kind, index in operations:
                held = int(self.tokens[index])
                if kind == STEP or not held:
                    continue
                count, tokens = (count + 1, tokens + held) if kind == FORWARD else (count - 1, tokens - held)
                most = peaks[processor % self.stages]
                peaks[processor % self.stages] = (max(most[0], count), max(most[1], tokens))
        return peaks


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
    return Timeline(stages, orders, starts, ends, tokens)
