"""The LoRA linears of a stage. PEFT injects the adapters and owns their parameters and their file format; a *kind*
decides how linears compute with them. A kind is a function `kind(linears, active)` that installs their forwards.
"""

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial, wraps
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
from peft.tuners.lora import Linear as PeftLinear
from safetensors.torch import save
from torch import nn
from torch.distributed.tensor import DTensor

from fused_lora import AdapterStack, LoRAAdapter, lora_gated_linear, lora_linears, mask_key
from fused_lora.modules import SHARED_INPUTS, SharedInput
from lorafusion.core.files import whole
from lorafusion.core.schema import UserError
from lorafusion.core.workload import Job
from lorafusion.data.packing import PackedBatch
from lorafusion.model.stage import Stage, is_gated_mlp, named_generator


@dataclass
class ActiveBatch:
    """The microbatch whose forward runs now; the linears of a stage read it, the executor sets it.

    stacks: what the adapters' parameters are views of, where the kind stacks them; autograd knows those alone.
    one_adapter: does all that the kind asks the batch on the host depend on the one adapter that it has?
    """

    batch: PackedBatch | None = None
    stacks: list[AdapterStack] = field(default_factory=list)
    one_adapter: bool = False


@dataclass(frozen=True)
class StageLinear:
    """A linear of the model with PEFT's adapters in it, and where it stands."""

    layer: PeftLinear
    name: str
    jobs: Sequence[Job]
    parent: nn.Module

    @property
    def layer_index(self) -> int:
        return int(self.name.split(".")[2])

    @property
    def module(self) -> str:
        """The linear's name within its decoder layer, such as `self_attn.q_proj`."""
        return self.name.split(".", 3)[3]


Kind = Callable[[Sequence[StageLinear], ActiveBatch], None]


def inject_adapters(
    stage: Stage, jobs: Sequence[Job], dtype: torch.dtype, kind: Kind, device: torch.device | None = None
) -> ActiveBatch:
    """Give a stage the adapters of all jobs, ready to train, with the forward of `kind`. device: where the stage will
    be if its weights have no storage yet; by default where it is.

    Initial weights follow PEFT's rule (A Kaiming-uniform, B zero) but each is a pure function of the job's seed and
    the module's name, so that they are the same on any number of stages and whoever else is trained.
    """
    for job in jobs:
        try:
            with warnings.catch_warnings():
                # Several adapters are what is wanted here.
                warnings.filterwarnings("ignore", "Already found a `peft_config` attribute")
                # Without storage, which PEFT would fill on the host: six seconds with four adapters of Llama-3.1-8B.
                inject_adapter_in_model(peft_config(job), stage, adapter_name=job.name, low_cpu_mem_usage=True)
        except ValueError as error:
            raise UserError(f"job {job.name!r}: target_modules {list(job.target_modules)}: {error}") from None
    active = ActiveBatch()
    layers = [(name, layer) for name, layer in stage.named_modules() if isinstance(layer, PeftLinear)]
    linears = [StageLinear(layer, name, jobs, stage.get_submodule(name.rpartition(".")[0])) for name, layer in layers]
    for linear in linears:
        _initialise(linear, dtype, device or next(stage.parameters()).device)
    kind(linears, active)
    stage.draws = not active.stacks  # the masks of adapters that are stacked are stateless
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


def _initialise(linear: StageLinear, dtype: torch.dtype, device: torch.device) -> None:
    for job in linear.jobs:
        if job.name not in linear.layer.lora_A:
            continue
        a, b = linear.layer.lora_A[job.name], linear.layer.lora_B[job.name]
        for module in (a, b):
            module.to_empty(device=device).to(dtype)
            module.weight.requires_grad_(True)
        # In float32 whatever the adapter is in, so that all begin with the same numbers: a generator of 16 bits draws
        # others, and takes the end of the range for its beginning.
        drawn = torch.empty_like(a.weight, dtype=torch.float32)
        generator = named_generator(job.seed, f"{linear.name}.lora_A", device)
        torch.nn.init.kaiming_uniform_(drawn, a=math.sqrt(5), generator=generator)
        with torch.no_grad():
            a.weight.copy_(drawn)
        torch.nn.init.zeros_(b.weight)


def named_adapter_parameters(stage: Stage, job: Job) -> dict[str, torch.nn.Parameter]:
    """The parameters of one job's adapter on this stage, in module order, by their names in PEFT's file format."""
    parameters = {}
    for name, parameter in stage.named_parameters():
        for factor in ("lora_A", "lora_B"):
            if f".{factor}.{job.name}." in name:
                parameters[f"base_model.model.{name.replace(f'.{factor}.{job.name}.', f'.{factor}.')}"] = parameter
    return parameters


