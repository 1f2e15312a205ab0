"""Local search after packing: samples move between slots for as long as the simulated run gets shorter.

The packer fills slots one after another and never looks back. Here a sample moves to a slot near it or changes places
with one there, a slot is divided in two, two neighbours become one, an empty slot goes. Each stays within what the
dependency rule leaves its global batch, so a plan stays a plan. All changes of a slot are judged at once, and in the
part of the run that they touch (`simulator.waves`).

Optimizer steps are taken to stay where they are until a change is made. So whoever calls this simulates both plans.
"""

from collections.abc import Sequence
from itertools import combinations

import numpy as np

from lorafusion.core.workload import Job
from lorafusion.planning.common import Item
from lorafusion.planning.simulator.costs import CostModel
from lorafusion.planning.simulator.waves import NEVER, State, Times, Waves, empty_pipeline

REACH = 8  # slots between which samples move
MOST_CHANGES = 256  # that are judged at once
MOST_HALVES = 5  # items of a slot up to which all ways to divide it are tried
SWEEP_WORTH = 2e-4  # of the makespan, that a sweep must have gained for another one
WORTH = 1e-7  # of the makespan, that a change must gain
MEAN_COUNTS = 1e-3  # the mean of all stages' longest paths beside the longest
FAR = 1 << 60


