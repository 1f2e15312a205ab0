"""Checkpoints of a run: adapters, optimizer states, gradients on their way, and the place in the plan.

A checkpoint is a folder `slot-N`: N slots of the plan are done. Each process writes its own part, a file of tensors and
then a small one that says what it is of and what the first one's hash is; nobody waits for the others. It is whole when
all parts are there and have those hashes. So a process may be killed at any moment: a part without its companion, or a
checkpoint without all parts, is as if it were not there.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from lorafusion.errors import UserError
from lorafusion.files import whole, write
from lorafusion.runtime.pipeline import AHEAD
from lorafusion.runtime.spec import STOP_FILE, RunSpec, Saving
from lorafusion.runtime.training import TrainingRun

VERSION = 1
ASKED = "stop-asked"  # in the processes' store: somebody was asked to stop
BEYOND = AHEAD + 1  # slots; messages of so many may be waited for already when a process learns where to stop


class CheckpointError(UserError):
    """A checkpoint that cannot be gone on from, and why."""


class IncompleteError(CheckpointError):
    """One that its processes did not come to finish, as where they were killed."""


@dataclass(frozen=True)
class Found:
    """A whole checkpoint. steps: of each adapter, those that are done. stopped: of each one that was stopped, the steps
    that its weights have seen."""

    path: Path
    slot: int
    steps: dict[str, int]
    stopped: dict[str, int]


def identity(spec: RunSpec, plan_hash: str) -> dict:
    """What a run must have in common with a checkpoint to go on from it exactly."""
    model = hashlib.sha256(Path(spec.model).read_bytes()).hexdigest() if spec.model.endswith(".yaml") else spec.model
    keys = {"system", "dtype", "adapter_dtype", "seed"}
    return {"version": VERSION, "plan": plan_hash, "model": model, **spec.model_dump(include=keys)}


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

    def save(self, run: TrainingRun, slot: int) -> None:
        """Write this process's part of the checkpoint after `slot` slots, and clear older ones away."""
        run.position.set(f"saving the checkpoint after {slot} microbatches")
        folder = self.folder / f"slot-{slot:09}"
        folder.mkdir(parents=True, exist_ok=True)
        state, steps, stopped = {}, {}, {}
        for adapter in run.adapters:
            state |= {f"{adapter.job.name}/{name}": value for name, value in adapter.state().items()}
            steps[adapter.job.name] = adapter.steps
            if bool(adapter.stopped):
                stopped[adapter.job.name] = adapter.steps_made()
        path = folder / f"rank-{self.rank}.safetensors"
        with whole(path) as partial:
            save_file({name: value.detach().to("cpu").contiguous() for name, value in state.items()}, partial)
            digest = _digest(partial)
        described = self.origin | {"slot": slot, "rank": self.rank, "processes": self.processes, "sha256": digest,
                                   "steps": steps, "stopped": stopped}  # fmt: skip
        write(path.with_suffix(".json"), json.dumps(described) + "\n")
        if self.rank == 0:
            self._clear()

    def _clear(self) -> None:
        """Remove checkpoints that are older than the last whole ones."""
        good = [one for one in _slots(self.folder) if _is_whole(one)]
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
            said = [_hold_key(rank) for rank in range(self.processes)]
            if self._hold and (slot > self._hold or self.store.check(said)):
                self.store.wait(said)
                self._last = BEYOND + max(int(self.store.get(key)) for key in said)
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


def newest(folder: Path, origin: dict) -> tuple[Found | None, list[str]]:
    """The newest whole checkpoint that a run can go on from, and for each newer one why it is passed over.

    Raises `CheckpointError` where there are whole ones, but none that it can go on from."""
    passed, refused = [], []
    for path in reversed(_slots(folder)):
        try:
            return opened(path, origin), passed + refused
        except IncompleteError as error:
            passed.append(str(error))
        except CheckpointError as error:
            refused.append(str(error))
    if refused:
        raise CheckpointError(f"{refused[0]}; to begin anew, move {folder} away")
    return None, passed


