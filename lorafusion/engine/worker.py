"""One process of a run: a pipeline stage, from start-up to its report. Started by `lorafusion.launch.launch`.

Usage: python -m lorafusion.engine.worker SPEC.json REPORT_DIRECTORY, alone or under torchrun. Each process ends with
a report in the directory: rank 0 the run's measurements (report.json), a process that failed its cause
(failure-RANK.json).
"""

from __future__ import annotations

import gc
import json
import logging
import os
import signal
import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from lorafusion.core.clock import Meter, canary
from lorafusion.core.config import read_model, read_systems
from lorafusion.core.files import write
from lorafusion.core.log import start_logging
from lorafusion.core.plan import Plan, check
from lorafusion.core.plugins import load
from lorafusion.core.schema import UserError, one_of, validated
from lorafusion.core.workload import Workload
from lorafusion.data.packing import BatchBuilder
from lorafusion.data.store import JobTokens
from lorafusion.data.tokens import SyntheticTokens, TokenSource
from lorafusion.engine import checkpoint, memory_probe
from lorafusion.engine.pipeline import Pipeline
from lorafusion.engine.timed import report_of, timed
from lorafusion.engine.training import TrainingRun
from lorafusion.lab import trials
from lorafusion.lab.cost import known_cost
from lorafusion.lab.table.result import FaultyRunError
from lorafusion.launch.heartbeat import ENDED, Position
from lorafusion.launch.launch import end_with_parent
from lorafusion.launch.lock import join
from lorafusion.launch.spec import RunSpec
from lorafusion.model.liger import is_installed, use_liger
from lorafusion.model.lora import adapter_state, inject_adapters, peft_config, save_adapter
from lorafusion.model.merged import merge_qkv
from lorafusion.model.stage import Stage, fill_weights

LOGGER = logging.getLogger(__name__)
RENDEZVOUS_TIMEOUT = timedelta(minutes=10)


def main(spec_path: str, report_directory: str) -> int:
    end_with_parent()
    start_logging()
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    reports = Path(report_directory)
    position = Position(reports, rank)
    try:
        spec = validated(RunSpec, json.loads(Path(spec_path).read_text()), spec_path)
        if spec.lock:
            join(spec.lock)
        device = _device(spec)
        _import_all(spec.system)
        if world > 1:
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=RENDEZVOUS_TIMEOUT)
        keep = partial(_write, reports / "report.json") if rank == 0 else lambda _: None
        run = tried if spec.trials else partial(trained, keep=keep) if spec.plan else probed
        keep(run(spec, device, position, rank, world))
    except Exception as error:  # the border of the process: every failure becomes a report
        traceback.print_exc()
        failure = {"status": status_of(error), "message": describe(error, position)}
        _write(reports / f"failure-{rank}.json", failure)
        position.set(ENDED)
        # No orderly shutdown: the other stages wait for this one in a collective that will never come.
        sys.stderr.flush()
        os._exit(1)
    if dist.is_initialized():
        dist.destroy_process_group()
    position.set(ENDED)
    return 0


def trained(
    spec: RunSpec,
    device: torch.device,
    position: Position,
    rank: int,
    world: int,
    meter: Meter | None = None,
    keep: Callable[[dict], object] = lambda report: None,
) -> dict:
    """Run the plan, from where a checkpoint is; the report of all processes. meter: by default the device's. keep: is
    given the report before anything else is tried that may end the process."""
    workload, plan = Workload.read(spec.workload), Plan.read(spec.plan)
    check(plan, workload, source=spec.plan)
    _require_processes(plan, world, spec.plan)
    drift = canary(device)
    run = build_run(spec, workload, plan, device, position, rank, meter)
    execute = load(read_systems()[spec.system].executor, "executor")
    finished = timed(run, execute, partial(_placed, spec, run, rank, world))
    report = report_of(run) | {"canary": drift, "finished": finished}
    if spec.save_adapters and finished:
        save_adapters(run, Path(spec.save_adapters))
    if spec.cost and finished:
        keep(report)
        report["cost"] = known_cost(run, execute)
    return report


def _placed(spec: RunSpec, run: TrainingRun, rank: int, world: int) -> list[checkpoint.Checkpoints]:
    """Put a run where it is to begin; what its executor takes besides it."""
    torch.manual_seed(spec.seed)  # PEFT's own dropout draws from torch's generator
    arguments = []
    if spec.initial:
        checkpoint.load_initial(run, Path(spec.initial))
    if spec.saving:
        run.record.kept = False
        arguments = [_checkpoints(spec, run, rank, world)]
    run.gradients = Path(spec.save_gradients) if spec.save_gradients else None
    if spec.events:
        run.open_events(Path(spec.events))
    return arguments


