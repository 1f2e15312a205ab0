"""`lorafusion train`: from a jobs file to trained adapters, and on from wherever it was interrupted.

The same command goes on: with the same jobs at the newest checkpoint, exactly; with other jobs, or on another number of
processes, from each adapter's last step in a new plan. So a job is added or withdrawn by editing the file.
"""

import logging
import shlex
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import yaml

from lorafusion.core.config import ModelConfig
from lorafusion.core.files import write
from lorafusion.core.plan import Plan
from lorafusion.core.schema import LONGEST, UserError, shortened
from lorafusion.core.workload import Job, Workload
from lorafusion.engine.checkpoint import Checkpoint, identity, newest
from lorafusion.launch.launch import launch
from lorafusion.launch.lock import Lock, locked
from lorafusion.launch.outcome import Outcome
from lorafusion.model.pretrained import identity as identity_of
from lorafusion.train.config import TrainConfig
from lorafusion.train.export import Exporter
from lorafusion.train.folder import MODEL, OutputFolder, Run, claim, remove_partial, trim_events
from lorafusion.train.jobs_file import JobsFile, read_jobs
from lorafusion.train.metrics import EventReader, History
from lorafusion.train.ownership import is_own
from lorafusion.train.planner import LOG, RunPlanner
from lorafusion.train.prepare import base_model, prepare
from lorafusion.train.progress import Display, WandbLog
from lorafusion.train.status import RUNNING, Status, running

LOGGER = logging.getLogger(__name__)
DONE, FAILED, STOPPED = 0, 1, 75  # exit statuses; 75 is EX_TEMPFAIL: run the same command again
RELOAD = signal.SIGHUP.name
BROKEN = ("crash", "oom", "timeout")  # outcomes of a run that did not come to its end
METRICS = "metrics.jsonl"
METRICS_SECONDS = 5  # between two writings of the metrics, all of them each time


class RefusedError(UserError):
    """A jobs file that cannot be taken; of it nothing has been trained."""


def train(path: Path, file: JobsFile | None = None) -> int:
    """Train the jobs of a file; the exit status. SIGTERM and SIGINT save and end; SIGHUP saves, reads the file again
    and goes on, with the jobs as they were if there is a mistake in it. file: what is read already."""
    again = f"`lorafusion train {shlex.quote(str(path))}` goes on"
    try:
        with _hang_ups() as hang_ups:
            outcome, log = _train_all(path, file or read_jobs(path), hang_ups)
    except OSError as error:
        raise UserError(f"{error.filename or path}: {error.strerror or error}; nothing is lost, {again}") from None
    except KeyboardInterrupt as error:
        LOGGER.warning(f"interrupted, what was saved is kept; {again}")
        if signal.SIGTERM.name in error.args:
            return STOPPED
        raise
    if outcome.status == "ok":
        return DONE
    if outcome.status == "stopped":
        LOGGER.info(f"stopped {outcome.note}; {again}")
        return STOPPED
    LOGGER.info(f"{log} has what came before" + f"; {again}" * (outcome.status in BROKEN))
    LOGGER.error(f"{outcome.status}: {outcome.note}")
    return FAILED


def _train_all(path: Path, file: JobsFile, hang_ups: list[int]) -> tuple[Outcome, Path]:
    """How the training of a file ended, whatever it became meanwhile, and its log. hang_ups: the SIGHUPs that came."""
    before = None
    while True:
        hang_ups.clear()
        try:
            outcome = _train_once(file, hang_ups)
        except RefusedError as error:
            if before is None:
                raise
            file, before = _as_it_was(before, error), None
            continue
        reload = RELOAD in outcome.note or (hang_ups and outcome.status not in ("stopped", *BROKEN))
        if not reload:
            return outcome, file.config.output / LOG
        LOGGER.info(f"{path}: reading it again")
        before = file
        try:
            file = read_jobs(path, before.config.output)
        except UserError as error:
            file, before = _as_it_was(before, error), None


def _as_it_was(file: JobsFile, error: UserError) -> JobsFile:
    reason = shortened("; ".join(error.mistakes), LONGEST - 50)
    LOGGER.error(f"{reason}; going on with the jobs as they were")
    return file._replace(remark=f"with the jobs as they were: {reason}")


