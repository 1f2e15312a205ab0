"""From a run's spec and plan to a `TrainingRun`: the stage of this process, its adapters, and the plan's tokens."""

import torch

from lorafusion.core.config import read_model, read_system
from lorafusion.core.plan import Plan
from lorafusion.core.plugins import load
from lorafusion.core.workload import Workload
from lorafusion.data.packing import BatchBuilder
from lorafusion.data.store import token_source
from lorafusion.engine.executor import Executor
from lorafusion.engine.pipeline import Pipeline
from lorafusion.engine.process import WorkerProcess
from lorafusion.engine.training import TrainingRun
from lorafusion.model.attention import chosen_backend
from lorafusion.model.liger import is_installed, use_liger
from lorafusion.model.lora import inject_adapters
from lorafusion.model.merged import merge_qkv
from lorafusion.model.stage import Stage, fill_weights


def build_run(process: WorkerProcess, workload: Workload, plan: Plan) -> TrainingRun:
    """The stage of this process with its adapters, and the microbatches of its plan."""
    spec, device = process.spec, process.device
    system, config = read_system(spec.system), read_model(spec.model)
    dtype, adapter_dtype = getattr(torch, spec.dtype), getattr(torch, spec.adapter_dtype)
    if system.wide_adapters:
        adapter_dtype = torch.promote_types(adapter_dtype, torch.float32)
    pipeline = Pipeline(process.rank, plan.stages, plan.data_parallel, device, dtype, config.hidden_size)
    process.position.place = f"rank {process.rank} ({pipeline.name})"
    stage = Stage(config, pipeline.index, pipeline.size, spec.checkpointing)
    stage.attention = chosen_backend(spec.attention, device, dtype, stage.heads)
    if workload.merges_qkv:
        merge_qkv(stage)
    if device.type == "cuda" and system.liger and is_installed():
        use_liger(stage)
    active = inject_adapters(stage, workload.jobs, adapter_dtype, load(system.lora, "LoRA kind"), device)
    around = load(system.shard, "shard")(stage, pipeline) if system.shard else None
    fill_weights(stage, config, device=device, dtype=dtype, seed=spec.seed)
    stage.train()
    builder = BatchBuilder(workload, token_source(spec.tokens, config.vocab_size), device)
    autocast = dtype if system.wide_adapters and adapter_dtype != dtype else None
    return TrainingRun(
        workload,
        plan,
        stage,
        active,
        builder,
        pipeline,
        process.position,
        autocast,
        around,
        process.meter,
        needs_graphs=spec.needs_graphs,
    )


def executor_of(system: str) -> Executor:
    """The executor of a system of configs/systems.yaml."""
    return load(read_system(system).executor, "executor")


def import_system(name: str) -> None:
    """Import all that a system is made of."""
    system = read_system(name)
    for path, role in ((system.lora, "LoRA kind"), (system.shard, "shard"), (system.executor, "executor")):
        if path:
            load(path, role)
