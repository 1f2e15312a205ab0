"""Checkpoints of a run: adapters, optimizer states, gradients on their way, and the place in the plan.

A checkpoint is a folder `slot-N`: N slots of the plan are done. Each process writes its own part and says so; when all
have, the first process writes the manifest: the files with their hashes, what they are of, how far each adapter and
each file of events is. So a process may be killed at any moment: a checkpoint without its manifest is as if it were not
there. One that differs from its manifest in a bit is passed over. `newest.json` beside the checkpoints says that there
was a whole one, so that a run whose checkpoints are all damaged or gone is not begun anew in silence.
"""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from lorafusion.core import manifest
from lorafusion.core.config import read_model
from lorafusion.core.manifest import MANIFEST, DamagedError, FileEntry, UnfinishedError
from lorafusion.core.schema import UserError
from lorafusion.core.workload import content_hash
from lorafusion.engine import events
from lorafusion.engine.adapters import AdapterTraining
from lorafusion.engine.training import TrainingRun
from lorafusion.launch.spec import RunSpec

VERSION = 2
HASHED = ("plan", "model", "initial")  # of what a checkpoint's origin has a hash
NEWEST = "newest.json"


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
        return self.path / part_name(rank)

    @property
    def events_kept(self) -> dict[str, int]:
        """Bytes of each file of events."""
        return {name: entry.size for name, entry in self.events.items()}


def identity(spec: RunSpec, plan_hash: str) -> dict:
    """What a run must have in common with a checkpoint to be resumed from it exactly."""
    model = spec.model
    if model.endswith(".yaml"):  # wherever its weights lie
        model = content_hash(read_model(model).model_dump(mode="json", exclude={"weights", "revision"}))
    initial = _hash(Path(spec.initial) / MANIFEST) if spec.initial else None
    keys = {"system", "dtype", "adapter_dtype", "seed"}
    return {"version": VERSION, "plan": plan_hash, "model": model, "initial": initial, **spec.model_dump(include=keys)}


def newest(folder: Path, origin: dict, log: Path | None = None) -> tuple[Checkpoint | None, list[str]]:
    """The newest whole checkpoint that a run can be resumed from, and for each newer one why it is passed over; log:
    the folder of the run's events, which must be there as far as the checkpoint says.

    Raises `CheckpointError` where there was a whole one, but there is none that it can be resumed from."""
    passed, refused = [], []
    for path in reversed(slots(folder)):
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
    return folder / slot_name(manifest.read_sealed(folder / NEWEST)["slot"])


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
        if path.name != slot_name(facts["slot"]):
            raise CheckpointError(f"{path}: it is the checkpoint of {slot_name(facts['slot'])}; it was renamed")
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
    for path in slots(folder):
        if checkpoint is None or path > checkpoint.path:
            path.rename(path.with_name(f"passed-over-{path.name}"))  # in one step
    for path in folder.glob("passed-over-*"):
        shutil.rmtree(path)


def _hash(path: str | Path) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def part_name(rank: int) -> str:
    return f"rank-{rank}.safetensors"


def slot_name(slot: int) -> str:
    return f"slot-{slot:09}"


def slots(folder: Path) -> list[Path]:
    """The checkpoints of a folder, whole or not, oldest first."""
    return sorted(path for path in folder.glob("slot-*") if re.fullmatch(r"slot-\d{9,}", path.name))


def is_whole(path: Path) -> bool:
    """Was it finished, as far as can be told without reading its tensors?"""
    try:
        return path.name == slot_name(manifest.facts_of(path)["slot"])
    except UserError:
        return False
