"""Packed slot by slot, in the order and to the tokens a microbatch that the simulator finds fastest.

Full microbatches are the fewest, but not always the fastest: where the dependency rule leaves slots empty or nearly so,
smaller microbatches of equal size take the same turns with less waiting. So the capacity is an upper limit here, and
lower ones are tried on the first samples of the jobs, then the packer's orders, and how much of a microbatch may stay
empty before a further adapter is let in. The lower ones are parts of what all jobs have in hand at once, and not of the
capacity: above that all of it is one microbatch, for which every stage but one waits.

The plan of few samples is improved by local search then (`search`), from each of the ways that were tried.

On one GPU nothing waits, and the fewest are the fastest. But what is left for the last one may be a crumb, for which
the host takes longer than the GPU. So the last two share their samples then.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from lorafusion.core.plan import Microbatch, Plan, make_plan
from lorafusion.core.progress import progress
from lorafusion.core.schema import one_of
from lorafusion.core.workload import Job, Workload
from lorafusion.planning.bounds import time_bound
from lorafusion.planning.common import NOOP, Item, by_adapter, microbatches_of, require_samples_fit
from lorafusion.planning.completion import AIMS, COMPLETION, JUDGED_SAMPLES, THROUGHPUT, soonest
from lorafusion.planning.packer import EXACT, ORDERS, Packer, Way, fill, items_of
from lorafusion.planning.search import Search
from lorafusion.planning.simulator.costs import CostModel, Costs, even_costs
from lorafusion.planning.simulator.stream import simulate_stream
from lorafusion.planning.simulator.timeline import Timeline

FALL = 0.75  # of a target to the one tried before; then some beside the best one or two are tried
HOPELESS = 0.92  # of the highest throughput; no lower target is tried when two in a row are below it
TRIED_SAMPLES, TRIED_BATCHES = 1000, 3  # of all jobs together, and global batches of each, at least
COMPARED_SAMPLES = 20_000  # of all jobs together, for what was within MISLED of the best of the first ones
MISLED = 0.05  # of the throughput: the first samples put ways in the wrong order by up to 2 %
GOOD_BUBBLE = 0.005  # of full microbatches, beyond what uneven stages cost, with which nothing else is tried
SEARCHED_SAMPLES = 1000  # up to which a plan is improved by local search
SEARCHED_WAVES, SAMPLE_WAVES = 16_000, 250  # of it, in all and for each sample; one takes about 20 us
LONG_WORK = 100_000  # samples that take seconds to pack
LOOSE = 4  # the part of a microbatch below the capacity that one adapter may leave empty without others being asked
RAMPS = (0.5, 0.75), (0.5, 1.25), (0.2, 1.75)  # parts of the target that ramps begin with, and slots for each stage
RISES = 1, 1.15, 1.32  # of the target, that are tried with ramps
GAIN = 0.01  # of the throughput, for which a lower capacity is worth more microbatches

USUAL = next(iter(ORDERS))

Slot = tuple[list[list[Item]], set[int]]  # the items of its bins, and the adapters whose global batch ends in it
EMPTY: Slot = ([], set())


def plan(
    workload: Workload,
    system: str,
    stages: int,
    capacity: int,
    data_parallel: int = 1,
    costs: CostModel | None = None,
    aim: str | None = None,
) -> Plan:
    """The plan that the simulator finds fastest, or with the aim of completion the one that `soonest` finds. costs: of
    the stages, by default equal. aim: one of AIMS, by default completion where a job states a priority or a weight.
    Raises `UserError` for another aim and for a sample above the capacity."""
    stated = any(job.priority or job.weight != 1 for job in workload.jobs)
    aim = aim or (COMPLETION if stated else THROUGHPUT)
    one_of("aim", aim, set(AIMS), "plan")
    require_samples_fit(workload, capacity)
    trials, model = Trials(workload.jobs, stages, capacity, data_parallel), costs or even_costs(stages)
    way, short = trials.fastest(model).way, trials.samples <= SEARCHED_SAMPLES and data_parallel == 1 < stages
    if short:
        way = trials.searched(model)
    if aim == COMPLETION and len(workload.jobs) > 1:
        simulate = trials.simulated_after_search if short else trials.simulated
        way = soonest(workload.jobs, stages, way, lambda way: simulate(model, way, JUDGED_SAMPLES)[1:])
    return _plan(workload, system, trials, trials.improved(model, way, 0) if short else trials.slots(way))


def fewest(workload: Workload, system: str, stages: int, capacity: int, data_parallel: int = 1) -> Plan:
    """A plan of few microbatches, whatever the time: all as full as can be."""
    require_samples_fit(workload, capacity)
    trials = Trials(workload.jobs, stages, capacity, data_parallel)
    ways = [Way(capacity, order, capacity // EXACT) for order in ORDERS]
    best = min(ways, key=lambda way: sum(1 for _ in trials.slots(way, COMPARED_SAMPLES)))
    return _plan(workload, system, trials, trials.slots(best))


def _plan(workload: Workload, system: str, trials: Trials, slots: Iterable[Slot]) -> Plan:
    microbatches: list[Microbatch] = []
    if trials.stages == trials.data_parallel == 1:
        slots = without_crumb(slots)
    with progress(trials.samples >= LONG_WORK) as bar:
        task = bar.add_task("packing", total=trials.samples)
        for bins, ended in slots:
            microbatches += slot_microbatches(workload, bins, ended, trials.data_parallel)
            bar.advance(task, sum(map(len, bins)))
    return make_plan(
        system,
        workload,
        microbatches,
        stages=trials.stages,
        capacity=trials.capacity,
        data_parallel=trials.data_parallel,
    )


def without_crumb(slots: Iterable[Slot]) -> Iterator[Slot]:
    """The slots of a plan for one GPU; if the last one has less than half the tokens of the one before, they share.

    On an H200 a last microbatch of 394 tokens after one of 16,356 took 0.17 s, 4 % of a run, for 0.02 s of work."""
    held: deque[Slot] = deque()
    for slot in slots:
        held.append(slot)
        if len(held) > 2:
            yield held.popleft()
    yield from _shared(*held) if len(held) == 2 else held


def _shared(before: Slot, last: Slot) -> tuple[Slot, Slot]:
    """The same two slots of one bin each, about even if the last was less than half. A batch of an adapter that is
    followed by another one in the last slot stays where it is."""
    ([first], ended), ([second], ended_last) = before, last
    tokens, crumb = (sum(item.tokens for item in items) for items in (first, second))
    if 2 * crumb >= tokens:
        return before, last
    staying = ended & {item.adapter for item in second}
    moved = fill([[item for item in first if item.adapter not in staying]], (tokens - crumb) // 2, slack=0)
    late = ended & {item.adapter for item in moved}
    left = [item for item in first if item not in moved]
    return ([left], ended - late), ([second + moved], ended_last | late)


def slot_microbatches(
    workload: Workload, bins: list[list[Item]], ended: set[int], data_parallel: int
) -> list[Microbatch]:
    """A slot's microbatches, of which each adapter's last one steps it; no-ops where bins are missing."""
    contents = [by_adapter((item.adapter, item.position) for item in items) for items in bins]
    return microbatches_of(workload, contents, ended) + [NOOP] * (data_parallel - len(bins))


class Prediction(NamedTuple):
    """What the simulator predicts for a way to pack, in the steady state, or for the whole run where it was simulated
    to its end. throughput: tokens a second. bubble: the idle share. waiting: the part of it that stages of equal size
    would have too."""

    way: Way
    throughput: float
    bubble: float
    waiting: float


class Trials:
    """Jobs packed in several ways, which share what does not depend on the way."""

    def __init__(self, jobs: tuple[Job, ...], stages: int, capacity: int, data_parallel: int = 1) -> None:
        self.jobs, self.stages, self.capacity, self.data_parallel = jobs, stages, capacity, data_parallel
        self.samples = sum(job.stream_length - job.first_position for job in jobs)
        self.tokens = sum(job.stream_offset(job.stream_length) - job.stream_offset(job.first_position) for job in jobs)
        self._remembered: dict[tuple[int, int], list[Item]] = {}
        self._tried: list[Prediction] = []
        self._waves = min(SEARCHED_WAVES, self.samples * SAMPLE_WAVES)  # of local search, left
        self._improved: dict[Way, list[Slot]] = {}

    @property
    def tried(self) -> int:
        """Samples of all jobs together, by which ways are compared first; all, where these are not many more."""
        return TRIED_SAMPLES if self.samples > 2 * TRIED_SAMPLES else self.samples

    def slots(self, way: Way, samples: int | None = None) -> Iterator[Slot]:
        """The slots of the jobs, empty ones included. samples: as `packed` has it."""
        passed = 0
        for place, slot in self.packed(way, samples):
            yield from [EMPTY] * (place - passed)
            yield slot
            passed = place + 1

    def packed(self, way: Way, samples: int | None = None) -> Iterator[tuple[int, Slot]]:
        """The slots of the jobs that hold samples, each with its place. samples: pack only about so many, the same
        share of each job, but at least TRIED_BATCHES global batches of each; by default all."""
        items = items_of if samples is None else self._items
        packer = Packer(self.stages, self.capacity, self.data_parallel, items=items, **way._asdict())
        part = 1 if samples is None else samples / self.samples
        for adapter, job in enumerate(self.jobs):
            # To the end of each part, for an order may leave the adapter with the longest way alone there.
            batches = max(TRIED_BATCHES, math.ceil((len(job.batches) - job.start) * part))
            packer.add(adapter, job, job.start, min(job.start + batches, len(job.batches)))
        while packer.streams:
            packer.skip()
            yield packer.slot, packer.next_slot()

    def _items(self, adapter: int, job: Job, batch: int) -> list[Item]:
        if (adapter, batch) not in self._remembered:
            self._remembered[adapter, batch] = items_of(adapter, job, batch)
        return self._remembered[adapter, batch]

    def fastest(self, model: CostModel) -> Prediction:
        """The way in which the jobs train at the highest simulated throughput, of those that are tried."""
        full = self.trial(model, Way(self.capacity, USUAL, self.capacity // EXACT), self.tried)
        return self._ramped(model, full if full.waiting <= GOOD_BUBBLE else self._fastest(model, full))

    def _fastest(self, model: CostModel, full: Prediction) -> Prediction:
        """The fastest of the ways without a ramp."""
        filled = self._best_target(model, full)
        orders = [filled.way._replace(order=order) for order in ORDERS if order != USUAL]
        ordered = self._faster(model, filled, orders)
        part = EXACT if ordered.way.target < self.capacity else LOOSE
        best = self._faster(model, ordered, [ordered.way._replace(slack=ordered.way.target // part)])
        near = [trial.way for trial in (full, filled, best) if trial.throughput > best.throughput * (1 - MISLED)]
        if len(set(near)) == 1 or self.samples == self.tried:
            return best
        compared = [self.trial(model, way, COMPARED_SAMPLES) for way in dict.fromkeys(near)]
        return max(compared, key=lambda trial: trial.throughput)

    def _ramped(self, model: CostModel, best: Prediction) -> Prediction:
        """The same way, or one near it, with a ramp, if the whole run is faster so."""
        if self.stages == 1 or self.samples >= LONG_WORK:  # nothing waits, or not for a part of the time that counts
            return best
        targets = dict.fromkeys(min(self.capacity, _rounded(best.way.target * rise, model)) for rise in RISES)
        first, *ramps = [Way(target, USUAL, target // EXACT, self._ramp(model, target, *shape))
                         for target in targets for shape in RAMPS]  # fmt: skip
        ramped = self._faster(model, self.trial(model, first, self.tried, "whole"), ramps, "whole")
        orders = [ramped.way._replace(order=order) for order in ORDERS if order != USUAL]
        ordered = self._faster(model, ramped, orders, "whole")
        loose = ordered.way._replace(slack=ordered.way.target // LOOSE)
        near = [best, self._faster(model, ordered, [loose], "whole")]
        if self.samples > self.tried:
            near = [self.trial(model, trial.way, COMPARED_SAMPLES, "whole") for trial in near]
        return max(near, key=lambda trial: trial.throughput)

    def _ramp(self, model: CostModel, target: int, begin: float, length: float) -> tuple[int, ...]:
        """Tokens of the first slots' microbatches, and backwards of the last ones'."""
        slots = round(self.stages * length)
        shares = (begin + (1 - begin) * slot / slots for slot in range(slots))
        return tuple(min(target, _rounded(target * share, model)) for share in shares)

    def _best_target(self, model: CostModel, full: Prediction) -> Prediction:
        """The fastest target in the usual order; of those within GAIN of it the one with the most tokens."""
        trials = [full]
        for target in self._targets(model):
            trials.append(self._at(model, target))
            if max(trial.throughput for trial in trials[-2:]) < HOPELESS * max(trial.throughput for trial in trials):
                break
        tried = [trial.way.target for trial in trials]
        count = 1 if self.samples <= SEARCHED_SAMPLES else 2  # local search makes up for it
        fastest = sorted(range(len(tried)), key=lambda index: -trials[index].throughput)[:count]
        for at in sorted({index - side for index in fastest for side in (0, 1)}):
            if 0 <= at < len(tried) - 1:
                trials.append(self._at(model, _rounded(math.sqrt(tried[at] * tried[at + 1]), model)))
        most = max(trial.throughput for trial in trials)
        return max(
            (trial for trial in trials if trial.throughput >= most * (1 - GAIN)), key=lambda trial: trial.way.target
        )

    def _targets(self, model: CostModel) -> Iterator[int]:
        """Tokens of a microbatch below the capacity, falling from what the jobs' global batches have together for each
        replica to a sample's. They do not depend on the capacity, so a larger one has all that a smaller one has."""
        in_hand = sum(job.token_offsets[-1] / len(job.batches_of_an_epoch) for job in self.jobs) / self.data_parallel
        least = min(job.token_offsets[-1] / len(job.samples) for job in self.jobs)
        before = self.capacity
        while in_hand >= least:
            target = _rounded(in_hand, model)
            if target < before:
                yield target
                before = target
            in_hand *= FALL

    def _at(self, model: CostModel, target: int) -> Prediction:
        """The trial of a target, in the usual order."""
        return self.trial(model, Way(target, USUAL, target // LOOSE), self.tried)

    def _faster(self, model: CostModel, best: Prediction, ways: list[Way], window: str | None = None) -> Prediction:
        """The fastest of a trial and of those of some other ways."""
        trials = [best, *(self.trial(model, way, self.tried, window) for way in ways)]
        return max(trials, key=lambda trial: trial.throughput)

    def searched(self, model: CostModel) -> Way:
        """The fastest of the ways that were tried after local search from each of them, of all samples."""
        least = time_bound(self.jobs, model, self.capacity) * (1 + GOOD_BUBBLE)
        fastest, best, seen = math.inf, self._tried[0].way, []
        for way in dict.fromkeys(trial.way for trial in sorted(self._tried, key=lambda trial: -trial.throughput)):
            packed = list(self.packed(way))
            if packed in seen:
                continue
            seen.append(packed)
            slots = self.improved(model, way, self._waves)
            makespan = _simulated(slots, 1, model)[0].makespan
            if makespan < fastest:
                fastest, best = makespan, way
            if self._waves <= 0 or fastest <= least:
                break
        return best

    def improved(self, model: CostModel, way: Way, waves: int) -> list[Slot]:
        """The slots of all samples in a way, after local search of so many waves."""
        if way not in self._improved:
            slots = list(self.slots(way))
            contents = [bins[0] if bins else [] for bins, _ in slots]
            search = Search(contents, self.stages, self.capacity, model, self.jobs)
            self._waves -= waves - search.run(waves)
            both = [slots, search.result()]
            self._improved[way] = min(both, key=lambda slots: _simulated(slots, 1, model)[0].makespan)
        return self._improved[way]

    def trial(self, model: CostModel, way: Way, samples: int, window: str | None = None) -> Prediction:
        costs, timeline, _ = self.simulated(model, way, samples)
        # The first of many samples stand for the middle of the run; all of a few have a beginning and an end as well.
        window = window or ("steady" if samples < self.samples else "whole")
        bubble = float(timeline.bubble(window).mean())
        throughput = timeline.throughput(window)
        if window == "whole" and samples < self.samples:
            # The others pass in the steady state: the pipeline fills and drains once for all.
            rest = max(0, self.tokens - int(timeline.tokens.sum()))
            throughput = self.tokens / (timeline.makespan + rest / timeline.throughput("steady"))
        self._tried.append(Prediction(way, throughput, bubble, bubble - _uneven(costs)))
        return self._tried[-1]

    def simulated(self, model: CostModel, way: Way, samples: int) -> tuple[Costs, Timeline, list[set[int]]]:
        """The costs and times of the slots of a way, and the adapters that step after each."""
        places, slots = zip(*self.packed(way, samples), strict=True)
        timeline, costs = _simulated(slots, self.data_parallel, model, np.array(places))
        return costs, timeline, [ended for _, ended in slots]

    def simulated_after_search(self, model: CostModel, way: Way, _: int) -> tuple[Costs, Timeline, list[set[int]]]:
        """As `simulated`, of all samples, after some local search."""
        slots = self.improved(model, way, min(SEARCHED_WAVES, self.samples * SAMPLE_WAVES) // 16)
        timeline, costs = _simulated(slots, 1, model)
        return costs, timeline, [ended for _, ended in slots]


def _rounded(tokens: float, model: CostModel) -> int:
    """The nearest number of whole tiles, at least one: the last one costs as much as a full one."""
    return max(1, round(tokens / model.tile)) * model.tile


def _uneven(costs: Costs) -> float:
    """The bubble that no order takes away: the idle share of stages that have less to do than the slowest."""
    work = costs.forward.sum(axis=1) + costs.backward.sum(axis=1)
    return 1 - float(work.mean() / work.max())


def _simulated(
    slots: Sequence[Slot], data_parallel: int, model: CostModel, places: np.ndarray | None = None
) -> tuple[Timeline, Costs]:
    """The timeline of slots, and their cost table. places: of slots between which there are empty ones."""
    held, steps = [], []
    for bins, ended in slots:
        bins = bins + [[]] * (data_parallel - len(bins))
        held += [
            (
                sum(item.tokens for item in items),
                sum(item.tokens**2 for item in items),
                len({item.adapter for item in items}),
            )
            for items in bins
        ]
        steps += [len(ended)] + [0] * (data_parallel - 1)
    tokens, squares, adapters = (np.array(column, float) for column in zip(*held, strict=True))
    costs = model.costs(tokens, squares, adapters, np.array(steps, float))
    stepping = [bool(ended) for _, ended in slots]
    return simulate_stream(costs, tokens.astype(np.int64), stepping, data_parallel, places), costs
