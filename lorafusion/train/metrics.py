"""What is known of a training while it goes on: from the events of its processes to a row for each step of each job.

Each replica's last stage writes its events (`lorafusion.engine.record.Record`) to a file of its own; a step's row is
complete when the shares of all its microbatches have come in. A run that went on from a checkpoint tells some steps
again, with the same numbers.
"""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path

from lorafusion.core.files import write
from lorafusion.core.schema import UserError
from lorafusion.core.workload import Job, Workload
from lorafusion.engine.events import parse


@dataclass
class StepMetrics:
    """One optimizer step of one job, and the mean loss of its global batch before it.

    missing: tokens of the batch whose losses have not come in yet."""

    missing: int
    loss: float = 0.0
    tokens: int = 0
    norm: float | None = None
    learning_rate: float | None = None
    evaluation: float | None = None

    @property
    def is_complete(self) -> bool:
        return self.norm is not None and not self.missing

    @property
    def values(self) -> dict:
        """What there is to tell of it; what is no number is null, for readers of JSON."""
        values = {key: value for key, value in vars(self).items() if value is not None and key != "missing"}
        return {key: value if math.isfinite(value) else None for key, value in values.items()}


@dataclass
class History:
    """The steps of each job, and the step at which it was stopped."""

    steps: dict[str, dict[int, StepMetrics]] = field(default_factory=dict)
    stopped: dict[str, int] = field(default_factory=dict)

    def complete(self, job: str) -> dict[int, StepMetrics]:
        """The steps of a job that are done, in order."""
        done = {step: row for step, row in self.steps.get(job, {}).items() if row.is_complete}
        return dict(sorted(done.items()))

    def require(self, job: str, steps: int) -> None:
        """Raise `UserError` unless each of a job's first steps has its row."""
        rows = self.complete(job)
        missing = [step + 1 for step in range(steps) if step not in rows]
        if missing:
            raise UserError(
                f"{job}: {len(missing)} of {steps} steps have no row in its events, the first is {missing[0]}"
            )

    def write(self, path: Path) -> None:
        """All steps that are done, a line of JSON each: job, step (from 1), and what is known of a `StepMetrics`."""
        lines = []
        for job in self.steps:
            for step, row in self.complete(job).items():
                lines.append(json.dumps({"job": job, "step": step + 1} | row.values))
        write(path, "".join(f"{line}\n" for line in lines))


class EventReader:
    """Adds the events of one run to a history as they are written."""

    def __init__(self, folder: Path, workload: Workload, history: History) -> None:
        self.folder, self.workload, self.history = folder, workload, history
        self.tokens = [0] * len(workload.jobs)  # of each job, trained in this run
        self._read: dict[Path, tuple[int, int]] = {}  # bytes and lines of each file
        self._shares: dict[tuple[str, int], dict[tuple[Path, int], tuple[float, int]]] = {}

    def poll(self) -> list[tuple[str, int]]:
        """Read what is new; the (job, step) whose rows have changed."""
        changed: list[tuple[str, int]] = []
        for path in sorted(self.folder.glob("replica-*.jsonl")):
            offset, lines = self._read.get(path, (0, 0))
            with open(path, "rb") as file:
                file.seek(offset)
                data = file.read()
            before = len(changed)

            def take(event: dict, path: Path = path) -> None:
                changed.append(self._add(path, event))

            size = parse(path, data, take, lines + 1)
            self._read[path] = (offset + size, lines + len(changed) - before)
        return changed

    def _add(self, path: Path, event: dict) -> tuple[str, int]:
        job = self.workload.jobs[event["adapter"]]
        if "stopped" in event:
            self.history.stopped.setdefault(job.name, event["stopped"])
            return job.name, event["stopped"]
        if "evaluation" in event:  # of the weights after so many steps; each replica has seen a part of the samples
            step = event["step"] - 1
            shares = self._shares.setdefault((f"{job.name}/evaluation", step), {})
            shares[path, event["slot"]] = (event["evaluation"], 0)
            self._row(job, step).evaluation = sum(share for share, _ in shares.values())
        elif "loss" in event:
            step = event["batch"]
            shares = self._shares.setdefault((job.name, step), {})
            shares[path, event["slot"]] = (event["loss"], event["tokens"])
            row = self._row(job, step)
            row.loss, row.tokens = (sum(column) for column in zip(*shares.values(), strict=True))
            row.missing = job.batch_tokens(step) - row.tokens
            self.tokens[event["adapter"]] += event["tokens"]
        else:
            step, row = event["step"], self._row(job, event["step"])
            row.norm, row.learning_rate = event["norm"], event["learning_rate"]
        return job.name, step

    def _row(self, job: Job, step: int) -> StepMetrics:
        rows = self.history.steps.setdefault(job.name, {})
        return rows.setdefault(step, StepMetrics(job.batch_tokens(step)))
