"""The implementations of adapters, and a LoRA linear and a decoder layer in each of them, ready to run on random data.

All share weights, adapters' sizes and inputs; B is random too, not zero as at the start of a training, because a GPU
multiplies zeros faster than numbers.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from fused_lora import AdapterStack, LoRABatch, LoRALinear, LoRASegment, LoRASettings
from lorafusion.core.config import read_model
from lorafusion.core.plugins import load
from lorafusion.core.workload import Job, Sample
from lorafusion.data.packing import AdapterSegment, PackedBatch, SampleBorders
from lorafusion.lab.experiments.bench import equal_jobs
from lorafusion.lab.experiments.kernel_suite import KernelBench, KernelCase
from lorafusion.model import lora
from lorafusion.model.liger import use_liger
from lorafusion.model.stage import Stage, build_stage


class Implementation(NamedTuple):
    """How a stage computes with adapters. kind: None where it has none. wide: adapters are in float32, and the model
    runs under autocast."""

    kind: lora.Kind | None
    wide: bool = False

    def inject(self, stage: Stage, jobs: Sequence[Job], dtype: torch.dtype) -> lora.ActiveBatch:
        """Give a stage of a dtype the adapters of all jobs, or none."""
        if self.kind is None:
            return lora.ActiveBatch()
        return lora.inject_adapters(stage, jobs, self.adapter_dtype(dtype), self.kind)

    def adapter_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return torch.float32 if self.wide else dtype

    def autocasts_on(self, device: torch.device) -> bool:
        return self.wide and device.type == "cuda"


def looped(linears: Sequence[lora.StageLinear], active: lora.ActiveBatch) -> None:
    """mLoRA's kind, of the baselines, which are imported by those alone who measure them."""
    load("baselines.mlora.lora:looped", "LoRA kind")(linears, active)


IMPLEMENTATIONS = {
    "frozen": Implementation(None),
    "peft": Implementation(lora.peft, wide=True),  # as shipped
    "peft-bf16": Implementation(lora.peft),
    "peft-compiled": Implementation(lora.peft),
    "peft-multi": Implementation(lora.peft),  # the tokens of one adapter after those of the other
    "fused": Implementation(lora.fused),
    "fused-multi": Implementation(lora.fused),
    "looped": Implementation(looped),
}


@dataclass(frozen=True)
class Subject:
    """What is run: `forward` gives y, `both` gives the gradients of the input and of the adapters too.

    leaves: the input, and the adapters' factors. weights: everything else that exists before the forward pass.
    """

    forward: Callable[[], Tensor | Sequence[Tensor]]
    leaves: Sequence[Tensor]
    weights: Sequence[Tensor]
    dy: Tensor | Sequence[Tensor]

    def both(self) -> tuple[Tensor, ...]:
        return torch.autograd.grad(self.forward(), self.leaves, self.dy)


@dataclass(frozen=True)
class Setting:
    """Where and with which numbers everything is built."""

    device: torch.device
    dtype: torch.dtype
    seed: int

    def random(self, *shape: int, scale: float = 1.0, stream: int = 0) -> Tensor:
        """Normal numbers; tensors of different streams are independent."""
        generator = torch.Generator(self.device).manual_seed(1000 * (self.seed + 1) + stream)
        return torch.randn(shape, device=self.device, dtype=self.dtype, generator=generator) * scale