def opened(path: Path, origin: dict | None = None) -> Found:
    """A checkpoint, checked; origin: what it must be of. Raises `CheckpointError` naming the file and what is wrong."""
    missing = _missing(path)
    if missing:
        raise IncompleteError(f"{path}: incomplete, {missing}")
    for part in _parts(path):
        described = _described(part)
        for key, expected in (origin or {}).items():
            if described.get(key) != expected:
                raise CheckpointError(f"{part}: of another run, its {key} is {described.get(key)!r}, not {expected!r}")
        tensors = part.with_suffix(".safetensors")
        if _digest(tensors) != described["sha256"]:
            raise CheckpointError(f"{tensors}: corrupt, its hash is not the one in {part.name}")
    return Found(path, described["slot"], described["steps"], described["stopped"])


def load(run: TrainingRun, found: Found, rank: int) -> None:
    """Put a run where the checkpoint of the same plan and number of processes was."""
    with safe_open(found.path / f"rank-{rank}.safetensors", framework="pt") as file:
        for adapter in run.adapters:
            prefix = f"{adapter.job.name}/"
            mine = [name for name in sorted(file.keys()) if name.startswith(prefix)]
            state = {name.removeprefix(prefix): file.get_tensor(name) for name in mine}
            adapter.load(state, found.steps[adapter.job.name])
    run.begin = found.slot


def adapters_of(found: Found, folder: Path) -> None:
    """Write each adapter of a checkpoint, all stages together, to `folder`: as of its last step, so that it can be gone
    on with in another plan, beside other jobs, on another number of stages."""
    states: dict[str, dict[str, torch.Tensor]] = {}
    for part in _parts(found.path):
        with safe_open(part.with_suffix(".safetensors"), framework="pt") as file:
            for name in sorted(file.keys()):
                job, _, rest = name.partition("/")
                if not rest.endswith("/gradient"):
                    states.setdefault(job, {})[rest] = file.get_tensor(name)
    for job, state in states.items():
        with whole(folder / f"{job}.safetensors") as partial:
            save_file(state, partial)


def load_initial(run: TrainingRun, folder: Path) -> None:
    """Give the jobs that are trained in part already what `adapters_of` kept of them."""
    for adapter in run.adapters:
        if not adapter.job.start:
            continue
        path = folder / f"{adapter.job.name}.safetensors"
        try:
            with safe_open(path, framework="pt") as file:
                adapter.load({name: file.get_tensor(name) for name in sorted(file.keys())}, adapter.job.start)
        except (OSError, SafetensorError, KeyError) as error:
            raise UserError(f"{path}: not what training {adapter.job.name!r} can go on with ({error})") from None


def set_aside(folder: Path, found: Found | None) -> None:
    """Rename what lies beyond the checkpoint that a run goes on from: parts of a checkpoint that was never whole must
    not be taken for those of the next one at its slot."""
    for path in _slots(folder):
        if found is None or path > found.path:
            target = path.with_name(f"passed-over-{path.name}")
            shutil.rmtree(target, ignore_errors=True)
            path.rename(target)


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _hold_key(rank: int) -> str:
    return f"stop-hold-{rank}"


def _slots(folder: Path) -> list[Path]:
    """The checkpoints of a folder, whole or not, oldest first."""
    return sorted(path for path in folder.glob("slot-*") if re.fullmatch(r"slot-\d{9,}", path.name))


def _parts(path: Path) -> list[Path]:
    return sorted(path.glob("rank-*.json"))


def _described(part: Path) -> dict:
    try:
        return json.loads(part.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise CheckpointError(f"{part}: corrupt, not JSON") from None


def _is_whole(path: Path) -> bool:
    try:
        return not _missing(path)
    except CheckpointError:
        return False


def _missing(path: Path) -> str:
    """What a checkpoint lacks to be whole; empty if nothing."""
    parts = _parts(path)
    if not parts:
        return "no process has finished writing it"
    expected = _described(parts[0]).get("processes", 0)
    if len(parts) != expected:
        return f"{len(parts)} of {expected} parts are there"
    gone = [part.stem for part in parts if not part.with_suffix(".safetensors").exists()]
    return f"the tensors of {gone[0]} are gone" if gone else ""
