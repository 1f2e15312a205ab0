"""LoRA linears as modules, and linears that share their input.

`LoRALinear` is for models without PEFT; `fused_lora.patch` is for models with it.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fused_lora.adapters import AdapterTables, LoRAAdapter, LoRABatch
from fused_lora.linear import lora_linears
from fused_lora.philox import mask_key

# Names of linears of one module that are called with the same input, in transformers' Llama, Qwen2 and most others.
SHARED_INPUTS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


@dataclass(frozen=True)
class LoRASettings:
    """An adapter's hyper-parameters: the scaling is alpha / rank, or alpha / sqrt(rank) for rsLoRA."""

    rank: int
    alpha: float
    dropout: float = 0.0
    rslora: bool = False
    seed: int = 0

    @property
    def scaling(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


class LoRALinear(nn.Module):
    """A frozen linear with one or several adapters: y = x w^T + bias + c_i dropout_i(x) a_i^T b_i^T.

    base: its weight and bias are frozen. settings: of each adapter. name: tells the masks of a model's linears apart.
    The factors `lora_a[i]` [r, K] and `lora_b[i]` [N, r] begin as PEFT's do, a Kaiming-uniform and b zero, each a
    function of its seed and the name, in the base's dtype.
    """

    def __init__(self, base: nn.Linear, settings: Sequence[LoRASettings], name: str = "linear") -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.settings = tuple(settings)
        self.keys = [mask_key(settings.seed, 0, name) for settings in self.settings]
        rows, columns = base.weight.shape
        self.lora_a, self.lora_b = nn.ParameterList(), nn.ParameterList()
        for adapter, key in zip(self.settings, self.keys, strict=True):
            a = torch.empty(adapter.rank, columns)
            nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=torch.Generator().manual_seed(key >> 1))
            self.lora_a.append(nn.Parameter(a.to(base.weight)))
            self.lora_b.append(nn.Parameter(base.weight.new_zeros(rows, adapter.rank)))
        self._tables = AdapterTables()

    def forward(self, x: Tensor, batch: LoRABatch | None = None) -> Tensor:
        """y [..., N] of x [..., K]. batch: whose tokens they are; without it all are the first adapter's, with new
        masks at each call, drawn from torch's random numbers (`whole_batch`). Autocast acts as on nn.Linear."""
        # Attributes of a module are slow, and so is to look each factor up by the text of its number.
        modules: Any = self._modules
        factors = (modules["lora_a"]._parameters.values(), modules["lora_b"]._parameters.values())
        base = modules["base"]
        adapters = [
            LoRAAdapter(a, b, settings.scaling, settings.dropout, key)
            for a, b, settings, key in zip(*factors, self.settings, self.keys, strict=True)
        ]
        x, weights, biases = autocasted(x, [base.weight], [base.bias])
        batch, table = batch or whole_batch(x), self._tables.of([adapters], x)
        return lora_linears(x, weights, biases, [adapters], batch, self.training, table)[0]


def autocasted(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]
) -> tuple[Tensor, list[Tensor], list[Tensor | None]]:
    """The operands of linears as autocast gives them to F.linear, all but float64 in its dtype; as they are without."""
    if not torch.is_autocast_enabled(x.device.type):
        return x, list(weights), list(biases)
    dtype = torch.get_autocast_dtype(x.device.type)

    def cast(operand: Tensor) -> Tensor:
        return operand if operand.dtype == torch.float64 else operand.to(dtype)

    return cast(x), [cast(weight) for weight in weights], [None if bias is None else cast(bias) for bias in biases]


def whole_batch(x: Tensor) -> LoRABatch:
    """All tokens of x [..., K] for adapter 0, at positions that follow a random one.

    It comes from the device's random numbers, so that masks are new at each call and at each replay of a CUDA graph,
    obey torch.manual_seed, and are the same when activation checkpointing computes a layer again.
    """
    # Filled by the device and kept by nobody: a CUDA graph that is captured owns them, and none is ever a fake one.
    # [0, tokens], by one kernel; the first of them is also the adapter.
    tokens = x.numel() // x.shape[-1]
    offsets = torch.arange(0, 2 * tokens or 2, tokens or 1, dtype=torch.int32, device=x.device)
    if not tokens:
        offsets.zero_()
    return LoRABatch(offsets, offsets[:1], torch.randint(1 << 62, (1,), device=x.device))


class SharedInput:
    """Linears that are called one after another with the same input, computed together when the first is called.

    compute: from x to the outputs of all of them. What a sibling's call has not fetched is kept until then, or until a
    call with another input, an input that was written to since, other settings, or under other gradient or autocast
    modes; a copy is without it. Factors must not be written to between the calls of siblings. The backward pass is one
    for all, too: factors of a sibling whose output the loss does not use get zeros as their gradient, not None.
    """

    def __init__(self, compute: Callable[[Tensor], list[Tensor]]) -> None:
        self.__setstate__(compute)

    def __getstate__(self) -> Callable[[Tensor], list[Tensor]]:
        return self._compute  # outputs belong to a graph, of which there are no copies

    def __setstate__(self, compute: Callable[[Tensor], list[Tensor]]) -> None:
        self._compute = compute
        self._input: Tensor | None = None
        self._state: tuple = ()
        self._outputs: list[Tensor | None] = []

    def output(self, index: int, x: Tensor, settings: Any = None) -> Tensor:
        """The output of linear `index` for x. settings: what else outputs depend on; equal ones are the same."""
        autocast = torch.is_autocast_enabled(x.device.type) and torch.get_autocast_dtype(x.device.type)
        # Inference tensors count no versions, and a compiler that traces the calls sees what is written between them.
        versioned = not torch.compiler.is_compiling() and not x.is_inference()
        state = (x._version if versioned else None, torch.is_grad_enabled(), autocast, settings)
        if self._input is not x or self._state != state or self._outputs[index] is None:
            self._outputs = list(self._compute(x))
            self._input, self._state = x, state
        y: Any = self._outputs[index]
        self._outputs[index] = None
        if all(output is None for output in self._outputs):
            self._input, self._outputs = None, []
        return y