class Builder:
    """Builds the subjects of one bench; what they have in common, only once."""

    def __init__(self, bench: KernelBench, setting: Setting) -> None:
        self.bench, self.setting = bench, setting
        self.kept: dict = {}

    def build(self, case: KernelCase) -> Subject:
        setting, tokens = self.setting, case.tokens
        inputs, outputs = self.bench.shape or (read_model(self.bench.model).hidden_size,) * 2
        rows, made_of = ((tokens,), self._linear) if self.bench.shape else ((1, tokens), self._layer)
        x = self._once(("x", tokens), lambda: setting.random(*rows, inputs).requires_grad_())
        dy = self._once(("dy", tokens), lambda: setting.random(*rows, outputs, stream=1))
        if case.implementation == "peft-multi":
            return self._in_turns(case, x, dy)
        call, module, stacks = made_of(case)
        autocasts = IMPLEMENTATIONS[case.implementation].autocasts_on(setting.device)

        def forward() -> Tensor:
            # Without autocast's cache, which a CUDA graph cannot hold.
            with torch.autocast("cuda", torch.bfloat16, cache_enabled=False) if autocasts else nullcontext():
                return call(x)

        # What factors are views of, where they are: autograd knows those alone.
        factors = [factor for stack in stacks for factor in (stack.a, stack.b)] or _trainable(module)
        weights = [weight for weight in module.parameters() if not weight.requires_grad]
        return Subject(forward, [x, *factors], [*weights, *module.buffers()], dy)

    def _in_turns(self, case: KernelCase, x: Tensor, dy: Tensor) -> Subject:
        """PEFT's linears of all adapters, each with its own tokens: no tensor is split or joined in a pass."""
        key = (case.implementation, case.adapters)
        modules = self._once(key, lambda: nn.ModuleList(self._linear_module(case) for _ in range(case.adapters)))
        spans = [slice(share.start, share.stop) for share in _shares(case)]
        parts = [x.detach()[span].requires_grad_() for span in spans]
        weights = [weight for weight in modules.parameters() if not weight.requires_grad]

        def forward() -> list[Tensor]:
            return [module(part) for module, part in zip(modules, parts, strict=True)]

        return Subject(forward, [*parts, *_trainable(modules)], [*weights, x], [dy[span] for span in spans])

    def _linear(self, case: KernelCase) -> tuple[Callable, nn.Module, Sequence[AdapterStack]]:
        module = self._once((case.implementation, case.adapters), lambda: self._linear_module(case))
        call = module
        if isinstance(module, LoRALinear):
            call = partial(module, batch=LoRABatch.of(_shares(case), self._places(case.tokens)))
        return call, module, ()

    def _linear_module(self, case: KernelCase) -> nn.Module:
        bench, setting, (inputs, outputs) = self.bench, self.setting, self.bench.shape
        weight = self._once("weight", lambda: setting.random(outputs, inputs, scale=inputs**-0.5, stream=2))
        base = nn.Linear(inputs, outputs, bias=False, device="meta")
        base.weight = nn.Parameter(weight, requires_grad=False)
        implementation = IMPLEMENTATIONS[case.implementation]
        if implementation.kind is None:
            return base
        if implementation.kind is lora.fused:
            module = LoRALinear(base, [LoRASettings(bench.rank, bench.rank, bench.dropout, seed=i)
                                       for i in range(case.adapters)])  # fmt: skip
        else:
            config = LoraConfig(r=bench.rank, lora_alpha=bench.rank, lora_dropout=bench.dropout,
                                target_modules=["proj"])  # fmt: skip
            holder = inject_adapter_in_model(config, nn.ModuleDict({"proj": base}), "default")
            module = holder["proj"].to(setting.device, implementation.adapter_dtype(setting.dtype))
            module.get_base_layer().to(setting.dtype)
        self._randomise(module)
        return torch.compile(module, dynamic=False) if case.implementation == "peft-compiled" else module

    def _layer(self, case: KernelCase) -> tuple[Callable, nn.Module, Sequence[AdapterStack]]:
        borders, position_ids = self._once(("samples", case.tokens), lambda: self._samples(case.tokens))
        stage, active = self._once((case.implementation, case.adapters), lambda: self._stage(case))
        # A microbatch as an executor makes it, of which a layer reads whose tokens are where.
        none = position_ids.new_empty(0)
        segments = tuple(AdapterSegment(share.start, share.stop, share.adapter, 0) for share in _shares(case))
        owners = LoRABatch.of(segments, self._places(case.tokens))
        batch = PackedBatch(none, position_ids, none, none.float(), borders, owners, segments)

        def call(x: Tensor) -> Tensor:
            active.batch = batch
            return stage(x, position_ids, borders)

        return call, stage, active.stacks

    def _stage(self, case: KernelCase) -> tuple[Stage, lora.ActiveBatch]:
        bench, setting, config = self.bench, self.setting, read_model(self.bench.model)
        stage = build_stage(config, index=1, count=config.num_hidden_layers, device=setting.device,
                            dtype=setting.dtype, seed=setting.seed)  # fmt: skip
        if bench.block.liger:
            use_liger(stage)
        jobs = equal_jobs(case.adapters, samples=(Sample(0, 2),), global_batch_size=1, rank=bench.rank,
                          alpha=2 * bench.rank, dropout=bench.dropout)  # fmt: skip
        active = IMPLEMENTATIONS[case.implementation].inject(stage, jobs, setting.dtype)
        self._randomise(stage)
        return stage, active

    def _samples(self, tokens: int) -> tuple[SampleBorders, Tensor]:
        length = min(self.bench.block.sample_tokens, tokens)
        lengths = [min(length, tokens - first) for first in range(0, tokens, length)]
        return SampleBorders.of(lengths, self.setting.device), self._places(tokens)[None] % length

    def _places(self, tokens: int) -> Tensor:
        return torch.arange(tokens, device=self.setting.device)

    def _randomise(self, module: nn.Module) -> None:
        """Give every adapter's factors values of a trained one's size."""
        for index, parameter in enumerate(_trainable(module)):
            generator = torch.Generator(parameter.device).manual_seed(self.setting.seed + index)
            with torch.no_grad():
                parameter.normal_(0.0, parameter.shape[1] ** -0.5, generator=generator)

    def _once(self, key, make: Callable):
        if key not in self.kept:
            self.kept[key] = make()
        return self.kept[key]

    def forget(self, tokens: int) -> None:
        """Free what belongs to a number of tokens."""
        for name in ("x", "dy", "samples"):
            self.kept.pop((name, tokens), None)


def _trainable(module: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def _shares(case: KernelCase) -> list[LoRASegment]:
    """Equal shares of the tokens for each adapter."""
    borders = [case.tokens * i // case.adapters for i in range(case.adapters + 1)] if case.adapters else []
    return [LoRASegment(*span, i) for i, span in enumerate(zip(borders, borders[1:], strict=False))]
