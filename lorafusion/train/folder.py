"""The output folder of a training, and what of it is done: the memory that lets the same command go on.

progress.json        of each job, the steps that are done outside the run in hand; the hashes of what is named below
state/               each job's adapter and optimizer as of that step; a file's name has its hash
runs/000, 001, ...   a workload, its plan, checkpoints and events; a new one when the jobs or the processes change
adapters/JOB         the trained adapters
metrics.jsonl        every step of every job

progress.json is the root: a run or a state that it does not name was never begun, one that it names and that is gone or
changed is an error. What it names is written before it, and what it no longer names is removed after it.
"""

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save

from lorafusion.core import manifest
from lorafusion.core.files import whole, write
from lorafusion.core.manifest import MANIFEST, DamagedError, FileEntry, read_sealed, write_sealed
from lorafusion.core.plan import Plan
from lorafusion.core.schema import Config, UserError, validated
from lorafusion.core.workload import ORDER_KEYS, Job, Workload, content_hash
from lorafusion.engine import events
from lorafusion.engine.checkpoint import Checkpoint, adapter_states, seal_initial
from lorafusion.train.ownership import PROGRESS

MODEL = "model.yaml"
HASH_LETTERS = 16  # of a state's hash in its name


class JobProgress(Config):
    """steps: optimizer steps done. stopped: those before the one that was not finite. described: the job of them.
    state: the file of the adapter after them."""

    steps: int
    stopped: int | None = None
    described: dict
    state: FileEntry


class RunProgress(Config):
    """manifest: of the run's folder. events: how far its files of events went when it was left for good, null while it
    may be resumed."""

    manifest: FileEntry
    events: dict[str, FileEntry] | None = None


class Exported(Config):
    """An adapter that was written after so many steps, and its files."""

    steps: int
    files: dict[str, FileEntry]


class Progress(Config):
    """settings: what all steps depend on besides the jobs. probed: what `engine.memory_probe` measured, by what it
    depends on."""

    settings: dict
    jobs: dict[str, JobProgress] = {}
    runs: dict[str, RunProgress] = {}
    exported: dict[str, Exported] = {}
    probed: dict[str, list] = {}


@dataclass(frozen=True)
class Run:
    """One planned part of a training."""

    folder: Path

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def workload(self) -> Path:
        return self.folder / "workload.json"

    @property
    def plan(self) -> Path:
        return self.folder / "plan.json"

    @property
    def initial(self) -> Path:
        """The states that its jobs begin with, where they are trained in part already."""
        return self.folder / "initial"

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    @property
    def events(self) -> Path:
        return self.folder / "events"


