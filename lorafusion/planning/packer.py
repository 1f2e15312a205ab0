"""One slot after another: which samples of which adapters a microbatch holds.

Each turn looks at the adapters that may enter, those whose last step is S slots ago, and takes them in an order: by
default first the one with the most work after its current global batch, for every further batch of an adapter costs
its slots and S - 1 of waiting, so that the longest such tail decides when the plan can end (the rule of the longest
path in list scheduling). Whole remainders of global batches are taken for as long as they fit. The rest of the room is
filled as exactly as the samples at hand allow: from the next adapter alone where that is enough, else from the ones
after it as well. So nothing is divided into groups, and a microbatch begins the next adapter's batch where one ends,
which is what the published algorithm merges for.

A packer can be fed while it runs: jobs come and go between global batches.
"""

import heapq
import math
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import NamedTuple

from lorafusion.core.schema import UserError
from lorafusion.core.workload import Job
from lorafusion.planning.bounds import fewest_slots
from lorafusion.planning.common import Item, job_items

EXACT = 256  # the part of a bin that may stay empty before other adapters' samples are asked
ORDERED_AGAIN = 0.99  # of the tokens left: with fewer the order of the adapters is looked at again
EXACT_ROOM = 1 << 16  # tokens that are filled exactly; of a larger room what is before them goes to the longest


@dataclass
class _Stream:
    """What an adapter still has to do."""

    job: Job
    tails: list[int]  # slots that come after each of its batches at least, waiting included
    end: int  # the batch that it stops before
    batch: int = 0
    items: list[Item] = field(default_factory=list)  # of the batch, those not placed yet, longest first
    tokens: int = 0  # theirs

    @property
    def begun(self) -> bool:
        return len(self.items) < len(self.job.batches[self.batch])

    @property
    def tokens_left(self) -> int:
        """Of the job, to the end of the stream."""
        job = self.job
        return (
            self.tokens
            + job.stream_offset(job.batches[self.end - 1].stop)
            - job.stream_offset(job.batches[self.batch].stop)
        )


Order = Callable[[_Stream, float], tuple[float, ...]]
# Which adapter a slot takes first: the one whose stream has the lowest key. With many adapters the first order is as
# good as any. Where two to eight leave slots empty, each order was the fastest in some of 180 workloads, by up to 7 %.
ORDERS: dict[str, Order] = {
    "longest-way": lambda stream, _: (-stream.tails[stream.batch],),
    "in-hand": lambda stream, _: (not stream.begun, -stream.tails[stream.batch]),
    "abreast": lambda stream, _: (stream.batch, not stream.begun),
    "nearly-done": lambda stream, _: (stream.tokens,),
}


def _job_by_job(guard: float, by_priority: bool) -> Order:
    """Shortest job first, behind a guard: a stream that needs this share of the slots that all need at least comes
    before, for it decides when the plan ends. Of the others the higher priority comes first, then the fewest tokens
    that the job has left, over its weight: the order in which the weighted mean of their ends is the lowest where
    jobs share one machine (Smith's rule)."""

    def key(stream: _Stream, slots_left: float) -> tuple[float, ...]:
        tail = stream.tails[stream.batch]
        if 1 + tail >= guard * slots_left:
            return (0, -tail, 0)
        return (1, -stream.job.priority if by_priority else 0, stream.tokens_left / stream.job.weight)

    return key


# The orders in which jobs end early, from no guard to one that lets the longest jobs go before nearly always.
GUARDS = (math.inf, 0.97, 0.9, 0.8, 0.65, 0.5)
JOB_BY_JOB: dict[str, Order] = {f"job-by-job-{guard}": _job_by_job(guard, False) for guard in GUARDS}
BY_PRIORITY: dict[str, Order] = {f"by-priority-{guard}": _job_by_job(guard, True) for guard in GUARDS}


class Way(NamedTuple):
    """How to pack: the arguments of a `Packer` of these names."""

    target: int
    order: str
    slack: int
    ramp: tuple[int, ...] = ()


def items_of(adapter: int, job: Job, batch: int) -> list[Item]:
    """The samples of one of a job's global batches, the longest first."""
    return sorted(job_items(adapter, job, batch), key=lambda item: (-item.tokens, item.position))