def adapter_state(stage: Stage, job: Job) -> dict[str, torch.Tensor]:
    """A copy of one job's adapter on this stage, on the CPU, under the names of PEFT's file format. Replicas over which
    the stage is sharded call it together."""
    state = get_peft_model_state_dict(stage, adapter_name=job.name)
    whole = {name: value.full_tensor() if isinstance(value, DTensor) else value for name, value in state.items()}
    # A view would take the rest of its stack along when it is sent to another process.
    return {f"base_model.model.{name}": value.detach().to("cpu", copy=True) for name, value in whole.items()}


def save_adapter(config: LoraConfig, state: dict[str, torch.Tensor], folder: Path) -> None:
    """Write an adapter to a folder in PEFT's format; state: its tensors under the names of that format."""
    with whole(folder / "adapter_model.safetensors") as partial:
        # A file that is mapped, as `save_file` writes it, ends the process with SIGBUS where a disk is full.
        partial.write_bytes(save(state, metadata={"format": "pt"}))
    config.target_modules = sorted(config.target_modules)  # PEFT's set has another order in each process
    config.save_pretrained(folder)


def fused(linears: Sequence[StageLinear], active: ActiveBatch) -> None:
    """All adapters of the microbatch in one operation, linears that share their input together, and a gated MLP's down
    projection with the gate before it: `fused_lora`'s kernels on a GPU, their reference in PyTorch on a CPU. Dropout
    masks are stateless. The parameters become views of stacks: `fused_lora.AdapterStack` tells what that forbids."""
    siblings: dict[tuple[str, int], list[StageLinear]] = {}
    for linear in linears:
        parent, _, name = linear.name.rpartition(".")
        place = next((index for index, names in enumerate(SHARED_INPUTS) if name in names), None)
        siblings.setdefault((linear.name, -1) if place is None else (parent, place), []).append(linear)
    for group in siblings.values():
        _FusedGroup(group, active)


class _FusedGroup:
    """Linears that share their input, computed together."""

    def __init__(self, linears: list[StageLinear], active: ActiveBatch) -> None:
        self.linears, self.active = linears, active
        self.bases = [linear.layer.get_base_layer() for linear in linears]
        self.stack = AdapterStack([[_adapter(linear, job) for job in linear.jobs] for linear in linears])
        active.stacks.append(self.stack)
        shared = SharedInput(self.compute)
        for index, linear in enumerate(linears):
            linear.layer.forward = partial(shared.output, index)
        first = linears[0]
        if first.module.endswith(".down_proj") and is_gated_mlp(first.parent):
            first.parent.forward = partial(self.gated_mlp, first.parent)

    def compute(self, x: torch.Tensor) -> list[torch.Tensor]:
        weights, biases = [base.weight for base in self.bases], [base.bias for base in self.bases]
        return lora_linears(x, weights, biases, self.stack, self.active.batch.lora, self._training)

    def gated_mlp(self, mlp: nn.Module, x: torch.Tensor) -> torch.Tensor:
        """The forward of the MLP whose down projection this is: silu(gate) * up is not kept for the backward pass."""
        gate, up, [base] = mlp.gate_proj(x), mlp.up_proj(x), self.bases
        return lora_gated_linear(gate, up, base.weight, base.bias, self.stack, self.active.batch.lora, self._training)

    @property
    def _training(self) -> bool:
        return self.linears[0].layer.training


def _adapter(linear: StageLinear, job: Job) -> LoRAAdapter | None:
    """A job's adapter on a linear, None where it has no factors."""
    if job.name not in linear.layer.lora_A:
        return None
    a, b = linear.layer.lora_A[job.name].weight, linear.layer.lora_B[job.name].weight
    return LoRAAdapter(a, b, job.scaling, job.dropout, mask_key(job.seed, linear.layer_index, linear.module))


def each(kind: Callable[[StageLinear, ActiveBatch], None]) -> Kind:
    """A kind from one that sees each linear alone."""

    @wraps(kind)
    def installed(linears: Sequence[StageLinear], active: ActiveBatch) -> None:
        for linear in linears:
            kind(linear, active)

    return installed


@each
def peft(linear: StageLinear, active: ActiveBatch) -> None:
    """PEFT's own forward, with the one adapter of the microbatch active."""
    layer, active.one_adapter = linear.layer, True
    original = layer.forward

    def forward(x: torch.Tensor) -> torch.Tensor:
        adapters = {segment.adapter for segment in active.batch.segments}
        if len(adapters) != 1:
            raise ValueError(f"PEFT's forward takes one adapter a microbatch, found {len(adapters)}")
        # Not layer.set_adapter(): it would freeze the other adapters, whose backward may still be to come.
        layer._active_adapter = [linear.jobs[adapters.pop()].name]
        return original(x)

    layer.forward = forward