@contextmanager
def _hang_ups() -> Iterator[list[int]]:
    """Within it SIGHUP, as of a terminal that is closed, ends nothing and is noted in the list; SIGTERM is a SIGINT."""
    came: list[int] = []

    def interrupt(number: int, _frame: object) -> None:
        raise KeyboardInterrupt(signal.Signals(number).name)

    handlers = {signal.SIGHUP: lambda number, _frame: came.append(number), signal.SIGTERM: interrupt}
    previous = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield came
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _train_once(file: JobsFile, hang_ups: list[int]) -> Outcome:
    config = file.config
    is_there, is_begun = config.output.is_dir(), is_own(config.output)
    with locked(config.output) as lock:
        claim(config.output)
        remove_partial(config.output)
        try:
            with running(Status(config.output, config.path, file.digest, file.remark)) as status:
                try:
                    training = Training(config, lock, status, hang_ups)
                    training.plan()
                except UserError as error:
                    raise RefusedError(*error.mistakes) from None
                outcome = training.run()
                status.jobs = training.states()
                status.write(outcome.status, outcome.note)
                return outcome
        except RefusedError:
            if not is_begun:  # what is there by now is ours, and of no use
                shutil.rmtree(config.output)
                if is_there:
                    config.output.mkdir()
            raise