class Packer:
    """Bins of at most `capacity` tokens, slot after slot, for jobs that are added and withdrawn at any time.

    target: tokens that a bin is filled to, by default the capacity; a longer sample has a bin to itself. order: a name
    of ORDERS, JOB_BY_JOB or BY_PRIORITY. slack: tokens of the target that may stay empty before samples of further
    adapters are asked for. items: makes the items of a batch; one that remembers them serves several packers of the
    same jobs."""

    def __init__(
        self,
        stages: int,
        capacity: int,
        data_parallel: int = 1,
        target: int | None = None,
        order: str = "longest-way",
        slack: int | None = None,
        ramp: Sequence[int] = (),
        items: Callable[[int, Job, int], list[Item]] = items_of,
    ) -> None:
        self.stages, self.capacity, self.data_parallel = stages, capacity, data_parallel
        self.target = capacity if target is None else target
        self.slack = self.target // EXACT if slack is None else slack
        self._order, self._items = (ORDERS | JOB_BY_JOB | BY_PRIORITY)[order], items
        self._ramp, self._ramp_tokens = ramp, [data_parallel * tokens for tokens in accumulate(ramp)]
        self._filled = 0  # slots
        self.slot = 0
        self._enters: dict[int, int] = {}  # the first slot that an adapter's next global batch may enter
        self.streams: dict[int, _Stream] = {}
        self._ready: list[tuple[tuple[float, ...], int]] = []  # heap: (priority, adapter), the most urgent first
        self._waiting: list[tuple[int, int]] = []  # heap: (release, adapter)
        self._tokens_left = 0  # of all streams
        self._tokens_ordered = 0  # the same when those that are ready were put in order

    def add(self, adapter: int, job: Job, batch: int = 0, end: int | None = None) -> None:
        """Let a job in from one of its global batches on, until before another or all of them, S slots after the last
        one of the same adapter if it was there before. Raises `UserError` for an adapter that is there, batches that it
        has not, and a sample above the capacity."""
        if adapter in self.streams:
            raise UserError(f"packer: adapter {adapter} is there already")
        end = len(job.batches) if end is None else end
        if not 0 <= batch < end <= len(job.batches):
            batches = batch if end == len(job.batches) else f"{batch} to {end}"
            raise UserError(f"packer: {job.name!r} has {len(job.batches)} global batches, found {batches}")
        longest = max(sample.tokens for sample in job.samples)
        if longest > self.capacity:
            raise UserError(f"packer: a sample of {job.name!r} has {longest} tokens, the capacity is {self.capacity}")
        slots = fewest_slots(job, self.target, self.data_parallel)[:end]
        tails = [0] * len(slots)
        for index in range(len(slots) - 2, -1, -1):
            tails[index] = tails[index + 1] + slots[index + 1] + self.stages - 1
        self.streams[adapter] = stream = _Stream(job, tails, end, batch)
        self._load(adapter)
        self._tokens_left += stream.tokens_left
        self._tokens_ordered = 0

    def withdraw(self, adapter: int) -> list[Item]:
        """Let a job go; the samples of its current global batch that have not been placed yet. With none of that batch
        placed it ends between two batches, else its owner must train these, or give up the ones placed. Raises
        `UserError` for an adapter that is not there, or not any more."""
        if adapter not in self.streams:
            raise UserError(f"packer: adapter {adapter} is not there")
        self._ready = [entry for entry in self._ready if entry[1] != adapter]
        self._waiting = [entry for entry in self._waiting if entry[1] != adapter]
        heapq.heapify(self._ready)
        heapq.heapify(self._waiting)
        stream = self.streams.pop(adapter)
        self._tokens_left -= stream.tokens_left
        return stream.items

    def _load(self, adapter: int) -> None:
        """Take a stream's batch in hand."""
        stream = self.streams[adapter]
        stream.items = self._items(adapter, stream.job, stream.batch)
        stream.tokens = sum(item.tokens for item in stream.items)
        heapq.heappush(self._waiting, (max(self.slot, self._enters.get(adapter, 0)), adapter))

    def next_slot(self) -> tuple[list[list[Item]], set[int]]:
        """The bins of the next slot, none where everybody waits, and the adapters whose global batch ends in it."""
        while self._waiting and self._waiting[0][0] <= self.slot:
            self._admit(heapq.heappop(self._waiting)[1])
        self._put_in_order()
        bins: list[list[Item]] = []
        limit = self._limit()
        for replica in range(self.data_parallel):
            content = self._fill(self._room(self.data_parallel - replica, limit), self.slack * limit // self.target)
            if not content:
                break
            bins.append(content)
        ended = {item.adapter for content in bins for item in content if not self.streams[item.adapter].items}
        for adapter in ended:
            self._end_batch(adapter)
        self.slot += 1
        self._filled += bool(bins)
        return bins, ended

    def _limit(self) -> int:
        """Tokens that the bins of this slot are filled to."""
        at = min(self._filled, bisect_left(self._ramp_tokens, self._tokens_left))
        return self._ramp[at] if at < len(self._ramp) else self.target

    def skip(self) -> int:
        """Pass by the empty slots before the next one that an adapter may enter; how many they are."""
        slots = 0 if self._ready or not self._waiting else max(0, self._waiting[0][0] - self.slot)
        self.slot += slots
        return slots

    def _admit(self, adapter: int) -> None:
        heapq.heappush(self._ready, (self._key(adapter), adapter))

    def _key(self, adapter: int) -> tuple[float, ...]:
        return self._order(self.streams[adapter], self._tokens_left / (self.target * self.data_parallel))

    def _put_in_order(self) -> None:
        """Look again at those that are ready where much of what is left has been taken since, or a job has come."""
        if not ORDERED_AGAIN * self._tokens_ordered < self._tokens_left <= self._tokens_ordered:
            self._ready = [(self._key(adapter), adapter) for _, adapter in self._ready]
            heapq.heapify(self._ready)
            self._tokens_ordered = self._tokens_left

    def _room(self, replicas: int, limit: int) -> int:
        """Tokens for the next of some replicas. With little left they share it: the slowest decides when all are
        done."""
        if replicas == 1 or not self._ready:
            return limit
        ready = [self.streams[adapter] for _, adapter in self._ready]
        share = -(-sum(stream.tokens for stream in ready) // replicas)
        return min(limit, max(share, max(stream.items[0].tokens for stream in ready)))

    def _fill(self, room: int, slack: int) -> list[Item]:
        """Take what goes into a bin out of the streams."""
        content: list[Item] = []
        while self._ready:
            _, adapter = heapq.heappop(self._ready)
            stream = self.streams[adapter]
            if not content and stream.items[0].tokens > room:
                content = stream.items[:1]
                self._take(content)
                if stream.items:
                    self._admit(adapter)
                return content
            if stream.tokens > room:
                looked_at = [adapter]
                content += fill(self._groups(looked_at), room, slack)
                self._take(content)
                for other in looked_at:
                    if self.streams[other].items:
                        self._admit(other)
                return content
            content += stream.items
            room -= stream.tokens
        self._take(content)
        return content

    def _groups(self, looked_at: list[int]) -> Iterator[list[Item]]:
        """The items of the adapters looked at and of those next in urgency, which it adds to them as it goes on."""
        yield self.streams[looked_at[0]].items
        while self._ready:
            looked_at.append(heapq.heappop(self._ready)[1])
            yield self.streams[looked_at[-1]].items

    def _take(self, content: list[Item]) -> None:
        taken: dict[int, set[int]] = {}
        for item in content:
            taken.setdefault(item.adapter, set()).add(item.position)
            self.streams[item.adapter].tokens -= item.tokens
            self._tokens_left -= item.tokens
        for adapter, positions in taken.items():
            stream = self.streams[adapter]
            stream.items = [item for item in stream.items if item.position not in positions]
            self._enters[adapter] = self.slot + self.stages

    def _end_batch(self, adapter: int) -> None:
        stream = self.streams[adapter]
        stream.batch += 1
        if stream.batch == stream.end:
            del self.streams[adapter]
            return
        self._load(adapter)


def fill(groups: Iterable[Sequence[Item]], room: int, slack: int) -> list[Item]:
    """Items whose tokens come as close to the room as any choice of them, from as few groups as reach room - slack.

    The sums that can be reached are the bits of an integer, so one addition is a shift: 100 items and 8192 tokens take
    0.1 ms, and the choice is exact. Long samples are the first to be taken, since short ones fit anywhere later; in
    rooms beyond 65536 tokens they are taken as they come until no more is left.
    """
    reached, before, items, chosen = 1, [], [], []
    within = (1 << (room + 1)) - 1
    for group in groups:
        for item in group:
            if room - item.tokens >= EXACT_ROOM:
                chosen.append(item)
                room -= item.tokens
                within >>= item.tokens
                reached &= within
                continue
            before.append(reached)
            items.append(item)
            reached |= (reached << item.tokens) & within
            if reached.bit_length() > room:
                break
        if reached.bit_length() > room - slack:
            break
    left = reached.bit_length() - 1
    for item, sums in zip(reversed(items), reversed(before), strict=True):
        if not sums >> left & 1:  # not to be had without this one
            chosen.append(item)
            left -= item.tokens
    return chosen
