"""`lorafusion train`: from a jobs file to trained adapters, and on from wherever it was interrupted.

The same command goes on: with the same jobs at the newest checkpoint, exactly; with other jobs, or on another number of
processes, from each adapter's last step in a new plan. So a job is added or withdrawn by editing the file.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from pathlib import Path

import yaml

from lorafusion.config import ModelConfig
from lorafusion.errors import UserError
from lorafusion.files import write
from lorafusion.measure.environment import gpu_state
from lorafusion.plan import Plan
from lorafusion.runtime.checkpoint import Found, identity, newest
from lorafusion.runtime.launch import Outcome, launch
from lorafusion.runtime.probe import Measured, capacity_of
from lorafusion.runtime.spec import RunSpec, Saving
from lorafusion.runtime.training import trim_events
from lorafusion.scheduler import fast
from lorafusion.simulator import model_costs
from lorafusion.train.config import TrainConfig, read_train_config
from lorafusion.train.export import export
from lorafusion.train.folder import OutputFolder, Run, locked
from lorafusion.train.metrics import EventReader, History
from lorafusion.train.ownership import claim, require_own
from lorafusion.train.prepare import DATA, base_model, prepare
from lorafusion.train.progress import Display, WandbLog
from lorafusion.workload import Workload, content_hash

SYSTEM = "lorafusion"
CPU_CAPACITY = 2048  # tokens, where nothing is probed
DONE, FAILED, STOPPED = 0, 1, 75  # exit statuses; 75 is EX_TEMPFAIL: run the same command again
RELOAD = "SIGHUP"
METRICS_SECONDS = 5  # between two writings of the metrics, all of them each time


def train(path: Path) -> int:
    """Train the jobs of a file; the exit status. SIGTERM and SIGINT save and end; SIGHUP saves, reads the file again
    and goes on."""
    while True:
        config = read_train_config(path)
        require_own(config)
        with locked(config.output):
            claim(config.output)
            training = Training(config)
            outcome = training.run()
        if outcome.status != "stopped" or RELOAD not in outcome.note:
            break
        print(f"{path}: reading it again", file=sys.stderr)
    write(training.output.path / "status.json", json.dumps({"status": outcome.status, "note": outcome.note}) + "\n")
    if outcome.status == "ok":
        return DONE
    if outcome.status == "stopped":
        print(f"stopped {outcome.note}; the same command goes on", file=sys.stderr)
        return STOPPED
    print(f"error: {outcome.status}: {outcome.note}; its log: {training.log}", file=sys.stderr)
    return FAILED


class Training:
    """One invocation of the command, with the jobs file as it is now."""

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        self.model: ModelConfig = base_model(config)
        text = yaml.safe_dump(self.model.model_dump(mode="json"))
        settings = {"model": hashlib.sha256(text.encode()).hexdigest()[:16], "dtype": config.chosen_dtype,
                    "adapter_dtype": config.adapter_dtype, "seed": config.seed}  # fmt: skip
        self.output = OutputFolder(config.output, settings)
        self.model_file, self.log = config.output / "model.yaml", config.output / "log.txt"
        self._model_text = text
        self._readers: dict[Run, EventReader] = {}

    def run(self) -> Outcome:
        """Plan what remains and run it; the outcome is "nan" where an adapter was stopped."""
        write(self.model_file, self._model_text)
        workload = prepare(self.config, self.output.path)
        history = self._history()
        outcome = Outcome("ok")
        run, remaining = self._in_hand(workload)
        if remaining is not None:
            outcome = self._execute(run or self._planned(remaining), remaining, history)
        else:
            print(f"{self.output.path}: all jobs are trained", file=sys.stderr)
        history.write(self.output.path / "metrics.jsonl")
        return self._exported(workload, history) if outcome.status == "ok" else outcome

    def _in_hand(self, workload: Workload) -> tuple[Run | None, Workload | None]:
        """The run to go on with, if there is one of just these jobs, and what remains to be trained in it."""
        remaining = self.output.remaining(workload)
        runs = self.output.runs()
        if not runs or remaining is None:
            return None, remaining
        plan = Plan.read(runs[-1].plan)
        capacity = self.config.capacity or plan.capacity
        wanted = (remaining.content_hash, self.config.stages, self.config.data_parallel, capacity)
        if wanted == (plan.workload_hash, plan.stages, plan.data_parallel, plan.capacity):
            return runs[-1], remaining
        self._take_over(runs[-1])
        return None, self.output.remaining(workload)

    def _take_over(self, run: Run) -> None:
        found = self._found(run)
        if found is not None:
            self.output.take_over(run, found)

    def _found(self, run: Run) -> Found | None:
        """The checkpoint that a run goes on from."""
        origin = identity(self._base_spec(run.workload, 0.0), Plan.read(run.plan).content_hash)
        return newest(run.checkpoints, origin)[0]

    def _planned(self, remaining: Workload) -> Run:
        stages = self.config.stages
        capacity, share = self._capacity(remaining, self.config.capacity)
        costs = model_costs(self.model, stages, checkpointing=share > 0)
        plan = fast.plan(remaining, SYSTEM, stages, capacity, self.config.data_parallel, costs)
        told = f"{len(remaining.jobs)} jobs, {remaining.tokens} tokens in {plan.statistics.microbatches} microbatches"
        print(f"{told} of at most {capacity} tokens, fill {plan.statistics.fill:.2f}", file=sys.stderr)
        return self.output.new_run(remaining, plan)

    def _capacity(self, workload: Workload, capacity: int | None) -> tuple[int, float]:
        """Tokens of a microbatch, and the share of the layers that recompute their activations: stated, or measured."""
        share = {"none": 0.0, "all": 1.0, "auto": None}.get(self.config.checkpointing, self.config.checkpointing)
        samples = [sample for job in workload.jobs for sample in (*job.samples, *job.evaluation)]
        longest = max(sample.tokens for sample in samples)
        if self.config.chosen_device == "cpu":
            return capacity or max(CPU_CAPACITY, longest), share or 0.0
        if capacity and share is not None:
            return capacity, share
        fits, found = capacity_of(self._measured(workload), longest, share, wanted=capacity)
        return capacity or fits, found

    def _measured(self, workload: Workload) -> list[Measured]:
        """What microbatches of these jobs take on each stage; measured once for the same adapters and GPU."""
        adapters = [job.model_dump(mode="json", include={"rank", "target_modules"}) for job in workload.jobs]
        key = content_hash([adapters, self.config.stages, gpu_state()["gpu_name"]])
        if key not in self.output.progress.probed:
            self.output.update(probed=self.output.progress.probed | {key: self._probed(workload)})
        return [Measured.from_json(one) for one in self.output.progress.probed[key]]

    def _probed(self, workload: Workload) -> list:
        print("measuring how many tokens a microbatch may hold", file=sys.stderr)
        file = self.output.path / "probe.json"
        write(file, workload.to_json())
        spec = self._base_spec(file, 0.0)
        with open(self.log, "a") as log:
            outcome = launch(spec, self.config.stages, stall=60 * self.config.stall_minutes, log=log)
        if outcome.status != "ok":
            raise UserError(f"capacity: could not be measured, {outcome.note}; state it, or see {self.log}")
        return outcome.report["stages"]

    def _base_spec(self, workload: Path, share: float) -> RunSpec:
        config = self.config
        return RunSpec(system=SYSTEM, model=str(self.model_file), workload=str(workload), device=config.chosen_device,
                       dtype=config.chosen_dtype, adapter_dtype=config.adapter_dtype, seed=config.seed,
                       checkpointing=share)  # fmt: skip

    def _spec(self, run: Run) -> RunSpec:
        share = self._capacity(Workload.read(run.workload), Plan.read(run.plan).capacity)[1]
        more = {"plan": str(run.plan), "tokens": str(self.output.path / DATA), "initial": str(self.output.state),
                "saving": Saving(folder=str(run.checkpoints), every=self.config.save_every, keep=self.config.keep),
                "events": str(run.events)}  # fmt: skip
        return self._base_spec(run.workload, share).model_copy(update=more)

    def _execute(self, run: Run, workload: Workload, history: History) -> Outcome:
        # That of a run in hand has read what is known already: no progress of this command, nor to be logged again.
        reader = self._readers.get(run) or EventReader(run.events, workload, history)
        wandb = None
        if self.config.wandb != "off":
            name = f"{self.output.path.name}-{run.folder.name}"
            wandb = WandbLog(self.config.wandb, self.config.wandb_project, name, self.output.path, workload)
        written = 0.0
        with Display(workload, reader) as display, open(self.log, "a") as log:

            def look() -> None:
                nonlocal written
                changed = reader.poll()
                for job, step in changed if wandb else ():
                    wandb.log(job, step, history)
                if time.monotonic() - written > METRICS_SECONDS:
                    history.write(self.output.path / "metrics.jsonl")
                    written = time.monotonic()
                display.update()

            outcome = launch(
                self._spec(run), self.config.processes, stall=60 * self.config.stall_minutes, look=look, log=log
            )
            look()
        if wandb:
            wandb.finish()
        if outcome.status == "ok":
            self._take_over(run)
        return outcome

    def _history(self) -> History:
        """What all runs so far have told, but for what will be run again."""
        history = History()
        for run in self.output.runs()[-1:]:
            found = self._found(run)
            for path in run.events.glob("*.jsonl"):
                trim_events(path, found.slot if found else 0)
        for run in self.output.runs():
            self._readers[run] = EventReader(run.events, Workload.read(run.workload), history)
            self._readers[run].poll()
        return history

    def _exported(self, workload: Workload, history: History) -> Outcome:
        """Write the adapters of all jobs."""
        stopped = []
        for job in workload.jobs:
            last = self.output.progress.jobs[job.name].stopped
            if last is not None:
                stopped.append(f"{job.name} at step {last + 1}")
            steps = {step: row for step, row in history.complete(job.name).items() if last is None or step < last}
            state, folder = self.output.state / f"{job.name}.safetensors", self.output.adapter(job.name)
            export(
                job, self.model, state, steps, stopped=last is not None, others=len(workload.jobs) - 1, folder=folder
            )
            print(folder, file=sys.stderr)
        if stopped:
            reason = f"{', '.join(stopped)}: the gradient is not finite, the adapter has the weights before"
            return Outcome("nan", f"{reason}; the others are trained")
        return Outcome("ok")