def build_run(
    spec: RunSpec,
    workload: Workload,
    plan: Plan,
    device: torch.device,
    position: Position,
    rank: int,
    meter: Meter | None = None,
) -> TrainingRun:
    """The stage of this process with its adapters, and the microbatches of its plan."""
    systems = read_systems()
    one_of("system", spec.system, set(systems), "configs/systems.yaml")
    system, config = systems[spec.system], read_model(spec.model)
    dtype, adapter_dtype = getattr(torch, spec.dtype), getattr(torch, spec.adapter_dtype)
    if system.wide_adapters:
        adapter_dtype = torch.promote_types(adapter_dtype, torch.float32)
    pipeline = Pipeline(rank, plan.stages, plan.data_parallel, device, dtype, config.hidden_size)
    position.place = f"rank {rank} ({pipeline.name})"
    stage = Stage(config, pipeline.index, pipeline.size, spec.checkpointing)
    if workload.merges_qkv:
        merge_qkv(stage)
    if device.type == "cuda" and system.liger and is_installed():
        use_liger(stage)
    active = inject_adapters(stage, workload.jobs, adapter_dtype, load(system.lora, "LoRA kind"), device)
    around = load(system.shard, "shard")(stage, pipeline) if system.shard else None
    fill_weights(stage, config, device=device, dtype=dtype, seed=spec.seed)
    stage.train()
    builder = BatchBuilder(workload, token_source(spec, config.vocab_size), device)
    autocast = dtype if system.wide_adapters and adapter_dtype != dtype else None
    return TrainingRun(workload, plan, stage, active, builder, pipeline, position, autocast, around, meter)


def token_source(spec: RunSpec, vocabulary: int) -> TokenSource:
    """Where the samples' tokens come from."""
    return JobTokens(Path(spec.tokens), vocabulary) if spec.tokens else SyntheticTokens(vocabulary)


def _checkpoints(spec: RunSpec, run: TrainingRun, rank: int, world: int) -> checkpoint.Checkpoints:
    """The run's checkpoints; the run is put where the newest one is."""
    origin = checkpoint.identity(spec, run.plan.content_hash)
    found, reasons = [None], []
    if rank == 0:
        log = Path(spec.events) if spec.events else None
        found[0], reasons = checkpoint.newest(Path(spec.saving.folder), origin, log)
        checkpoint.set_aside(Path(spec.saving.folder), found[0])
        for reason in reasons:
            LOGGER.warning(f"passed over a checkpoint: {reason}")
    store = None
    if dist.is_initialized():
        dist.broadcast_object_list(found, src=0)
        store = dist.distributed_c10d._get_default_store()
    if found[0] is not None:
        checkpoint.load(run, found[0], rank)
    asked = []
    signal.signal(signal.SIGTERM, lambda *_: asked.append(True))
    end_with_parent(signal.SIGKILL)  # to which SIGTERM is a request now
    return checkpoint.Checkpoints(spec.saving, origin, rank, world, store, lambda: bool(asked))


def probed(spec: RunSpec, device: torch.device, position: Position, rank: int, world: int) -> dict:
    """What microbatches take on every stage of the model, for `memory_probe.capacity_of`."""
    if device.type != "cuda":
        raise UserError("capacity: it can be probed on a GPU only; state it")
    usable = torch.cuda.mem_get_info(device)[0]
    workload, plan = memory_probe.probe_workload(Workload.read(spec.workload))
    plan = plan.model_copy(update={"stages": world})
    run = build_run(spec.model_copy(update={"tokens": None}), workload, plan, device, position, rank)
    mine = memory_probe.measure(run, usable, in_flight=run.pipeline.size - run.pipeline.index)
    everyone = [mine]
    if dist.is_initialized():
        everyone = [None] * world
        dist.all_gather_object(everyone, mine)
    return {"stages": [one.to_json() for one in everyone]}


def tried(spec: RunSpec, device: torch.device, position: Position, rank: int, world: int) -> dict:
    """Try the spec's plans, or say where the time goes in one."""
    workload, plan = Workload.read(spec.workload), Plan.read(spec.trials[0].plan)
    _require_processes(plan, world, spec.trials[0].plan)
    run = build_run(spec, workload, plan, device, position, rank)
    execute = load(read_systems()[spec.system].executor, "executor")
    if spec.profile:
        return {"profile": trials.profile(spec, run, execute)}
    trials.try_plans(spec, run, execute, rank)
    return {}


def _require_processes(plan: Plan, world: int, source: str) -> None:
    if plan.stages * plan.data_parallel != world:
        raise UserError(
            f"{source}: made for {plan.stages} stages and {plan.data_parallel} replicas, "
            f"but the run has {world} processes"
        )


def _import_all(system: str) -> None:
    """What a system is made of, if there is such a system. No collection of garbage looks at it from here on: at half a
    million objects, which stay, that held runs of 2 to 10 s on an H200 up for 0.4 to 0.5 s."""
    config = read_systems().get(system)
    if config:
        for path, role in ((config.lora, "LoRA kind"), (config.shard, "shard"), (config.executor, "executor")):
            if path:
                load(path, role)
    gc.freeze()


def _device(spec: RunSpec) -> torch.device:
    if spec.device == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError("device cuda: this machine has no usable NVIDIA GPU; choose a suite for the CPU, such as smoke")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    torch.cuda.set_device(device)
    return device


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


def status_of(error: Exception) -> str:
    """The status of a run that ended with this error."""
    if isinstance(error, FaultyRunError):
        return error.status
    out_of_memory = isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)
    return "oom" if out_of_memory else "crash"


def describe(error: Exception, position: Position) -> str:
    """One line: which process, doing what, and what went wrong."""
    reason = " ".join(str(error).split()) or type(error).__name__
    prefix = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
    return f"{position.place}, {position.doing}: {prefix}{reason[:500]}"


def _write(path: Path, content: dict) -> None:
    write(path, json.dumps(content))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
