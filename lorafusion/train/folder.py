"""The output folder of a training, and what of it is done: the memory that lets the same command go on.

progress.json        of each job, the steps that are done outside the run in hand
state/JOB            each job's adapter and optimizer as of that step
runs/000, 001, ...   a workload, its plan, checkpoints and events; a new one when the jobs or the processes change
adapters/JOB         the trained adapters
metrics.jsonl        every step of every job
"""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from lorafusion.config import Config
from lorafusion.errors import UserError, validated
from lorafusion.files import write
from lorafusion.plan import Plan
from lorafusion.runtime.checkpoint import Found, adapters_of
from lorafusion.workload import Job, Workload, content_hash


class JobProgress(Config):
    """steps: optimizer steps done. stopped: those before the one that was not finite. described: the job of them."""

    steps: int
    stopped: int | None = None
    described: dict


class Progress(Config):
    """settings: what all steps depend on besides the jobs. probed: what `lorafusion.runtime.probe` measured, by what it
    depends on."""

    settings: dict
    jobs: dict[str, JobProgress] = {}
    probed: dict[str, list] = {}


@dataclass(frozen=True)
class Run:
    """One planned part of a training."""

    folder: Path

    @property
    def workload(self) -> Path:
        return self.folder / "workload.json"

    @property
    def plan(self) -> Path:
        return self.folder / "plan.json"

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    @property
    def events(self) -> Path:
        return self.folder / "events"


class OutputFolder:
    """A training's output folder. Raises `UserError` where what is in it belongs to another model."""

    def __init__(self, path: Path, settings: dict) -> None:
        self.path = path
        self.progress = Progress(settings=settings)
        file = path / "progress.json"
        if file.exists():
            done = validated(Progress, _json(file), file)
            # Of a folder that was only marked as ours there is nothing that depends on the settings.
            self.progress = done if done.settings else self.progress
            for key, value in settings.items():
                found = self.progress.settings.get(key)
                if found != value:
                    raise UserError(
                        f"{path}: begun with {key} {found!r}, now it is {value!r}; take another output folder"
                    )

    @property
    def state(self) -> Path:
        return self.path / "state"

    def adapter(self, job: str) -> Path:
        return self.path / "adapters" / job

    def runs(self) -> list[Run]:
        """The runs that were planned, the latest last."""
        return [Run(path) for path in sorted(self.path.glob("runs/*")) if (path / "plan.json").exists()]

    def new_run(self, workload: Workload, plan: Plan) -> Run:
        run = Run(self.path / "runs" / f"{len(list(self.path.glob('runs/*'))):03}")
        write(run.workload, workload.to_json())
        write(run.plan, plan.to_json())  # last, as a run without a plan was not begun
        return run

    def update(self, **changes: object) -> None:
        self.progress = self.progress.model_copy(update=changes)
        write(self.path / "progress.json", json.dumps(self.progress.model_dump(mode="json"), indent=1) + "\n")

    def take_over(self, run: Run, found: Found) -> None:
        """Keep each adapter of a checkpoint for whatever comes next."""
        adapters_of(found, self.state)
        jobs = dict(self.progress.jobs)
        for job in Workload.read(run.workload).jobs:
            done = {"steps": found.steps[job.name], "stopped": found.stopped.get(job.name)}
            jobs[job.name] = JobProgress(**done, described=described(job))
        self.update(jobs=jobs)

    def remaining(self, workload: Workload) -> Workload | None:
        """The jobs that have steps left, each from where it is; None where none has. Raises `UserError` for a job that
        is not the one that was begun under its name."""
        jobs = []
        for job in workload.jobs:
            done = self.progress.jobs.get(job.name)
            if done is None or done.steps == 0:
                jobs.append(job)
                continue
            self._require_the_same(job, done)
            if done.stopped is None and done.steps < len(job.batches):
                jobs.append(job.model_copy(update={"start": done.steps}))
        return workload.model_copy(update={"jobs": tuple(jobs)}) if jobs else None

    def _require_the_same(self, job: Job, done: JobProgress) -> None:
        now = described(job)
        for key, value in done.described.items():
            if now.get(key) != value:
                raise UserError(
                    f"job {job.name!r}: {key} is {now.get(key)!r}, but its {done.steps} steps in {self.path} were made "
                    f"with {value!r}; change it back, or give the job another name"
                )


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Within it no other training uses this output folder."""
    path.mkdir(parents=True, exist_ok=True)
    with open(path / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{path}: another training is using this folder") from None
        yield


def _json(path: Path) -> object:
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error})") from None


def described(job: Job) -> dict:
    """What the steps of a job depend on."""
    fields = job.model_dump(mode="json", exclude={"start", "samples", "evaluation", "evaluate_every"})
    return fields | {"samples": content_hash(job.model_dump(mode="json", include={"samples"}))}
