"""The LoRA linears of a stage. PEFT injects the adapters and owns their parameters and their file format; a *kind*
decides how a linear computes with them. A kind is a function `kind(linear, active)` that installs the forward.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
from peft.tuners.lora import Linear as PeftLinear

from fused_lora import LoRAAdapter, lora_linear, mask_key
from lorafusion.data.packing import PackedBatch
from lorafusion.errors import UserError
from lorafusion.models.stage import Stage, named_generator
from lorafusion.workload import Job


@dataclass
class ActiveBatch:
    """The microbatch whose forward runs now; the linears of a stage read it, the executor sets it."""

    batch: PackedBatch | None = None


@dataclass(frozen=True)
class LoRALinear:
    """A linear of the model with PEFT's adapters in it, and where it stands."""

    layer: PeftLinear
    name: str
    jobs: Sequence[Job]

    @property
    def layer_index(self) -> int:
        return int(self.name.split(".")[2])

    @property
    def module(self) -> str:
        """The linear's name within its decoder layer, such as `self_attn.q_proj`."""
        return self.name.split(".", 3)[3]


Kind = Callable[[LoRALinear, ActiveBatch], None]


def inject_adapters(stage: Stage, jobs: Sequence[Job], dtype: torch.dtype, kind: Kind) -> ActiveBatch:
    """Give a stage the adapters of all jobs, ready to train, with the forward of `kind`.

    Initial weights follow PEFT's rule (A Kaiming-uniform, B zero) but each is a pure function of the job's seed and
    the module's name, so that they are the same on any number of stages and whoever else is trained.
    """
    for job in jobs:
        try:
            inject_adapter_in_model(peft_config(job), stage, adapter_name=job.name)
        except ValueError as error:
            raise UserError(f"job {job.name!r}: target_modules {list(job.target_modules)}: {error}") from None
    active = ActiveBatch()
    for name, layer in stage.named_modules():
        if isinstance(layer, PeftLinear):
            linear = LoRALinear(layer, name, jobs)
            _initialise(linear, dtype)
            kind(linear, active)
    return active


def peft_config(job: Job) -> LoraConfig:
    """The job's adapter as PEFT describes it."""
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=job.rank,
        lora_alpha=job.alpha,
        lora_dropout=job.dropout,
        use_rslora=job.rslora,
        target_modules=list(job.target_modules),
    )


def _initialise(linear: LoRALinear, dtype: torch.dtype) -> None:
    for job in linear.jobs:
        if job.name not in linear.layer.lora_A:
            continue
        a, b = linear.layer.lora_A[job.name], linear.layer.lora_B[job.name]
        for module in (a, b):
            module.to(dtype)
            module.weight.requires_grad_(True)
        generator = named_generator(job.seed, f"{linear.name}.lora_A", a.weight.device)
        torch.nn.init.kaiming_uniform_(a.weight, a=math.sqrt(5), generator=generator)
        torch.nn.init.zeros_(b.weight)


def adapter_parameters(stage: Stage, job: Job) -> list[torch.nn.Parameter]:
    """The parameters of one job's adapter on this stage, in module order."""
    marks = (f".lora_A.{job.name}.", f".lora_B.{job.name}.")
    return [parameter for name, parameter in stage.named_parameters() if any(mark in name for mark in marks)]


def adapter_state(stage: Stage, job: Job) -> dict[str, torch.Tensor]:
    """One job's adapter on this stage, on the CPU, under the names of PEFT's file format."""
    state = get_peft_model_state_dict(stage, adapter_name=job.name)
    return {f"base_model.model.{name}": value.detach().cpu() for name, value in state.items()}


def reference(linear: LoRALinear, active: ActiveBatch) -> None:
    """All adapters of the microbatch in one operation, `fused_lora`'s reference in PyTorch, with stateless masks."""
    layer = linear.layer
    base = layer.get_base_layer()
    keys = [mask_key(job.seed, linear.layer_index, linear.module) for job in linear.jobs]

    def forward(x: torch.Tensor) -> torch.Tensor:
        batch = active.batch
        present = [segment for segment in batch.segments if linear.jobs[segment.adapter].name in layer.lora_A]
        adapters, segments = [], []
        for segment in present:
            job = linear.jobs[segment.adapter]
            adapters.append(
                LoRAAdapter(
                    a=layer.lora_A[job.name].weight,
                    b=layer.lora_B[job.name].weight,
                    scaling=job.scaling,
                    dropout=job.dropout,
                    key=keys[segment.adapter],
                )
            )
            segments.append(segment.renumbered(len(adapters) - 1))
        y = lora_linear(x.flatten(0, -2), base.weight, base.bias, adapters, segments, batch.positions, layer.training)
        return y.view(*x.shape[:-1], -1)

    layer.forward = forward


def looped(linear: LoRALinear, active: ActiveBatch) -> None:
    """The base linear once over all tokens, then PEFT's operations adapter by adapter: mLoRA's BatchLoRA."""
    layer = linear.layer

    def forward(x: torch.Tensor) -> torch.Tensor:
        y = layer.get_base_layer()(x)
        deltas = []
        for segment in active.batch.segments:
            name = linear.jobs[segment.adapter].name
            if name not in layer.lora_A:
                deltas.append(y.new_zeros(1, segment.stop - segment.start, y.shape[-1]))
                continue
            part = layer.lora_dropout[name](x[:, segment.start : segment.stop].to(layer.lora_A[name].weight.dtype))
            deltas.append(layer.lora_B[name](layer.lora_A[name](part)) * layer.scaling[name])
        return (y + torch.cat(deltas, dim=1)).to(y.dtype)

    layer.forward = forward


def peft(linear: LoRALinear, active: ActiveBatch) -> None:
    """PEFT's own forward, with the one adapter of the microbatch active."""
    layer = linear.layer
    original = layer.forward

    def forward(x: torch.Tensor) -> torch.Tensor:
        adapters = {segment.adapter for segment in active.batch.segments}
        if len(adapters) != 1:
            raise ValueError(f"PEFT's forward takes one adapter a microbatch, found {len(adapters)}")
        # Not layer.set_adapter(): it would freeze the other adapters, whose backward may still be to come.
        layer._active_adapter = [linear.jobs[adapters.pop()].name]
        return original(x)

    layer.forward = forward
