"""Saving a run while it trains on, and the question where it is to stop.

At a checkpoint the run's state is copied to host memory, which takes the training some tens of milliseconds. A thread
writes the copy beside the training. Each process writes its own part and says so; when all have, the first process
seals the checkpoint. One that is still being written delays the next: the first process decides that for all.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import struct
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

import torch

from lorafusion.core import manifest
from lorafusion.core.files import whole
from lorafusion.core.manifest import FileEntry
from lorafusion.engine.adapters import AdapterTraining
from lorafusion.engine.checkpoint import NEWEST, is_whole, part_name, slot_name, slots
from lorafusion.engine.pipeline import AHEAD
from lorafusion.engine.process import WorkerProcess
from lorafusion.engine.training import TrainingRun
from lorafusion.launch.spec import STOP_FILE, Saving

LOGGER = logging.getLogger(__name__)
ASKED = "stop-asked"  # in the processes' store: somebody was asked to stop
BEYOND = AHEAD + 1  # slots; messages of so many may be waited for already when a process learns where to stop
PATIENCE_SECONDS = 0.03  # that the training waits for a checkpoint which is nearly written, before it delays the next
LOOK_SECONDS = 0.01  # between two looks for the others' parts
CHUNK = 2**24  # bytes that are written and hashed at a time
DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


class HostCopy:
    """A copy of tensors in host memory, laid out as in a file of safetensors. That library serialises with Python's
    lock held and in two copies more, for which the training would wait. tensors: by name; they stay the same tensors,
    and change in place. On a GPU the memory is pinned."""

    def __init__(self, tensors: Mapping[str, torch.Tensor], device: torch.device) -> None:
        header, end = {}, 0
        for name in sorted(tensors, key=lambda name: (-tensors[name].element_size(), name)):
            tensor, begin = tensors[name], end
            end += tensor.numel() * tensor.element_size()
            header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        self._header = struct.pack("<Q", len(text)) + text
        self._memory = torch.empty(end, dtype=torch.uint8, pin_memory=device.type == "cuda")
        self.tensors = {
            name: self._memory[slice(*place["data_offsets"])].view(tensors[name].dtype).view(tensors[name].shape)
            for name, place in header.items()
        }
        self._sources = [tensors[name] for name in header]
        self._arrived = torch.cuda.Event() if device.type == "cuda" else None

    @property
    def size(self) -> int:
        """Bytes."""
        return len(self._memory)

    @torch.no_grad()
    def take(self) -> None:
        """Copy the tensors as they are at this point of the device's work, for which nobody waits."""
        torch._foreach_copy_(list(self.tensors.values()), self._sources, non_blocking=True)
        if self._arrived:
            self._arrived.record()

    def wait(self) -> None:
        """Until the copy is there."""
        if self._arrived:
            self._arrived.synchronize()

    def write(self, path: Path) -> FileEntry:
        digest = hashlib.sha256(self._header)
        data = memoryview(self._memory.numpy())
        with open(path, "wb") as file:
            file.write(self._header)
            for begin in range(0, len(data), CHUNK):
                file.write(data[begin : begin + CHUNK])
                digest.update(data[begin : begin + CHUNK])
        return FileEntry(size=len(self._header) + len(data), sha256=digest.hexdigest())


@dataclass(frozen=True)
class CheckpointPart:
    """What one process has written of a checkpoint."""

    name: str
    entry: FileEntry
    steps: dict[str, int]
    stopped: dict[str, int]
    events: dict[str, FileEntry]

    def to_json(self) -> str:
        noted = {name: entry.model_dump() for name, entry in self.events.items()}
        return json.dumps(vars(self) | {"entry": self.entry.model_dump(), "events": noted})

    @classmethod
    def from_json(cls, text: str | bytes) -> CheckpointPart:
        values = json.loads(text)
        noted = {name: FileEntry(**entry) for name, entry in values["events"].items()}
        return cls(**values | {"entry": FileEntry(**values["entry"]), "events": noted})


@dataclass
class Tally:
    """What checkpoints have cost: the most seconds that one held the training up, but for the end, where the training
    waits, and the most that one took to be written."""

    written: int = 0
    delayed: int = 0
    held: float = 0.0
    writing: float = 0.0

    def __str__(self) -> str:
        return (
            f"{self.written} checkpoints, each held the training up for {1000 * self.held:.0f} ms at most and was "
            f"written in {self.writing:.1f} s at most; {self.delayed} came later, as one was still being written"
        )


