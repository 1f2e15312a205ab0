"""The order of messages in the stream and the agreement on where to stop, with threads in place of processes: each
waits at random, so that they drift as far apart as the schedule lets them."""

from __future__ import annotations

import random
import threading
import time
from collections import deque
from contextlib import nullcontext
from queue import Empty, Queue
from types import SimpleNamespace

import pytest
import torch

from lorafusion.engine.pipeline import Expected
from lorafusion.engine.saving import Checkpoints
from lorafusion.engine.stream import execute
from lorafusion.launch.spec import Saving

SLOTS, SECONDS = 60, 30
STUCK = "a message did not come"


class Store:
    """What torch's store does, for threads."""

    def __init__(self) -> None:
        self.values: dict[str, str] = {}
        self.changed = threading.Condition()

    def set(self, key: str, value: str) -> None:
        with self.changed:
            self.values[key] = value
            self.changed.notify_all()

    def check(self, keys: list[str]) -> bool:
        return all(key in self.values for key in keys)

    def get(self, key: str) -> str:
        return self.values[key]

    def wait(self, keys: list[str]) -> None:
        with self.changed:
            assert self.changed.wait_for(lambda: self.check(keys), SECONDS), f"nobody set {keys}"


class Inbox:
    """Like the real one it asks what is expected when it is posted, and it knows what comes by name."""

    def __init__(self, queue: Queue, expected) -> None:
        self.queue, self.expected, self.posted = queue, expected, deque()

    def post(self, count: int) -> None:
        while len(self.posted) < count and (one := next(self.expected, None)) is not None:
            self.posted.append(one)

    def next(self) -> torch.Tensor:
        self.post(1)
        wanted = self.posted.popleft()
        try:
            tensor = self.queue.get(timeout=SECONDS)
        except Empty:
            raise AssertionError(STUCK) from None
        assert tuple(tensor.shape) == wanted.shape, wanted.name
        return tensor


class World:
    """All processes: their queues, barriers and the store."""

    def __init__(self, stages: int, replicas: int, steps: list[bool], waits: random.Random) -> None:
        self.stages, self.replicas, self.steps, self.waits = stages, replicas, steps, waits
        self.queues = {}
        self.barriers = [threading.Barrier(replicas, timeout=SECONDS) for _ in range(stages)]
        self.store = Store()

    def queue(self, replica: int, source: int, target: int) -> Queue:
        return self.queues.setdefault((replica, source, target), Queue())