class Training:
    """One invocation of the command, with the jobs file as it is now."""

    def __init__(self, config: TrainConfig, lock: Lock, status: Status, hang_ups: list[int]) -> None:
        self.config, self.status, self.hang_ups = config, status, hang_ups
        self.model: ModelConfig = base_model(config)
        settings = {f"model.{key}": value for key, value in identity_of(self.model).items()}
        settings |= {"dtype": config.chosen_dtype, "adapter_dtype": config.adapter_dtype, "seed": config.seed}
        self.output = OutputFolder(config.output, settings)
        self.planner = RunPlanner(config, self.model, self.output, lock)
        self.history = History()
        self._readers: dict[Run, EventReader] = {}
        self._run: Run | None = None  # the one to go on with, and the jobs that remain for it
        self._remaining: Workload | None = None
        self._checkpoint_before: Checkpoint | None = None  # of the run in hand, when the command began

    def plan(self) -> None:
        """Find out what remains, and plan it where it is not planned yet."""
        write(self.output.path / MODEL, yaml.safe_dump(self.model.model_dump(mode="json")))
        self.workload = prepare(self.config, self.model, self.output.path)
        self._read_history()
        self.exporter = Exporter(self.output, self.model, self.workload, self.history)
        self._run, self._remaining = self._in_hand()
        if self._remaining is not None and self._run is None:
            self._run = self.output.new_run(self._remaining, self.planner.plan(self._remaining))

    def run(self) -> Outcome:
        """Run what remains; the outcome is "nan" where an adapter was stopped, "failed" where one could not be
        exported."""
        self.exporter.finish()
        self._tell()
        outcome = Outcome("ok")
        if self._run is None or self._remaining is None:
            LOGGER.info(f"{self.output.path}: all jobs are trained")
        elif self.hang_ups:
            outcome = Outcome("stopped", f"by {RELOAD}, before it was begun")
        else:
            outcome = self._execute(self._run, self._remaining)
        self.history.write(self.output.path / METRICS)
        self.exporter.finish()
        return self._judged() if outcome.status == "ok" else outcome

    def states(self) -> dict[str, dict]:
        """Of each job what `status.json` has."""
        return {job.name: self._state(job) for job in self.workload.jobs}

    def _state(self, job: Job) -> dict:
        done = self.output.progress.jobs.get(job.name)
        steps = max(len(self.history.complete(job.name)), done.steps if done else 0)
        if job.name in self.exporter.failures:
            return {"state": "failed", "steps": steps, "note": self.exporter.failures[job.name]}
        if self.exporter.is_done(job):
            return {"state": "stopped" if job.name in self.history.stopped else "exported", "steps": steps}
        return {"state": "training", "steps": steps}

    def _tell(self) -> None:
        self.status.jobs = self.states()
        self.status.write(RUNNING)

    def _in_hand(self) -> tuple[Run | None, Workload | None]:
        """The run to go on with, if there is one of just these jobs, and what remains to be trained in it."""
        remaining = self.output.remaining(self.workload)
        run = self.output.in_hand
        if run is None:
            return None, remaining
        if remaining is not None:
            plan = Plan.read(run.plan)
            capacity = self.config.capacity or plan.capacity
            graphs = {"on": True, "off": False, "auto": bool(plan.buckets)}[self.config.graphs]
            wanted = (remaining.content_hash, self.config.stages, self.config.data_parallel, capacity, graphs)
            if wanted == (plan.workload_hash, plan.stages, plan.data_parallel, plan.capacity, bool(plan.buckets)):
                return run, remaining
        self.output.require_continued(self.workload, run, self._checkpoint_before)
        self.output.take_over(run, self._checkpoint_before)
        return None, self.output.remaining(self.workload)

    def _checkpoint_of(self, run: Run) -> Checkpoint | None:
        """The checkpoint that a run goes on from."""
        origin = identity(self.planner.bare_spec(run), Plan.read(run.plan).content_hash)
        checkpoint, reasons = newest(run.checkpoints, origin, run.events)
        for reason in reasons:
            LOGGER.warning(f"passed over a checkpoint: {reason}")
        return checkpoint

    def _execute(self, run: Run, workload: Workload) -> Outcome:
        # That of a run in hand has read what is known already: no progress of this command, nor to be logged again.
        reader = self._readers.get(run) or EventReader(run.events, workload, self.history)
        wandb = None
        if self.config.wandb != "off":
            name = f"{self.output.path.name}-{run.folder.name}"
            wandb = WandbLog(self.config.wandb, self.config.wandb_project, name, self.output.path, workload)
        written = 0.0
        with Display(workload, Plan.read(run.plan), reader) as display, open(self.output.path / LOG, "a") as log:

            def look() -> None:
                nonlocal written
                changed = reader.poll()
                display.note(changed)
                if wandb:
                    for job, step in changed:
                        wandb.log(job, step, self.history)
                if time.monotonic() - written > METRICS_SECONDS:
                    self.history.write(self.output.path / METRICS)
                    written = time.monotonic()
                if self.exporter.look(run):
                    self._tell()
                display.update()

            outcome = launch(
                self.planner.spec(run), self.config.processes, stall=60 * self.config.stall_minutes, look=look, log=log
            )
            look()
        if wandb:
            wandb.finish()
        if outcome.without_graphs:
            LOGGER.warning(outcome.without_graphs)
        if outcome.status == "ok":
            self.output.take_over(run, self._checkpoint_of(run))
        return outcome

    def _read_history(self) -> None:
        """What all runs so far have told, but for what will be run again."""
        for run in self.output.runs():
            if run == self.output.in_hand:
                self._checkpoint_before = checkpoint = self._checkpoint_of(run)
                trim_events(run, checkpoint.events if checkpoint else {})
            self._readers[run] = EventReader(run.events, Workload.read(run.workload), self.history)
            self._readers[run].poll()

    def _judged(self) -> Outcome:
        """How a training ends whose processes ended well: each job has made its steps, each step has its row, each
        adapter is there."""
        failures, stopped = dict(self.exporter.failures), []
        for job in self.workload.jobs:
            done = self.output.progress.jobs[job.name]
            if done.stopped is not None:
                stopped.append(f"{job.name} at step {done.stopped + 1}")
            elif done.steps < len(job.batches):
                failures.setdefault(job.name, f"{done.steps} of {len(job.batches)} steps are done")
            if not self.exporter.is_done(job):
                failures.setdefault(job.name, "its adapter is not there")
        if failures:
            reasons = "; ".join(f"{name} could not be exported: {reason}" for name, reason in failures.items())
            return Outcome("failed", f"{reasons}; the others are exported, the same command tries again")
        if stopped:
            reason = f"{', '.join(stopped)}: the gradient is not finite, the adapter has the weights before"
            return Outcome("nan", f"{reason}; the others are trained")
        return Outcome("ok")