class Checkpoints:
    """The checkpoints that one process of a run writes, and the question whether the run is to stop."""

    def __init__(
        self,
        saving: Saving,
        origin: dict,
        process: WorkerProcess,
        store: torch.distributed.Store | None,
        asked: Callable[[], bool],
    ) -> None:
        self.folder, self.every, self.keep = Path(saving.folder), saving.every, saving.keep
        self.origin, self.store = origin, store
        self.rank, self.processes, self.position = process.rank, process.world, process.position
        self.tally = Tally()
        self._asked = asked
        self._hold = 0
        self._last: int | None = None
        self._copy: HostCopy | None = None
        self._thread = ThreadPoolExecutor(1)
        self._begun = 0  # the slot of the checkpoint that was begun last
        self._writing: list[Future] = []  # of this process's part of it, and on the first process of the whole
        self._is_delayed = False

    def reserve(self, run: TrainingRun) -> None:
        """Take the memory for copies of a run, which is slow to get."""
        self._copy = HostCopy(_state(run.adapters), run.pipeline.device)

    def due(self, run: TrainingRun, begin: int) -> int:
        """The slot after whose predecessor the next checkpoint is due: at intervals, and where a job has ended, so that
        its adapter can be had while the others train on. One that was delayed is tried again when as many slots more
        have passed as had when it was."""
        regular = begin - begin % self.every + self.every
        again = 2 * begin - self._begun if self._is_delayed else regular
        return min([regular, again, *(slot + 1 for slot in run.ends if slot >= begin)])

    def save(self, run: TrainingRun, slot: int, last: bool = False) -> None:
        """Begin the checkpoint after `slot` slots, unless another one is still being written. last: of this run; then
        all are on the disk when this returns. Errors of writing are raised here, or by a later call."""
        self.position.set(f"saving the checkpoint after {slot} microbatches")
        run.record.readback.wait()  # for the events of all slots so far, with which the device is idle
        if last:
            self._finish()
        begin = time.perf_counter()
        self._is_delayed = not last and not self._is_free(slot)
        if self._is_delayed:
            self.tally.delayed += 1
            return
        if self._copy is None:
            self.reserve(run)
        self._copy.take()
        log, self._begun = run.record.events, slot
        events = {log.path.name: log.entry()} if log else {}
        steps = {adapter.job.name: adapter.steps for adapter in run.adapters}
        self._writing = [self._thread.submit(self._write, slot, steps, events, log.sync if log else lambda: None)]
        if self.rank == 0:
            self._writing.append(self._thread.submit(self._complete, slot, self._writing[0]))
        self.tally.held = max(self.tally.held, time.perf_counter() - begin)
        if last:
            self._finish()
            if self.rank == 0:
                LOGGER.info(f"{self.folder}: {self.tally}")

    def _is_free(self, slot: int) -> bool:
        """Is the checkpoint before whole? The first process knows, and the others ask it: all save, or none does."""
        if not self._begun:
            return True
        key = f"checkpoint-{slot}-is-begun"
        if self.rank > 0:
            self.position.waiting(f"the first process to begin the checkpoint after {slot} microbatches")
            self.store.wait([key])
            return self.store.get(key) == b"yes"
        wait(self._writing, PATIENCE_SECONDS)
        self._raise_failure()
        free = all(future.done() for future in self._writing)
        if not free and not self.tally.delayed:
            LOGGER.warning(
                f"the checkpoint after {self._begun} microbatches is still being written after {slot}: the next one "
                f"comes later, as may others; it is not said again"
            )
        if self.store is not None:
            self.store.set(key, "yes" if free else "no")
        return free

    def _finish(self) -> None:
        """Wait until all that was begun is on the disk."""
        for index, future in enumerate(self._writing):
            self.position.set(self._doing)
            if index and self.processes > 1:
                self.position.waiting(f"the other processes' parts of the checkpoint after {self._begun} microbatches")
            future.result()

    def _raise_failure(self) -> None:
        for future in self._writing:
            if future.done() and future.exception():
                self.position.set(self._doing)
                future.result()

    @property
    def _doing(self) -> str:
        return f"saving the checkpoint after {self._begun} microbatches"

    # In the thread, from here to `_clear`.

    def _write(
        self, slot: int, steps: dict[str, int], events: dict[str, FileEntry], sync: Callable[[], None]
    ) -> CheckpointPart:
        """Write this process's part; sync: puts what stands in the events so far on the disk."""
        begin = time.perf_counter()
        copy, path = self._copy, self.folder / slot_name(slot) / part_name(self.rank)
        copy.wait()
        with whole(path) as partial:
            entry = copy.write(partial)
        sync()
        stopped = {job: int(copy.tensors[f"{job}/optimizer_steps"]) for job in steps if copy.tensors[f"{job}/stopped"]}
        part = CheckpointPart(path.name, entry, steps, stopped, events)
        if self.rank > 0:
            self.store.set(_part_key(slot, self.rank), part.to_json())
        self.tally.written += 1
        self.tally.writing = max(self.tally.writing, time.perf_counter() - begin)
        return part

    def _complete(self, slot: int, part: Future) -> None:
        """Seal a checkpoint when all its parts are there, and clear older ones away."""
        self._seal(self.folder / slot_name(slot), slot, [part.result(), *self._others(slot)])
        self._clear()

    def _others(self, slot: int) -> list[CheckpointPart]:
        keys = [_part_key(slot, rank) for rank in range(1, self.processes)]
        while keys and not self.store.check(keys):  # not `wait`: some stores answer nobody else meanwhile
            time.sleep(LOOK_SECONDS)
        parts = [CheckpointPart.from_json(self.store.get(key)) for key in keys]
        for key in keys:
            self.store.delete_key(key)
        return parts

    def _seal(self, folder: Path, slot: int, parts: list[CheckpointPart]) -> None:
        first = parts[0]
        if any((part.steps, part.stopped) != (first.steps, first.stopped) for part in parts):
            raise RuntimeError(f"processes disagree on the steps made after {slot} microbatches")
        noted = {name: entry.model_dump() for part in parts for name, entry in part.events.items()}
        facts = {"slot": slot, "processes": self.processes, "origin": self.origin, "steps": first.steps,
                 "stopped": first.stopped, "events": noted}  # fmt: skip
        manifest.seal(folder, {part.name: part.entry for part in parts}, facts)
        manifest.write_sealed(self.folder / NEWEST, {"slot": slot})

    def _clear(self) -> None:
        """Remove checkpoints that are older than the last whole ones."""
        good = [path for path in slots(self.folder) if is_whole(path)]
        for old in slots(self.folder):
            if len(good) >= self.keep and old < good[-self.keep]:
                shutil.rmtree(old, ignore_errors=True)

    def stop_after(self, slot: int, hold: int) -> int | None:
        """The slot after which the run ends, once it was asked to and that is agreed; to be asked before each forward.

        Every process says how far it is when it learns that somebody asked, and may go on to its slot `hold` without
        knowing the answer; the answer is beyond all of these. hold: so far that no other process waits for this one
        before it has said the same. Raises what went wrong in the writing of a checkpoint.
        """
        self._raise_failure()
        if self.store is None:
            return slot if self._asked_for_it() else None
        if self._last is None:
            if self._asked_for_it():
                self.store.set(ASKED, "")
            if not self._hold and self.store.check([ASKED]):
                self._say(hold)
            keys = [_hold_key(rank) for rank in range(self.processes)]
            if self._hold and (slot > self._hold or self.store.check(keys)):
                self.store.wait(keys)
                self._last = BEYOND + max(int(self.store.get(key)) for key in keys)
        if self._last is not None and self._last < slot:
            raise RuntimeError(f"asked to stop after slot {self._last}, but slot {slot} is next")
        return self._last

    def no_more_forwards(self, end: int) -> None:
        """To be called after the last forward, when no other process shall wait for this one's word."""
        if self.store is not None and not self._hold:
            self._say(end)

    def _say(self, hold: int) -> None:
        self._hold = hold
        self.store.set(_hold_key(self.rank), str(hold))

    def _asked_for_it(self) -> bool:
        return self._asked() or (self.folder / STOP_FILE).exists()


def _state(adapters: Iterable[AdapterTraining]) -> dict[str, torch.Tensor]:
    """All that is saved of a run: of its adapters alone, as the base model stays what it was."""
    return {f"{adapter.job.name}/{name}": value for adapter in adapters for name, value in adapter.state().items()}


def _hold_key(rank: int) -> str:
    return f"stop-hold-{rank}"


def _part_key(slot: int, rank: int) -> str:
    return f"checkpoint-{slot}-{rank}"