class Search:
    """A plan of one pipeline that is changed. slots: the items of each slot, empty ones included."""

    def __init__(
        self, slots: Sequence[Sequence[Item]], stages: int, capacity: int, model: CostModel, jobs: Sequence[Job]
    ) -> None:
        self.stages, self.capacity, self.model = stages, capacity, model
        self.items = [item for slot in slots for item in slot]
        self.none = len(self.items)  # stands for no item, in a batch that stands for none
        numbers = iter(range(self.none))
        self.slots = [[next(numbers) for _ in slot] for slot in slots]
        self.tokens = np.array([*(item.tokens for item in self.items), 0], float)
        self.place = np.array([*(place for place, slot in enumerate(slots) for _ in slot), -1])
        keys = [(item.adapter, jobs[item.adapter].batch_of(item.position)) for item in self.items]
        names = {key: index for index, key in enumerate(sorted(set(keys)))}
        last = len(names)
        self.batch = np.array([*(names[key] for key in keys), last])
        self.members = [np.flatnonzero(self.batch == index) for index in range(last)]
        self.before = np.array([*(names.get((adapter, batch - 1), last) for adapter, batch in names), last])
        self.after = np.array([*(names.get((adapter, batch + 1), last) for adapter, batch in names), last])
        places = [self.place[members] for members in self.members]
        self.first = np.array([*(each.min() for each in places), FAR])
        self.last = np.array([*(each.max() for each in places), -stages])
        self.margin = 2 * stages + REACH + 2  # empty slots around those of the plan
        around: list[list[int]] = [[] for _ in range(self.margin)]
        self._set(self._times([*around, *self.slots, *around], range(-self.margin, len(slots) + self.margin)))

    def _set(self, times: Times) -> None:
        self.times = times
        self.walk = Waves(Times(*(array[..., None] for array in times.between(self.margin - self.stages + 1, FAR))))

    def result(self) -> list[tuple[list[list[Item]], set[int]]]:
        """Of each slot its bins, none where it is empty, and the adapters whose global batch ends in it."""
        result = []
        for place, slot in enumerate(self.slots):
            ended = {self.items[number].adapter for number in slot if self.last[self.batch[number]] == place}
            result.append(([[self.items[number] for number in slot]] if slot else [], ended))
        return result

    def run(self, budget: int) -> int:
        """Sweep over the slots until it is no longer worth it or a budget of waves is used up; what is left of it."""
        before = np.inf
        while budget > 0:
            self.left = self._paths()
            budget -= 2 * len(self.left)
            now, _ = self._now(0, empty_pipeline(self.stages))
            if now > before * (1 - SWEEP_WORTH):
                break
            before = now
            budget = self._sweep(budget)
        for place in range(len(self.slots) - 1, -1, -1):
            if not self.slots[place] and self._may_close(place):
                self._replace(place, 1, [])
        return budget

    def _sweep(self, budget: int) -> int:
        state, place = empty_pipeline(self.stages), 0
        while place < len(self.slots) and budget > 0:
            for change in (self._exchange, self._divide, self._close):
                budget -= change(place, state)
            self.walk.go(state, place, 0)
            self.walk.go(state, place, 1)
            place += 1
        return budget

    def _paths(self) -> list[State]:
        """After the even wave of each turn the longest paths to the end."""
        left, paths = empty_pipeline(self.stages), []
        for turn in range(len(self.slots) + self.stages + REACH, -1, -1):
            self.walk.back(left, turn, 1)
            paths.append(left.spread(1))
            self.walk.back(left, turn, 0)
        return paths[::-1]

    def _judge(
        self, state: State, waves: Waves, begin: int, turns: int, left: State, changes: int = 1
    ) -> tuple[np.ndarray, np.ndarray]:
        """Of each change the makespan, and the mean of the longest paths through each stage."""
        state = state.spread(changes)
        for turn in range(begin, begin + turns):
            waves.go(state, turn, 0)
            waves.go(state, turn, 1)
        waves.go(state, begin + turns, 0)
        paths = [rows + rest for pair, others in zip(state, left, strict=True)
                 for rows, rest in zip(pair, others, strict=True)]  # fmt: skip
        mean = (paths[0].sum(axis=0) + paths[1].sum(axis=0)) / self.stages
        return np.concatenate(paths).max(axis=0), mean

    def _now(self, place: int, state: State) -> tuple[float, float]:
        makespan, mean = self._judge(state, self.walk, place, self.stages, self.left[place + self.stages])
        return float(makespan[0]), float(mean[0])

    def _best(self, place: int, state: State, times: Times, turns: int, longer: int) -> int | None:
        """The change to make from a place on: it ends the run earlier, or no later and with shorter paths elsewhere.
        longer: slots that the plan has more then."""
        left = self.left[place + turns - longer]
        makespan, mean = self._judge(state, Waves(times), 0, turns, left, times.transfer.shape[1])
        now, mean_now = self._now(place, state)
        score = np.where(makespan <= now * (1 + 1e-12), makespan + MEAN_COUNTS * mean, np.inf)
        best = int(score.argmin())
        return best if score[best] < now * (1 - WORTH) + MEAN_COUNTS * mean_now else None

    def _exchange(self, place: int, state: State) -> int:
        """Move an item between a slot and those after it, or exchange two; the waves that it took to see."""
        reach = min(REACH, len(self.slots) - 1 - place)
        mine = np.array(self.slots[place], int)
        theirs = np.array([number for slot in self.slots[place + 1 : place + 1 + reach] for number in slot], int)
        if not len(mine) and not len(theirs):
            return 0
        places = np.arange(place + 1, place + 1 + reach)
        none = np.array([self.none])
        gone = np.concatenate([np.repeat(mine, len(theirs)), np.repeat(mine, reach), np.repeat(none, len(theirs))])
        come = np.concatenate([np.tile(theirs, len(mine)), np.repeat(none, len(mine) * reach), theirs])
        there = self.place[come]
        there[len(mine) * len(theirs) :][: len(mine) * reach] = np.tile(places, len(mine))
        legal = np.flatnonzero(self._legal(place, gone, come, there))
        if not len(legal):
            return 0
        chosen = legal[:: -(-len(legal) // MOST_CHANGES)]
        gone, come, there = gone[chosen], come[chosen], there[chosen]
        turns = REACH + self.stages - 1
        best = self._best(place, state, self._exchanged(place, gone, come, there), turns, 0)
        if best is not None:
            self._apply(place, int(gone[best]), int(come[best]), int(there[best]))
        return 2 * (turns + self.stages)

    def _legal(self, place: int, gone: np.ndarray, come: np.ndarray, there: np.ndarray) -> np.ndarray:
        """Which exchanges keep the dependency rule and the capacity, and change anything."""
        latest = self.first[self.after] - self.stages
        earliest = self.last[self.before] + self.stages
        loads = np.array([self.tokens[slot].sum() for slot in self.slots[place : place + 1 + REACH]])
        change = self.tokens[come] - self.tokens[gone]
        return (
            (latest[self.batch[gone]] >= there)
            & (earliest[self.batch[come]] <= place)
            & (loads[0] + change <= self.capacity)
            & (loads[there - place] - change <= self.capacity)
            & ((self.batch[gone] != self.batch[come]) | (change != 0))
        )

    def _exchanged(self, place: int, gone: np.ndarray, come: np.ndarray, there: np.ndarray) -> Times:
        """The times of the slots from a place on, for each exchange."""
        near, at = self.slots[place : place + 1 + REACH], there - place
        here, far = self._adapters(near, gone, come, at)
        loads = np.array([self.tokens[slot].sum() for slot in near])
        squares = np.array([(self.tokens[slot] ** 2).sum() for slot in near])
        change, square = self.tokens[come] - self.tokens[gone], self.tokens[come] ** 2 - self.tokens[gone] ** 2
        both = self._cost(
            np.concatenate([loads[0] + change, loads[at] - change]),
            np.concatenate([squares[0] + square, squares[at] - square]),
            np.concatenate([here, far]),
            np.zeros(2 * len(gone)),
        )
        mine, theirs = both.between(0, len(gone)), both.between(len(gone), FAR)
        begin = self.margin + place - self.stages + 1
        window = self.times.between(begin, begin + REACH + 2 * self.stages - 1)
        forward, backward, step, transfer = (
            np.repeat(array[..., None], 1 if array is window.step else len(gone), axis=-1) for array in window
        )
        zero, every = self.stages - 1, np.arange(len(gone))
        forward[:, zero], backward[:, zero], transfer[zero] = mine.forward, mine.backward, mine.transfer
        forward[:, zero + at, every], backward[:, zero + at, every] = theirs.forward, theirs.backward
        transfer[zero + at, every] = theirs.transfer
        return Times(forward, backward, step, transfer)

    def _adapters(
        self, near: list[list[int]], gone: np.ndarray, come: np.ndarray, at: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """How many adapters the first of some slots has after each exchange, and the one that it is made with."""
        names, local = np.unique(np.concatenate([self.batch[slot] for slot in near]), return_inverse=True)
        held = np.zeros((len(names) + 1, len(near)), int)
        np.add.at(held, (local, np.repeat(np.arange(len(near)), [len(slot) for slot in near])), 1)
        adapters = (held > 0).sum(axis=0)
        left, entered = (np.searchsorted(names, self.batch[numbers]) for numbers in (gone, come))
        leaves, enters = gone != self.none, come != self.none
        other = left != entered
        here = (enters & (held[entered, 0] == 0)).astype(float) - (leaves & (held[left, 0] == 1))
        far = (leaves & (held[left, at] == 0)).astype(float) - (enters & (held[entered, at] == 1))
        return adapters[0] + other * here, adapters[at] + other * far

    def _apply(self, place: int, gone: int, come: int, there: int) -> None:
        touched = {place, there}
        for number, source, target in ((gone, place, there), (come, there, place)):
            if number == self.none:
                continue
            self.slots[source].remove(number)
            self.slots[target].append(number)
            self.place[number] = target
        for batch in {int(self.batch[number]) for number in (gone, come) if number != self.none}:
            places = self.place[self.members[batch]]
            touched |= {int(self.last[batch]), int(places.max())}
            self.first[batch], self.last[batch] = places.min(), places.max()
        for slot in touched:
            for array, column in zip(self.times, self._times([self.slots[slot]], [slot]), strict=True):
                array[..., self.margin + slot] = column[..., 0]

    def _divide(self, place: int, state: State) -> int:
        """Make two slots of one; the waves that it took to see."""
        mine = sorted(self.slots[place], key=lambda number: (-self.tokens[number], number))
        if len(mine) < 2:
            return 0
        if len(mine) <= MOST_HALVES:
            parts = [part for size in range(1, len(mine)) for part in combinations(mine, size)]
        else:
            parts = [tuple(mine[begin::2][:size]) for begin in (0, 1) for size in range(1, len(mine) // 2 + 1)]
        halves = [[list(part), [number for number in mine if number not in part]] for part in parts]
        best = self._best(place, state, self._rebuilt(place, halves, 1), self.stages, 1)
        if best is not None:
            self._replace(place, 1, halves[best])
        return 4 * self.stages

    def _close(self, place: int, state: State) -> int:
        """Make one slot of it and the one after it; the waves that it took to see."""
        both = [number for slot in self.slots[place : place + 2] for number in slot]
        if place + 1 >= len(self.slots) or not self._may_close(place) or self.tokens[both].sum() > self.capacity:
            return 0
        if self._best(place, state, self._rebuilt(place, [[both]], 2), self.stages - 1, -1) is not None:
            self._replace(place, 2, [both])
        return 4 * self.stages

    def _may_close(self, place: int) -> bool:
        """May all that comes after a slot come one slot earlier?"""
        last, first = self.last[self.before], self.first
        return not np.any((last <= place) & (first > place) & (first - last == self.stages) & (last >= 0))

    def _rebuilt(self, place: int, choices: list[list[list[int]]], replaced: int) -> Times:
        """The times from a place on where some slots stand for others, for each choice of as many slots."""
        begin, end = self.margin + place - self.stages + 1, self.margin + place
        after = self.times.between(end + replaced, end + replaced + self.stages)
        count, flat = len(choices[0]), [slot for slots in choices for slot in slots]
        times = self._times(flat, [*range(place, place + count)] * len(choices))
        parts = []
        for around, rest, inside in zip(self.times.between(begin, end), after, times, strict=True):
            chosen = inside.reshape(*inside.shape[:-1], len(choices), count).swapaxes(-1, -2)
            same = (np.broadcast_to(array[..., None], (*array.shape, len(choices))) for array in (around, rest))
            parts.append(np.concatenate([next(same), chosen, next(same)], axis=-2))
        return Times(*parts)

    def _replace(self, place: int, count: int, slots: list[list[int]]) -> None:
        """Put some slots in the place of others; those after them move."""
        self.slots[place : place + count] = slots
        self.left[place : place + count] = self.left[place : place + 1] * len(slots)
        longer = len(slots) - count
        for array in (self.place, self.first, self.last):
            array[:-1][array[:-1] >= place + count] += longer
        for number, slot in enumerate(slots, place):
            self.place[slot] = number
        for batch in {int(self.batch[number]) for slot in slots for number in slot}:
            places = self.place[self.members[batch]]
            self.first[batch], self.last[batch] = places.min(), places.max()
        at = self.margin + place
        inside = self._times(slots, range(place, place + len(slots)))
        parts = (self.times.between(0, at), inside, self.times.between(at + count, FAR))
        self._set(Times(*(np.concatenate(arrays, axis=-1) for arrays in zip(*parts, strict=True))))

    def _times(self, slots: Sequence[Sequence[int]], places: Sequence[int]) -> Times:
        """Of slots at some places."""
        held = [set(self.batch[slot].tolist()) for slot in slots]
        steps = [sum(self.last[batch] == at for batch in batches) for at, batches in zip(places, held, strict=True)]
        tokens = np.array([self.tokens[slot].sum() for slot in slots])
        squares = np.array([(self.tokens[slot] ** 2).sum() for slot in slots])
        return self._cost(tokens, squares, np.array([len(batches) for batches in held], float), np.array(steps, float))

    def _cost(self, tokens: np.ndarray, squares: np.ndarray, adapters: np.ndarray, steps: np.ndarray) -> Times:
        costs = self.model.costs(tokens, squares, adapters, steps)
        return Times(costs.forward, costs.backward, costs.step, np.where(tokens > 0, costs.transfer, NEVER))
