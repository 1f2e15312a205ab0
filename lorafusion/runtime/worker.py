"""One process of a run: a pipeline stage, from start-up to its report. Started by `lorafusion.runtime.launch`.

Usage: python -m lorafusion.runtime.worker SPEC.json REPORT_DIRECTORY, alone or under torchrun. Each process ends with
a report in the directory: rank 0 the run's measurements (report.json), a process that failed its cause
(failure-RANK.json).
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from lorafusion.config import read_model, read_systems
from lorafusion.data.packing import BatchBuilder
from lorafusion.data.tokens import SyntheticTokens
from lorafusion.errors import UserError, one_of, validated
from lorafusion.imports import load
from lorafusion.measure.timers import canary, peak_memory, reset_peak_memory
from lorafusion.models.lora import adapter_state, inject_adapters, peft_config
from lorafusion.models.stage import build_stage
from lorafusion.plan import Plan, check
from lorafusion.runtime.launch import end_with_parent
from lorafusion.runtime.pipeline import Pipeline
from lorafusion.runtime.spec import RunSpec
from lorafusion.runtime.training import TrainingRun
from lorafusion.workload import Workload

RENDEZVOUS_TIMEOUT = timedelta(minutes=10)


def main(spec_path: str, report_directory: str) -> int:
    end_with_parent()
    rank = int(os.environ.get("RANK", 0))
    reports = Path(report_directory)
    run: TrainingRun | None = None
    try:
        spec = validated(RunSpec, json.loads(Path(spec_path).read_text()), spec_path)
        device = _device(spec)
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=RENDEZVOUS_TIMEOUT)
        drift = canary(device)
        run = build_run(spec, device)
        run.warm_up()
        reset_peak_memory(device)
        if dist.is_initialized():
            dist.barrier()
        load(read_systems()[spec.system].executor, "executor")(run)
        run.record.position = "the end of the run"
        run.record.clock.synchronize()
        report = collect(run, drift)
        if spec.save_adapters:
            save_adapters(run, Path(spec.save_adapters))
        if rank == 0:
            _write(reports / "report.json", report)
    except Exception as error:  # the border of the process: every failure becomes a report
        traceback.print_exc()
        where = run.record.position if run else "start-up"
        _write(reports / f"failure-{rank}.json", {"status": status_of(error), "message": describe(error, where)})
        # No orderly shutdown: the other stages wait for this one in a collective that will never come.
        sys.stderr.flush()
        os._exit(1)
    if dist.is_initialized():
        dist.destroy_process_group()
    return 0


def build_run(spec: RunSpec, device: torch.device) -> TrainingRun:
    """The stage of this process with its adapters, and the microbatches of its plan."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    systems = read_systems()
    one_of("system", spec.system, set(systems), "configs/systems.yaml")
    workload, plan = Workload.read(spec.workload), Plan.read(spec.plan)
    check(plan, workload, source=spec.plan)
    if plan.stages * plan.data_parallel != world:
        raise UserError(
            f"{spec.plan}: made for {plan.stages} stages and {plan.data_parallel} replicas, "
            f"but the run has {world} processes"
        )
    if plan.data_parallel > 1:
        raise UserError(f"{spec.plan}: {plan.data_parallel} data-parallel replicas, the executors run one")
    config = read_model(spec.model)
    dtype, adapter_dtype = getattr(torch, spec.dtype), getattr(torch, spec.adapter_dtype)
    stage = build_stage(
        config,
        index=rank,
        count=world,
        device=device,
        dtype=dtype,
        seed=spec.seed,
        checkpointing=spec.checkpointing,
    )
    active = inject_adapters(stage, workload.jobs, adapter_dtype, load(systems[spec.system].lora, "LoRA kind"))
    pipeline = Pipeline(rank, world, device, dtype, config.hidden_size)
    builder = BatchBuilder(workload, SyntheticTokens(config.vocab_size), device)
    torch.manual_seed(spec.seed)  # PEFT's own dropout draws from torch's generator
    return TrainingRun(workload, plan, stage, active, builder, pipeline)


def _device(spec: RunSpec) -> torch.device:
    if spec.device == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError("device cuda: this machine has no usable NVIDIA GPU; choose a suite for the CPU, such as smoke")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    torch.cuda.set_device(device)
    return device


def collect(run: TrainingRun, drift: dict[str, float]) -> dict:
    """The report of the whole pipeline on rank 0: timings of stage 0, losses of the last stage, memory of all."""
    losses = [(adapter, batch, float(value)) for adapter, batch, value in run.record.losses]
    mine = {"losses": losses, "peak_memory": peak_memory(run.pipeline.device)}
    everyone = [mine]
    if dist.is_initialized():
        everyone = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, mine)
    record = run.record
    return {
        "seconds": [[index, record.clock.seconds(record.begin, mark)] for index, mark in record.done],
        "losses": losses_by_job(run.workload, [loss for part in everyone for loss in part["losses"]]),
        "peak_memory": max(part["peak_memory"] for part in everyone),
        "canary": drift,
    }


def losses_by_job(workload: Workload, shares: list[tuple[int, int, float]]) -> dict[str, list[float]]:
    """For each job the loss of each of its global batches: the sum of the shares in its microbatches."""
    sums = [[0.0] * len(job.batches) for job in workload.jobs]
    for adapter, batch, share in shares:
        sums[adapter][batch] += share
    return {job.name: values for job, values in zip(workload.jobs, sums, strict=True)}


def save_adapters(run: TrainingRun, directory: Path) -> None:
    """Write each adapter in PEFT's format, gathered from all stages, to a folder of its name."""
    from safetensors.torch import save_file

    for job in run.workload.jobs:
        parts = [adapter_state(run.stage, job)]
        if dist.is_initialized():
            gathered = [None] * dist.get_world_size() if run.pipeline.is_first else None
            dist.gather_object(parts[0], gathered, dst=0)
            parts = gathered
        if run.pipeline.is_first:
            folder = directory / job.name
            folder.mkdir(parents=True, exist_ok=True)
            state = {name: value.contiguous() for part in parts for name, value in part.items()}
            save_file(state, folder / "adapter_model.safetensors", metadata={"format": "pt"})
            peft_config(job).save_pretrained(folder)


def status_of(error: Exception) -> str:
    """The status of a run that ended with this error."""
    out_of_memory = isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)
    return "oom" if out_of_memory else "crash"


def describe(error: Exception, where: str) -> str:
    """One line: which rank, where, what."""
    reason = " ".join(str(error).split()) or type(error).__name__
    prefix = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
    return f"rank {os.environ.get('RANK', 0)}, {where}: {prefix}{reason[:500]}"


def _write(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
