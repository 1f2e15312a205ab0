"""Checkpoints of a run: adapters, optimizer states, gradients on their way, and the place in the plan.

A checkpoint is a folder `slot-N`: N slots of the plan are done. Each process writes its own part and says so; when all
have, the first process writes the manifest: the files with their hashes, what they are of, how far each adapter and
each file of events is. So a process may be killed at any moment: a checkpoint without its manifest is as if it were not
there. One that differs from its manifest in a bit is passed over. `newest.json` beside the checkpoints says that there
was a whole one, so that a run whose checkpoints are all damaged or gone is not begun anew in silence.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from lorafusion.core import manifest
from lorafusion.core.config import read_model
from lorafusion.core.files import whole
from lorafusion.core.manifest import MANIFEST, DamagedError, FileEntry, UnfinishedError
from lorafusion.core.schema import UserError
from lorafusion.core.workload import content_hash
from lorafusion.engine import events
from lorafusion.engine.adapters import AdapterTraining
from lorafusion.engine.pipeline import AHEAD
from lorafusion.engine.training import TrainingRun
from lorafusion.launch.spec import STOP_FILE, RunSpec, Saving

VERSION = 2
HASHED = ("plan", "model", "initial")  # of what a checkpoint's origin has a hash
NEWEST = "newest.json"
ASKED = "stop-asked"  # in the processes' store: somebody was asked to stop
BEYOND = AHEAD + 1  # slots; messages of so many may be waited for already when a process learns where to stop


class CheckpointError(UserError):
    """A checkpoint that cannot be resumed from, and why."""


class IncompleteError(CheckpointError):
    """One that its processes did not come to finish, as where they were killed."""


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint. processes: those that have a part of it. steps: of each adapter, those that are done.
    stopped: of each one that was stopped, the steps that its weights have seen. events: how far each file of them
    was."""

    path: Path
    slot: int
    processes: int
    steps: dict[str, int]
    stopped: dict[str, int]
    events: dict[str, FileEntry] = field(default_factory=dict)

    def part(self, rank: int) -> Path:
        """The tensors of one process."""
        return self.path / _part_name(rank)

    @property
    def events_kept(self) -> dict[str, int]:
        """Bytes of each file of events."""
        return {name: entry.size for name, entry in self.events.items()}


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


def identity(spec: RunSpec, plan_hash: str) -> dict:
    """What a run must have in common with a checkpoint to be resumed from it exactly."""
    model = spec.model
    if model.endswith(".yaml"):  # wherever its weights lie
        model = content_hash(read_model(model).model_dump(mode="json", exclude={"weights", "revision"}))
    initial = _hash(Path(spec.initial) / MANIFEST) if spec.initial else None
    keys = {"system", "dtype", "adapter_dtype", "seed"}
    return {"version": VERSION, "plan": plan_hash, "model": model, "initial": initial, **spec.model_dump(include=keys)}


