"""The implementations of a LoRA linear and of a decoder layer, ready to run on random data.

All share weights, adapters' sizes and inputs; B is random too, not zero as at the start of a training, because a GPU
multiplies zeros faster than numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from fused_lora import AdapterStack, LoRABatch, LoRALinear, LoRASegment, LoRASettings
from lorafusion.core.config import read_model
from lorafusion.core.workload import ALL_LINEAR, Job, Sample
from lorafusion.data.packing import AdapterSegment, PackedBatch, SampleBorders
from lorafusion.lab.experiments.kernel_suite import KernelBench, KernelCase
from lorafusion.model import lora
from lorafusion.model.liger import use_liger
from lorafusion.model.stage import Stage, build_stage


@dataclass(frozen=True)
class Subject:
    """What is run: `forward` gives y, `both` gives the gradients of the input and of the adapters too.

    leaves: the input, and the adapters' factors. weights: everything else that exists before the forward pass.
    """

    forward: Callable[[], Tensor]
    leaves: Sequence[Tensor]
    weights: Sequence[Tensor]
    dy: Tensor

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
        return (self._linear if self.bench.shape else self._layer)(case)

    def _linear(self, case: KernelCase) -> Subject:
        inputs, outputs = self.bench.shape
        x = self._once(("x", case.tokens), lambda: self._input(case.tokens, inputs)[0].detach().requires_grad_())
        dy = self._once(("dy", case.tokens), lambda: self.setting.random(case.tokens, outputs, stream=1))
        module = self._once((case.implementation, case.adapters), lambda: self._linear_module(case))
        call = module
        if isinstance(module, LoRALinear):
            batch = LoRABatch.of(_shares(case), torch.arange(case.tokens, device=x.device))
            call = partial(module, batch=batch)
        return _subject(call, module, x, dy, _context(case, x.device))

    def _linear_module(self, case: KernelCase) -> nn.Module:
        inputs, outputs = self.bench.shape
        weight = self._once("weight", lambda: self.setting.random(outputs, inputs, scale=inputs**-0.5, stream=2))
        base = nn.Linear(inputs, outputs, bias=False, device="meta")
        base.weight = nn.Parameter(weight, requires_grad=False)
        if case.implementation == "frozen":
            return base
        if case.implementation.startswith("fused"):
            settings = [LoRASettings(self.bench.rank, self.bench.rank, self.bench.dropout, seed=i)
                        for i in range(case.adapters)]  # fmt: skip
            module = LoRALinear(base, settings)
        else:
            config = LoraConfig(r=self.bench.rank, lora_alpha=self.bench.rank, lora_dropout=self.bench.dropout,
                                target_modules=["proj"])  # fmt: skip
            holder = inject_adapter_in_model(config, nn.ModuleDict({"proj": base}), "default")
            module = holder["proj"].to(self.setting.device, _adapter_dtype(case, self.setting))
            module.get_base_layer().to(self.setting.dtype)
        self._randomise(module)
        return torch.compile(module, dynamic=False) if case.implementation == "peft-compiled" else module

    def _layer(self, case: KernelCase) -> Subject:
        borders, position_ids = self._once(("samples", case.tokens), lambda: self._samples(case.tokens))
        hidden = read_model(self.bench.model).hidden_size
        x = self._once(("x", case.tokens), lambda: self._input(case.tokens, hidden).requires_grad_())
        dy = self._once(("dy", case.tokens), lambda: self.setting.random(1, case.tokens, hidden, stream=1))
        stage, active = self._once((case.implementation, case.adapters), lambda: self._stage(case))
        if active is not None:
            active.batch = _packed(case, borders, position_ids)
        batch = None if active is None else active.batch

        def call(x: Tensor) -> Tensor:
            if active is not None:
                active.batch = batch
            return stage(x, position_ids, borders)

        stacks = active.stacks if active is not None else ()
        return _subject(call, stage, x, dy, _context(case, x.device), stacks)

    def _stage(self, case: KernelCase) -> tuple[Stage, lora.ActiveBatch | None]:
        config = read_model(self.bench.model)
        setting = self.setting
        stage = build_stage(
            config, index=1, count=config.num_hidden_layers, device=setting.device, dtype=setting.dtype,
            seed=setting.seed,
        )  # fmt: skip
        if self.bench.block.liger:
            use_liger(stage)
        if case.implementation == "frozen":
            return stage, None
        jobs = [
            Job(name=f"job-{i}", dataset="none", rank=self.bench.rank, alpha=2 * self.bench.rank, epochs=1,
                dropout=self.bench.dropout, target_modules=ALL_LINEAR, learning_rate=1e-4, seed=i, global_batch_size=1,
                samples=(Sample(0, 2),))
            for i in range(case.adapters)
        ]  # fmt: skip
        kind = lora.fused if case.implementation.startswith("fused") else lora.peft
        active = lora.inject_adapters(stage, jobs, _adapter_dtype(case, setting), kind)
        self._randomise(stage)
        return stage, active

    def _samples(self, tokens: int) -> tuple[SampleBorders, Tensor]:
        length = min(self.bench.block.sample_tokens, tokens)
        lengths = [min(length, tokens - first) for first in range(0, tokens, length)]
        places = torch.arange(tokens) % length
        return SampleBorders.of(lengths, self.setting.device), places[None].to(self.setting.device)

    def _input(self, tokens: int, columns: int) -> Tensor:
        return self.setting.random(1, tokens, columns)

    def _randomise(self, module: nn.Module) -> None:
        """Give every adapter's factors values of a trained one's size."""
        for index, parameter in enumerate(factor for factor in module.parameters() if factor.requires_grad):
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


def _adapter_dtype(case: KernelCase, setting: Setting) -> torch.dtype:
    """PEFT as shipped turns adapters into float32; the others keep them in the model's dtype."""
    return torch.float32 if case.implementation == "peft" else setting.dtype


def _context(case: KernelCase, device: torch.device) -> Callable[[], AbstractContextManager]:
    """PEFT as shipped runs under autocast, as it is trained; without its cache, which a CUDA graph cannot hold."""
    if case.implementation == "peft" and device.type == "cuda":
        return partial(torch.autocast, "cuda", dtype=torch.bfloat16, cache_enabled=False)
    return nullcontext


def _subject(
    call: Callable, module: nn.Module, x: Tensor, dy: Tensor, context: Callable, stacks: Sequence[AdapterStack] = ()
) -> Subject:
    """stacks: what the factors are views of, where they are."""

    def forward() -> Tensor:
        with context():
            return call(x)

    factors = [leaf for stack in stacks for leaf in (stack.a, stack.b)]
    factors = factors or [factor for factor in module.parameters() if factor.requires_grad]
    weights = [*(weight for weight in module.parameters() if not weight.requires_grad), *module.buffers()]
    return Subject(forward, [x, *factors], weights, dy)


def _shares(case: KernelCase) -> list[LoRASegment]:
    """Equal shares of the tokens for each adapter."""
    borders = [case.tokens * i // case.adapters for i in range(case.adapters + 1)]
    return [LoRASegment(*span, i) for i, span in enumerate(zip(borders[:-1], borders[1:], strict=True))]


def _packed(case: KernelCase, borders: SampleBorders, position_ids: Tensor) -> PackedBatch:
    """A microbatch as an executor makes it, of which a layer reads whose tokens are where."""
    none = position_ids.new_empty(0)
    segments = tuple(AdapterSegment(share.start, share.stop, share.adapter, 0) for share in _shares(case))
    positions = torch.arange(case.tokens, device=position_ids.device)
    return PackedBatch(none, position_ids, none, none.float(), positions, borders, segments)
