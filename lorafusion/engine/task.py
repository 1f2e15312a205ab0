"""What the processes of a run do: a task, named in the run's spec by its import path, and the task `train`.

A task is a function of a `WorkerProcess`. All processes of a run call it; what it returns is the report of the run. The
other tasks are `memory_probe.probe` and those of the laboratory.
"""

import logging
import signal
from contextlib import closing
from pathlib import Path

import torch
import torch.distributed as dist

from lorafusion.core.clock import canary
from lorafusion.core.plan import Plan, check
from lorafusion.core.schema import UserError
from lorafusion.core.workload import Workload
from lorafusion.engine import checkpoint
from lorafusion.engine.build import build_run, executor_of
from lorafusion.engine.executor import Executor
from lorafusion.engine.process import WorkerProcess
from lorafusion.engine.saving import Checkpoints
from lorafusion.engine.timed import report_of, timed
from lorafusion.engine.training import TrainingRun
from lorafusion.model.lora import adapter_state, peft_config, save_adapter

LOGGER = logging.getLogger(__name__)


def train(process: WorkerProcess) -> dict:
    """The task that runs the spec's plan, from where a checkpoint is; the report of all processes."""
    return train_plan(process)[2]


def train_plan(process: WorkerProcess) -> tuple[TrainingRun, Executor, dict]:
    """As `train`, with the run, for tasks that have more to do with it."""
    spec = process.spec
    if spec.plan is None:
        raise UserError(f"task {spec.task}: expected a plan, found none")
    workload, plan = Workload.read(spec.workload), Plan.read(spec.plan)
    check(plan, workload, source=spec.plan)
    process.require_processes(plan, spec.plan)
    drift = canary(process.device)
    run, execute = build_run(process, workload, plan), executor_of(spec.system)
    with closing(run.record):
        finished = timed(run, execute, lambda: _placed(process, run))
    report = report_of(run) | {"canary": drift, "finished": finished}
    if spec.save_adapters and finished:
        save_adapters(run, Path(spec.save_adapters))
    return run, execute, report


def _placed(process: WorkerProcess, run: TrainingRun) -> list[Checkpoints]:
    """Put a run where it is to begin; what its executor takes besides it."""
    spec = process.spec
    torch.manual_seed(spec.seed)  # PEFT's own dropout draws from torch's generator
    arguments = []
    if spec.initial:
        checkpoint.load_initial(run, Path(spec.initial))
    if spec.saving:
        run.record.kept = False
        arguments = [_checkpoints(process, run)]
    run.gradients = Path(spec.save_gradients) if spec.save_gradients else None
    if spec.events:
        run.open_events(Path(spec.events))
    return arguments


def _checkpoints(process: WorkerProcess, run: TrainingRun) -> Checkpoints:
    """The run's checkpoints; the run is put where the newest one is."""
    spec, rank = process.spec, process.rank
    folder, origin = Path(spec.saving.folder), checkpoint.identity(spec, run.plan.content_hash)
    newest = [None]
    if rank == 0:
        newest[0], reasons = checkpoint.newest(folder, origin, Path(spec.events) if spec.events else None)
        checkpoint.drop_beyond(folder, newest[0])
        for reason in reasons:
            LOGGER.warning(f"passed over a checkpoint: {reason}")
    store = None
    if dist.is_initialized():
        dist.broadcast_object_list(newest, src=0)
        store = dist.distributed_c10d._get_default_store()
    if newest[0] is not None:
        checkpoint.load(run, newest[0], rank)
    asked = []
    signal.signal(signal.SIGTERM, lambda *_: asked.append(True))
    checkpoints = Checkpoints(spec.saving, origin, process, store, lambda: bool(asked))
    checkpoints.reserve(run)
    return checkpoints


def save_adapters(run: TrainingRun, directory: Path) -> None:
    """Write each adapter in PEFT's format, gathered from all stages, to a folder of its name."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    for job in run.workload.jobs:
        parts = [adapter_state(run.stage, job)]
        if dist.is_initialized():
            gathered = [None] * dist.get_world_size() if rank == 0 else None
            dist.gather_object(parts[0], gathered, dst=0)
            parts = gathered
        if rank == 0:
            state = {name: value.contiguous() for part in parts for name, value in part.items()}
            save_adapter(peft_config(job), state, directory / job.name)