class Checkpoints:
    """The checkpoints that one process of a run writes, and the question whether the run is to stop."""

    def __init__(
        self,
        saving: Saving,
        origin: dict,
        rank: int,
        processes: int,
        store: torch.distributed.Store | None,
        asked: Callable[[], bool],
    ) -> None:
        self.folder, self.every, self.keep = Path(saving.folder), saving.every, saving.keep
        self.origin, self.rank, self.processes, self.store = origin, rank, processes, store
        self._asked = asked
        self._hold = 0
        self._last: int | None = None

    def due(self, run: TrainingRun, begin: int) -> int:
        """The slot after whose predecessor the next checkpoint is due: at intervals, and where a job has ended, so that
        its adapter can be had while the others train on."""
        regular = begin - begin % self.every + self.every
        return min([regular, *(slot + 1 for slot in run.ends if slot >= begin)])

    def save(self, run: TrainingRun, slot: int) -> None:
        """Write this process's part of the checkpoint after `slot` slots. The first process waits for the others',
        seals the checkpoint and clears older ones away."""
        run.position.set(f"saving the checkpoint after {slot} microbatches")
        folder = self.folder / _slot_name(slot)
        part = self._write(run, folder)
        if self.rank > 0:
            self.store.set(_part_key(slot, self.rank), part.to_json())
            return
        parts = [part]
        if self.processes > 1:
            run.position.waiting(f"the other processes' parts of the checkpoint after {slot} microbatches")
            parts += self._others(slot)
        self._seal(folder, slot, parts)
        self._clear()

    def _write(self, run: TrainingRun, folder: Path) -> CheckpointPart:
        state, steps, stopped = {}, {}, {}
        for adapter in run.adapters:
            state |= {f"{adapter.job.name}/{name}": value for name, value in adapter.state().items()}
            steps[adapter.job.name] = adapter.steps
            if bool(adapter.stopped):
                stopped[adapter.job.name] = adapter.steps_made()
        path = folder / _part_name(self.rank)
        with whole(path) as partial:
            # Not `save_file`: a disk that is full ends a process that writes to mapped memory with SIGBUS.
            partial.write_bytes(save({name: value.detach().to("cpu").contiguous() for name, value in state.items()}))
            entry = FileEntry.of(partial)
        log = run.record.events
        return CheckpointPart(path.name, entry, steps, stopped, {log.path.name: log.entry()} if log else {})

    def _others(self, slot: int) -> list[CheckpointPart]:
        keys = [_part_key(slot, rank) for rank in range(1, self.processes)]
        self.store.wait(keys)
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
        good = [path for path in _slots(self.folder) if _is_whole(path)]
        for old in _slots(self.folder):
            if len(good) >= self.keep and old < good[-self.keep]:
                shutil.rmtree(old, ignore_errors=True)

    def stop_after(self, slot: int, hold: int) -> int | None:
        """The slot after which the run ends, once it was asked to and that is agreed; to be asked before each forward.

        Every process says how far it is when it learns that somebody asked, and may go on to its slot `hold` without
        knowing the answer; the answer is beyond all of these. hold: so far that no other process waits for this one
        before it has said the same.
        """
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

    def no_more_forwards(self, slots: int) -> None:
        """To be called after the last forward, when no other process shall wait for this one's word."""
        if self.store is not None and not self._hold:
            self._say(slots)

    def _say(self, hold: int) -> None:
        self._hold = hold
        self.store.set(_hold_key(self.rank), str(hold))

    def _asked_for_it(self) -> bool:
        return self._asked() or (self.folder / STOP_FILE).exists()


def newest(folder: Path, origin: dict, log: Path | None = None) -> tuple[Checkpoint | None, list[str]]:
    """The newest whole checkpoint that a run can be resumed from, and for each newer one why it is passed over; log:
    the folder of the run's events, which must be there as far as the checkpoint says.

    Raises `CheckpointError` where there was a whole one, but there is none that it can be resumed from."""
    passed, refused = [], []
    for path in reversed(_slots(folder)):
        try:
            return opened(path, origin, log), passed + refused
        except IncompleteError as error:
            passed.append(str(error))
        except CheckpointError as error:
            refused.append(str(error))
    if not refused and (folder / NEWEST).exists():
        refused = [*passed, f"{folder}: its checkpoints are gone"]
    if refused:
        raise CheckpointError(f"{refused[0]}; no good checkpoint is left; to begin anew, move all of them away")
    return None, passed


def last_written(folder: Path) -> Path | None:
    """The newest checkpoint of a run under way, which is whole; it may be removed for a newer one at any moment."""
    if not (folder / NEWEST).exists():
        return None
    return folder / _slot_name(manifest.read_sealed(folder / NEWEST)["slot"])


def opened(path: Path, origin: dict | None = None, log: Path | None = None) -> Checkpoint:
    """A checkpoint, every file of which was compared with the manifest; origin: what it must be of. Raises
    `CheckpointError` naming the file and what is wrong."""
    try:
        facts = manifest.verified(path)
        noted = {name: FileEntry(**entry) for name, entry in facts["events"].items()}
        for key, expected in (origin or {}).items():
            value = facts["origin"].get(key)
            if value != expected:
                # Of a plan, a model and initial states there are hashes.
                which = "" if key in HASHED else f" ({value!r}, not {expected!r})"
                raise CheckpointError(f"{path}: of another run, its {key} is not this one's{which}")
        if path.name != _slot_name(facts["slot"]):
            raise CheckpointError(f"{path}: it is the checkpoint of {_slot_name(facts['slot'])}; it was renamed")
        if log is not None:
            events.require(log, noted)
    except UnfinishedError as error:
        raise IncompleteError(str(error)) from None
    except DamagedError as error:
        raise CheckpointError(str(error)) from None
    return Checkpoint(path, facts["slot"], facts["processes"], facts["steps"], facts["stopped"], noted)


