"""What a person sees of a training: a bar for each job on a terminal, else a line now and then; and wandb."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
from rich.text import Text

from lorafusion.core.machine import process_seconds
from lorafusion.core.plan import Plan
from lorafusion.core.plugins import import_extra
from lorafusion.core.wandb_runs import private_wandb
from lorafusion.core.workload import Workload
from lorafusion.train.metrics import EventReader, History

LOGGER = logging.getLogger(__name__)
SHOW_SECONDS, LINE_SECONDS = 1, 30


class _TokensPerSecond(ProgressColumn):
    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(f"{speed:,.0f} tok/s" if speed else "")


class Display:
    """Shows how far each job of a run is, and when it is expected to end: the plan says what comes before its last
    step. To be used as a context, and told a few times a second to `update`."""

    def __init__(self, workload: Workload, plan: Plan, reader: EventReader) -> None:
        self.workload, self.reader, self._needed = workload, reader, needed_tokens(plan)
        self.console = Console(stderr=True)
        self.progress = Progress(
            TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f} %"),
            TextColumn("{task.fields[summary]}"), _TokensPerSecond(), TextColumn("{task.fields[left]}"),
            console=self.console, disable=not self.console.is_terminal,
        )  # fmt: skip
        self.before = sum(reader.tokens)
        self.tasks = [
            self.progress.add_task(job.name, total=job.tokens, completed=tokens, summary="", left="")
            for job, tokens in zip(workload.jobs, reader.tokens, strict=True)
        ]
        self.begin = self._said = time.monotonic()
        self._shown = 0.0
        self._has_begun = False

    def __enter__(self) -> Display:
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()
        if self.progress.disable and any(self.reader.tokens):
            self._line(self.reader.history)

    def update(self) -> None:
        if time.monotonic() - self._shown < SHOW_SECONDS:
            return
        self._shown = time.monotonic()
        history, left = self.reader.history, self._left()
        for index, (task, job) in enumerate(zip(self.tasks, self.workload.jobs, strict=True)):
            words = summary(history, job.name, len(job.batches))
            self.progress.update(task, completed=self.reader.tokens[index], summary=words, left=left[index])
        if self.progress.disable and time.monotonic() - self._said > LINE_SECONDS:
            self._said = time.monotonic()
            self._line(history)

    def note(self, changed: Iterable[tuple[str, int]]) -> None:
        """Say, once, when a first step is made. changed: as of `EventReader.poll`."""
        rows = (self.reader.history.steps.get(job, {}).get(step) for job, step in changed)
        if not self._has_begun and any(row is not None and row.is_complete for row in rows):
            self._has_begun = True
            LOGGER.info(f"the first step was made {process_seconds():.0f} s after the command began")

    def _speed(self) -> float:
        """Tokens a second of all jobs since the display was made."""
        return (sum(self.reader.tokens) - self.before) / (time.monotonic() - self.begin)

    def _left(self) -> list[str]:
        """The time until each job is expected to end; nothing for one that has ended, or while there is no speed."""
        done, speed = sum(self.reader.tokens), self._speed()
        left = [max(0, self._needed[adapter] - done) for adapter in range(len(self.workload.jobs))]
        return [f"{timedelta(seconds=round(tokens / speed))} left" if tokens and speed else "" for tokens in left]

    def _line(self, history: History) -> None:
        jobs = "; ".join(
            f"{job.name} {summary(history, job.name, len(job.batches))}{left and ', '}{left}"
            for job, left in zip(self.workload.jobs, self._left(), strict=True)
        )
        done = sum(self.reader.tokens) / self.workload.tokens
        LOGGER.info(f"{done:.0%}, {self._speed():,.0f} tok/s: {jobs}")


def needed_tokens(plan: Plan) -> dict[int, int]:
    """Of each adapter the tokens of all that a plan has up to its last step."""
    needed: dict[int, int] = {}
    tokens = 0
    for slot, adapters in zip(plan.slots(), plan.stepping(), strict=True):
        tokens += sum(microbatch.tokens for microbatch in slot)
        needed |= dict.fromkeys(adapters, tokens)
    return needed


def summary(history: History, job: str, steps: int) -> str:
    """A job in a few words: its step, its last loss, its last evaluation."""
    done = history.complete(job)
    if job in history.stopped:
        return f"stopped at step {history.stopped[job] + 1}: its gradient is not finite"
    if not done:
        return f"step 0/{steps}"
    last, row = next(reversed(done.items()))
    evaluated = [step.evaluation for step in done.values() if step.evaluation is not None]
    more = f", evaluation {evaluated[-1]:.4f}" if evaluated else ""
    return f"step {last + 1}/{steps}, loss {row.loss:.4f}{more}"


class WandbLog:
    """The same numbers for wandb, a line for each step of each job; offline unless told otherwise."""

    def __init__(self, mode: str, project: str, name: str, folder: Path, workload: Workload) -> None:
        import_extra("wandb", "wandb", f"wandb: {mode}")
        config = workload.model_dump(mode="json", exclude={"jobs": {"__all__": {"samples", "evaluation"}}})
        with ExitStack() as stack:
            start = stack.enter_context(private_wandb(folder, mode))
            self.run = start(project=project, name=name, config=config)
            self._stack = stack.pop_all()
        self._logged: dict[tuple[str, int], dict] = {}
        for job in workload.jobs:
            self.run.define_metric(f"{job.name}/*", step_metric=f"{job.name}/step")

    def log(self, job: str, step: int, history: History) -> None:
        row = history.steps.get(job, {}).get(step)
        if row is not None and row.is_complete and self._logged.get((job, step)) != row.values:
            self._logged[job, step] = row.values
            self.run.log({f"{job}/{key}": value for key, value in row.values.items()} | {f"{job}/step": step + 1})

    def finish(self) -> None:
        with self._stack:
            self.run.finish()