class OutputFolder:
    """A training's output folder. Raises `UserError` where what is in it belongs to another model, or is damaged."""

    def __init__(self, path: Path, settings: dict) -> None:
        self.path = path
        self.progress = Progress(settings=settings)
        if (path / PROGRESS).exists():
            done = read_progress(path)
            # Of a folder that was only marked as ours there is nothing that depends on the settings.
            self.progress = done if done.settings else self.progress
        for key, value in settings.items():
            before = self.progress.settings.get(key)
            if before != value:
                change = f"{key} {before!r}, now it is {value!r}"
                if key == "model.weights" and before and "random" not in (before, value):
                    change = "a model whose weights have other values"
                raise UserError(f"{path}: begun with {change}; take another output folder")
        for run in self.runs():
            self._require_run(run)

    def adapter(self, job: str) -> Path:
        return self.path / "adapters" / job

    def runs(self) -> list[Run]:
        """The runs that were planned, the latest last."""
        return [self._run(name) for name in sorted(self.progress.runs)]

    def _run(self, name: str) -> Run:
        return Run(self.path / "runs" / name)

    def _require_run(self, run: Run) -> None:
        noted = self.progress.runs[run.name]
        with _advice():
            noted.manifest.require(run.folder / MANIFEST)
            manifest.verified(run.folder)
            events.require(run.events, noted.events or {})

    @property
    def in_hand(self) -> Run | None:
        """The run to go on with, if its jobs and processes are still wanted."""
        last = self.runs()[-1:]
        return last[0] if last and self.progress.runs[last[0].name].events is None else None

    def new_run(self, workload: Workload, plan: Plan) -> Run:
        """Plan a run, which is in hand then."""
        run = self._run(f"{len(self.progress.runs):03}")
        if run.folder.exists():  # it was being planned when the command was killed
            shutil.rmtree(run.folder)
        write(run.workload, workload.to_json())
        write(run.plan, plan.to_json())
        names = [run.workload.name, run.plan.name]
        begun = {job.name: job.start for job in workload.jobs if job.start}
        if begun:
            for job in begun:
                with whole(run.initial / f"{job}.safetensors") as partial:
                    shutil.copyfile(self.state_of(job), partial)
            seal_initial(run.initial, begun)
            names.append(f"{run.initial.name}/{MANIFEST}")
        manifest.seal(run.folder, manifest.entries(run.folder, names), {"run": run.name})
        entry = RunProgress(manifest=FileEntry.of(run.folder / MANIFEST))
        self.update(runs=self.progress.runs | {run.name: entry})
        return run

    def update(self, **changes: object) -> None:
        """Change what is known to be done, in one step."""
        changed = self.progress.model_copy(update=changes)
        write_progress(self.path, changed)
        self.progress = changed

    def take_over(self, run: Run, checkpoint: Checkpoint | None) -> None:
        """Leave a run for good: keep each adapter of its last checkpoint, if there is one, for whatever comes next."""
        jobs = dict(self.progress.jobs)
        if checkpoint is not None:
            begun = {job.name: job for job in Workload.read(run.workload).jobs}
            for name, state in adapter_states(checkpoint):
                jobs[name] = JobProgress(steps=checkpoint.steps[name], stopped=checkpoint.stopped.get(name),
                                         described=described(begun[name]), state=self._keep(name, state))  # fmt: skip
        kept = checkpoint.events if checkpoint else {}
        trim_events(run, kept)
        left = self.progress.runs[run.name].model_copy(update={"events": kept})
        self.update(jobs=jobs, runs=self.progress.runs | {run.name: left})
        named = [_state_path(self.path, name, job.state) for name, job in jobs.items()]
        for path in (self.path / "state").glob("*.safetensors"):
            if path not in named:
                path.unlink()

    def _keep(self, job: str, state: dict[str, torch.Tensor]) -> FileEntry:
        """Write an adapter's state to a file that is named by its hash, so that it never replaces another one."""
        path = self.path / "state" / f"{job}.safetensors"
        with whole(path) as partial:
            partial.write_bytes(save(state))
            entry = FileEntry.of(partial)
        path.rename(_state_path(self.path, job, entry))
        return entry

    def state_of(self, job: str) -> Path:
        """The file of a job's adapter and optimizer after the steps that are done. Raises `DamagedError` where it is
        not as it was written."""
        entry = self.progress.jobs[job].state
        path = _state_path(self.path, job, entry)
        entry.require(path)
        return path

    def remaining(self, workload: Workload) -> Workload | None:
        """The jobs that have steps left, each from where it is; None where none has. Raises `UserError` for a job that
        is not the one that was begun under its name."""
        jobs = []
        for job in workload.jobs:
            done = self.progress.jobs.get(job.name)
            if done is None or done.steps == 0:
                jobs.append(job)
                continue
            is_done = done.stopped is not None or done.steps >= len(job.batches)
            self._require_the_same(job, done.steps, done.described, is_done)
            if not is_done:
                jobs.append(job.model_copy(update={"start": done.steps}))
        return workload.model_copy(update={"jobs": tuple(jobs)}) if jobs else None

    def require_continued(self, workload: Workload, run: Run, checkpoint: Checkpoint | None) -> None:
        """As `remaining`, of jobs that have made steps in the run in hand."""
        if checkpoint is None:
            return
        begun = {job.name: described(job) for job in Workload.read(run.workload).jobs}
        for job in workload.jobs:
            steps = checkpoint.steps.get(job.name, 0)
            if steps:
                is_done = job.name in checkpoint.stopped or steps >= len(job.batches)
                self._require_the_same(job, steps, begun[job.name], is_done)

    def _require_the_same(self, job: Job, steps: int, before: dict, is_done: bool) -> None:
        now = described(job)
        for key in ORDER_KEYS:
            if is_done and key in now and now[key] != before.get(key):
                raise UserError(
                    f"job {job.name!r}: {key} is {now[key]!r}, but the job is done, with {steps} steps in {self.path}; "
                    "leave it as it was"
                )
        for key, value in sorted(before.items(), key=lambda item: item[0] == "epochs"):  # which `steps` may decide
            if key not in ORDER_KEYS and now.get(key) != value:
                change = f"{key} is {now.get(key)!r}, but its {steps} steps in {self.path} were made with {value!r}"
                if key == "samples":
                    change = f"its samples are not those that its {steps} steps in {self.path} were made with"
                raise UserError(f"job {job.name!r}: {change}; change it back, or give the job another name")


def read_progress(folder: Path) -> Progress:
    """What is done in a folder. Raises `DamagedError` where the file is not as a training wrote it."""
    path = folder / PROGRESS
    with _advice():
        return validated(Progress, read_sealed(path), path)


@contextmanager
def _advice() -> Iterator[None]:
    """What to do about damage that no earlier checkpoint mends."""
    try:
        yield
    except DamagedError as error:
        raise DamagedError(f"{error}; put it back as it was, or take another output folder") from None


def claim(folder: Path) -> None:
    """Mark a folder, which must be locked, as a training's."""
    if not (folder / PROGRESS).exists():
        write_progress(folder, Progress(settings={}))


def write_progress(folder: Path, progress: Progress) -> None:
    write_sealed(folder / PROGRESS, progress.model_dump(mode="json"))


def remove_partial(folder: Path) -> None:
    """Remove what killed processes had begun to write in a locked folder, and what no earlier version needs either;
    nobody reads it."""
    for place in ("", "data", "state", "runs", "adapters"):
        for path in (folder / place).glob("**/.*" if place == "runs" else ".*"):
            if re.fullmatch(r"\..+\.\d+", path.name) and path.is_file():
                path.unlink()
    for path in [*folder.glob("adapters/.*.partial"), *folder.glob("runs/**/passed-over-*")]:
        shutil.rmtree(path)


def trim_events(run: Run, kept: dict[str, FileEntry]) -> None:
    """Drop the events of a run that are beyond what is kept of it."""
    for path in run.events.glob("*.jsonl"):
        events.trim(path, kept[path.name].size if path.name in kept else 0)


def _state_path(folder: Path, job: str, entry: FileEntry) -> Path:
    return folder / "state" / f"{job}.{entry.sha256[:HASH_LETTERS]}.safetensors"


def described(job: Job) -> dict:
    """What the steps of a job depend on, and what their order does, which may change until it is done."""
    fields = job.model_dump(mode="json", exclude={"start", "samples", "evaluation", "evaluate_every"})
    return fields | {"samples": content_hash(job.model_dump(mode="json", include={"samples"}))}