def load(run: TrainingRun, checkpoint: Checkpoint, rank: int) -> None:
    """Put a run where the checkpoint of the same plan and number of processes was."""
    path = checkpoint.part(rank)
    with safe_open(path, framework="pt") as file:
        for adapter in run.adapters:
            prefix = f"{adapter.job.name}/"
            mine = [name for name in sorted(file.keys()) if name.startswith(prefix)]
            state = {name.removeprefix(prefix): file.get_tensor(name) for name in mine}
            _require_fit(path, adapter, state, adapter.state().keys())
            adapter.load(state, checkpoint.steps[adapter.job.name])
    run.begin, run.events_kept = checkpoint.slot, checkpoint.events_kept


def adapter_states(checkpoint: Checkpoint) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
    """Each job of a checkpoint with the state of its adapter, all stages together, as of its last step: so that it can
    be resumed from in another plan, beside other jobs, on another number of stages."""
    for job in sorted(checkpoint.steps):
        yield job, adapter_state(checkpoint, job)


def adapter_state(checkpoint: Checkpoint, job: str) -> dict[str, torch.Tensor]:
    """What `adapter_states` tells of one job. Raises `FileNotFoundError` where the checkpoint has been removed."""
    state: dict[str, torch.Tensor] = {}
    for rank in range(checkpoint.processes):
        with safe_open(checkpoint.part(rank), framework="pt") as file:
            for name in sorted(file.keys()):
                owner, _, rest = name.partition("/")
                if owner == job and not rest.endswith("/gradient"):
                    state[rest] = file.get_tensor(name)
    return state


def seal_initial(folder: Path, steps: dict[str, int]) -> None:
    """Write the manifest of a folder that holds JOB.safetensors, a state of `adapter_states`, for each job of `steps`:
    the steps that it has made. It is a `RunSpec.initial` then."""
    manifest.seal(folder, manifest.entries(folder, [f"{job}.safetensors" for job in steps]), {"steps": steps})


def load_initial(run: TrainingRun, folder: Path) -> None:
    """Give the jobs that are trained in part already what `seal_initial` knows of them."""
    steps = manifest.verified(folder)["steps"]
    for adapter in run.adapters:
        job = adapter.job
        if not job.start:
            continue
        path = folder / f"{job.name}.safetensors"
        if steps.get(job.name) != job.start:
            raise UserError(f"{path}: of {steps.get(job.name)} steps, but {job.name!r} is resumed after {job.start}")
        try:
            with safe_open(path, framework="pt") as file:
                state = {name: file.get_tensor(name) for name in sorted(file.keys())}
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path}: not a file of tensors ({error})") from None
        needed = [name for name in adapter.state() if not name.endswith("/gradient")]
        _require_fit(path, adapter, state, needed)
        adapter.load(state, job.start)


def _require_fit(path: Path, adapter: AdapterTraining, state: dict[str, torch.Tensor], needed: Iterable[str]) -> None:
    """Raise unless a state has all tensors that are needed of the adapter, in the shapes of those that it has now."""
    current = adapter.state()
    for name in needed:
        if name not in state:
            raise UserError(f"{path}: not of the adapter {adapter.job.name!r}, it has no {name}")
        if state[name].shape != current[name].shape:
            shapes = f"{tuple(state[name].shape)}, not {tuple(current[name].shape)}"
            raise UserError(f"{path}: not of the adapter {adapter.job.name!r}, the shape of {name} is {shapes}")


def drop_beyond(folder: Path, checkpoint: Checkpoint | None) -> None:
    """Remove what lies beyond the checkpoint that a run is resumed from: parts of a checkpoint that was never whole
    must not be taken for those of the next one at its slot."""
    for path in _slots(folder):
        if checkpoint is None or path > checkpoint.path:
            path.rename(path.with_name(f"passed-over-{path.name}"))  # in one step
    for path in folder.glob("passed-over-*"):
        shutil.rmtree(path)


def _hash(path: str | Path) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def _hold_key(rank: int) -> str:
    return f"stop-hold-{rank}"


def _part_key(slot: int, rank: int) -> str:
    return f"checkpoint-{slot}-{rank}"


def _part_name(rank: int) -> str:
    return f"rank-{rank}.safetensors"


def _slot_name(slot: int) -> str:
    return f"slot-{slot:09}"


def _slots(folder: Path) -> list[Path]:
    """The checkpoints of a folder, whole or not, oldest first."""
    return sorted(path for path in folder.glob("slot-*") if re.fullmatch(r"slot-\d{9,}", path.name))


def _is_whole(path: Path) -> bool:
    """Was it finished, as far as can be told without reading its tensors?"""
    try:
        return path.name == _slot_name(manifest.facts_of(path)["slot"])
    except UserError:
        return False