def ends_of(steps: list[bool]) -> list[int]:
    """The slots after which a job ends: one amid the run, and the last."""
    stepping = [slot for slot, step in enumerate(steps) if step]
    return sorted({stepping[len(stepping) // 2], stepping[-1]})


class Run:
    """A stage that computes nothing, and waits now and then."""

    def __init__(self, world: World, rank: int, slowness: float) -> None:
        replica, index = divmod(rank, world.stages)
        self.world, self.slowness, self.begin = world, slowness, 0
        self.waits = random.Random(world.waits.random())
        # No-ops are where they may be: not at the same slots in all replicas.
        places = random.Random(replica)
        self.microbatches = [SimpleNamespace(noop=places.random() < 0.1, length=1 + slot % 3) for slot in range(SLOTS)]
        self.steps = [(0,) if step else () for step in world.steps]
        self.ends = ends_of(world.steps)
        self.evaluations = [(0,) if step and slot % 4 == 0 else () for slot, step in enumerate(world.steps)]
        self.plan = SimpleNamespace(flush=False, stages=world.stages)
        self.norm_dtype, self.forwards, self.updated = torch.float32, [], []
        self.record = SimpleNamespace(start=lambda: None, readback=SimpleNamespace(wait=lambda: None))
        self.position = SimpleNamespace(set=lambda _: None)
        self.waiting = lambda _: nullcontext()
        after, before = (replica, index, index + 1), (replica, index, index - 1)
        self.pipeline = SimpleNamespace(
            index=index, size=world.stages, replica=replica, replicas=world.replicas,
            is_first=index == 0, is_last=index == world.stages - 1,
            send_after=lambda tensor: world.queue(*after).put(tensor.detach()),
            send_before=lambda tensor: world.queue(*before).put(tensor.detach()),
            from_before=lambda expected, _: Inbox(world.queue(replica, index - 1, index), expected),
            from_after=lambda expected, _: Inbox(world.queue(replica, index + 1, index), expected),
            finish_sends=lambda: None, hidden=lambda tokens, name: Expected((1, tokens, 1), torch.float32, name),
        )  # fmt: skip

    def _pause(self) -> None:
        time.sleep(self.waits.random() ** 4 * self.slowness)

    def forward(self, slot: int, x: torch.Tensor | None) -> torch.Tensor:
        self._pause()
        self.forwards.append(slot)
        out = torch.zeros(1, self.microbatches[slot].length, 1, requires_grad=True) if x is None else x * 1
        return out.sum() if self.pipeline.is_last else out

    def reduce(self, slot: int) -> torch.Tensor | None:
        if not self.steps[slot]:
            return None
        self._pause()
        self.world.barriers[self.pipeline.index].wait()
        return torch.ones(1)

    def update(self, slot: int, norms: torch.Tensor | None) -> None:
        assert norms is None or float(norms) == self.world.stages
        self.updated.append(slot)

    def evaluation_batches(self, adapter: int) -> list:
        return [SimpleNamespace(input_ids=torch.zeros(1, 5))]

    def evaluate(self, slot: int, adapter: int, receive, send) -> None:
        hidden = torch.zeros(1, 5, 1) if self.pipeline.is_first else receive()
        if not self.pipeline.is_last:
            send(hidden)


class Saves(Checkpoints):
    """Checkpoints of which only the slots are noted."""

    def __init__(self, world: World, rank: int, every: int, asked) -> None:
        process = SimpleNamespace(rank=rank, world=world.stages * world.replicas, position=None)
        super().__init__(Saving(folder="none", every=every), {}, process, world.store, asked)
        self.slots: list[int] = []

    def save(self, run: Run, slot: int, last: bool = False) -> None:
        self.slots.append(slot)
        self._is_delayed = slot % 3 == 1 and self._begun > 0 and not last
        self._begun = self._begun if self._is_delayed else slot


def run_all(stages, replicas, every, steps_every, asked_at, seed) -> tuple[list[Run], list[Saves]]:
    """Run all processes to their end; one of them is asked to stop at a slot, where one is given."""
    waits = random.Random(seed)
    steps = [slot % steps_every == steps_every - 1 or slot == SLOTS - 1 for slot in range(SLOTS)]
    world = World(stages, replicas, steps, waits)
    runs, saves, errors, threads = [], [], [], []
    who = seed % (stages * replicas)
    for rank in range(stages * replicas):
        run = Run(world, rank, waits.choice([0.0, 0.002, 0.02]))

        def asked(run=run, rank=rank) -> bool:
            return rank == who and asked_at is not None and len(run.forwards) >= asked_at

        save = Saves(world, rank, every, asked)
        runs.append(run)
        saves.append(save)

        def work(run=run, save=save) -> None:
            try:
                execute(run, save)
            except BaseException as error:
                errors.append(error)

        threads.append(threading.Thread(target=work, daemon=True))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SECONDS)
    assert not errors, errors
    assert not any(thread.is_alive() for thread in threads), "the processes wait for each other"
    return runs, saves


@pytest.mark.parametrize(("stages", "replicas"), [(1, 2), (2, 1), (2, 2), (3, 2), (4, 1)])
@pytest.mark.parametrize(("every", "steps_every"), [(5, 3), (16, 10), (100, 25)])
@pytest.mark.parametrize("asked_at", [None, 1, 4, 17, 50, 58])
def test_all_processes_end_at_the_same_slot(stages, replicas, every, steps_every, asked_at):
    runs, saves = run_all(stages, replicas, every, steps_every, asked_at, seed=7 * stages + every + (asked_at or 0))
    assert len({tuple(save.slots) for save in saves}) == 1
    end = saves[0].slots[-1]
    assert end == SLOTS if asked_at is None else asked_at < end <= SLOTS
    ends = [slot + 1 for slot in runs[0].ends if slot < end]
    assert saves[0].slots == sorted({*range(every, end, every), *ends, end})
    for run in runs:
        assert run.updated == list(range(end))
        assert run.forwards == [slot for slot in range(end) if not run.microbatches[slot].noop]


def test_a_stop_comes_soon():
    """Not at the end of a long plan, where adapters step often."""
    _, saves = run_all(2, 2, 100, 2, 5, seed=3)
    assert saves[0].slots[-1] < 40
