"""What happened on a stage of a run: when, and with which losses.

Passes, steps and waits are marked in the device's own stream of work (CUDA events on a GPU, the clock on a CPU). Nobody
waits for a mark: they are read when the clock has stopped.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

from lorafusion.core.clock import Mark, Meter, TimePoint
from lorafusion.engine.events import EventLog
from lorafusion.engine.readback import Readback

FORWARD, BACKWARD, STEP, WAIT = "forward", "backward", "step", "wait"


class Span(NamedTuple):
    """What a stage did in a slot, or that it waited for others then (slot -1), between two marks."""

    kind: str
    slot: int
    begin: Mark
    end: Mark


@dataclass
class Record:
    """What happened on this stage: when, and with which losses.

    begin, end, steps_before: the clock's start and stop, and the steps of each adapter at the start; `timed` sets them.
    start_up: seconds from the start of this process to the clock's.
    done: after the backward of slot k, and the steps that follow it, the mark (k, mark).
    spans: each pass and step, and each wait for another process; nobody waits for their marks.
    losses: an adapter's share of its global batch's loss in one microbatch, (adapter, batch, value).
    kept: are these three kept for a report? A long training has its events instead.
    stopped: adapters that are known to be stopped.
    events: where losses, norms and evaluations are written as they become known, a line of JSON each.
    """

    meter: Meter
    begin: TimePoint | None = None
    end: TimePoint | None = None
    start_up: float = 0.0
    steps_before: list[int] = field(default_factory=list)
    done: list[tuple[int, Mark]] = field(default_factory=list)
    spans: list[Span] = field(default_factory=list)
    losses: list[tuple[int, int, float]] = field(default_factory=list)
    kept: bool = True
    stopped: set[int] = field(default_factory=set)
    readback: Readback = field(default_factory=Readback)
    events: EventLog | None = None

    def finished(self, slot: int) -> None:
        if self.kept:
            self.done.append((slot, self.meter.mark()))
        self.readback.poll()

    @contextmanager
    def timing(self, kind: str, slot: int = -1) -> Iterator[None]:
        """Note when what is within began and ended on the device."""
        begin = self.meter.mark()
        yield
        self.note(kind, slot, begin)

    def note(self, kind: str, slot: int, begin: Mark) -> None:
        """What began at a mark has ended now."""
        if self.kept:
            self.spans.append(Span(kind, slot, begin, self.meter.mark()))

    def wait(self) -> None:
        """Until the device has done its work and all that was read back is here."""
        self.meter.synchronize()
        self.readback.wait()

    def close(self) -> None:
        if self.events:
            self.events.close()

    def event(self, **values: object) -> None:
        if self.events:
            self.events.write(values)

    def times(self) -> dict[str, list[int]]:
        """Of forward, backward and step the slot, begin and end of each span in turn, in microseconds since the start;
        of all waits the sum; and of those within a pass, as `forward_wait` and `backward_wait`, its slot and the sum of
        each in turn."""
        times: dict[str, list[int]] = {FORWARD: [], BACKWARD: [], STEP: [], WAIT: [0]}
        waits: list[tuple[int, int]] = []  # since the last pass: each is noted before the pass that it is within
        for kind, slot, *marks in self.spans:
            begin, end = (round(1e6 * self.meter.seconds(self.begin.mark, mark)) for mark in marks)
            if kind == WAIT:
                times[WAIT][0] += end - begin
                waits.append((begin, end - begin))
                continue
            times[kind] += (slot, begin, end)
            if within := sum(seconds for start, seconds in waits if start >= begin):
                times.setdefault(f"{kind}_{WAIT}", []).extend((slot, within))
            waits.clear()
        return times
