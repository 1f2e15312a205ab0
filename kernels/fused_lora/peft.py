"""Put the kernels under a PEFT model, and take them away again: `patch(model)`, `unpatch(model)`.

Parameters, checkpoints and everything else of the model stay PEFT's: only the forward of its LoRA linears is replaced.
What the kernels do not do, they leave to PEFT's own forward, at each call: eval mode, merged or disabled adapters,
several active ones, `adapter_names`, variants such as DoRA, biases of adapters, float64, and layers whose parts have
hooks (the kernels read weights, and call no part). Products are computed in the dtype of the input (under autocast,
autocast's), also where the adapters are float32, PEFT's default.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fused_lora.adapters import AdapterTables, LoRAAdapter
from fused_lora.linear import KERNEL_DTYPES, lora_linears
from fused_lora.modules import SHARED_INPUTS, SharedInput, autocasted, whole_batch
from fused_lora.philox import mask_key

STATE = "_fused_lora"
HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


@dataclass(frozen=True)
class PatchSummary:
    """What `patch` did: names of the linears it patched, of those computed together, and why others were not."""

    patched: list[str] = field(default_factory=list)
    groups: list[list[str]] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        text = f"fused_lora: {len(self.patched)} LoRA linears patched, {sum(map(len, self.groups))} of them in "
        text += f"{len(self.groups)} groups that share their input; {len(self.skipped)} left to PEFT"
        reasons = Counter(self.skipped.values())
        return "\n".join([text, *(f"  {count} x {reason}" for reason, count in reasons.most_common())])


class _Group:
    """Patched linears that are computed together: one, or those that share their input."""

    def __init__(self, layers: list[Any], keys: list[int]) -> None:
        self.layers = layers
        self.keys = keys
        self.shared = SharedInput(self.compute)
        self._tables = AdapterTables()

    def compute(self, x: Tensor) -> list[Tensor]:
        """The outputs of all linears of the group."""
        adapters = [[_adapter(layer, key)] for layer, key in zip(self.layers, self.keys, strict=True)]
        bases = [layer.get_base_layer() for layer in self.layers]
        x, weights, biases = autocasted(x, [base.weight for base in bases], [base.bias for base in bases])
        return lora_linears(x, weights, biases, adapters, whole_batch(x), table=self._tables.of(adapters, x))


@dataclass(eq=False)
class _Patched:
    """What a patched linear keeps: its group and its place there, and itself as a group of one, which the siblings may
    make necessary. Its forward is the layer's: a method, so that a copy of the model calls the copy, and of this class,
    where pickle looks it up."""

    group: _Group
    index: int
    single: _Group

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        layer, members = self.group.layers[self.index], self.group.layers
        if args or kwargs or STATE not in layer.__dict__ or not _computable(layer, x):
            return type(layer).forward(layer, x, *args, **kwargs)
        if len(members) > 1 and all(_computable(member, x) for member in members):
            return self.group.shared.output(self.index, x, [_setting(member) for member in members])
        return self.single.compute(x)[0]


def patch(model: nn.Module, group: bool = True) -> PatchSummary:
    """Let the kernels compute the LoRA linears of a PEFT model. What is patched already stays as it is.

    group: compute q/k/v and gate/up of one module together, which must call them one after another with one input. Of
    a linear in a group whose output the loss does not use, the adapter gets zeros as gradients, where PEFT has None.
    Raises ValueError for a LoRA layer itself: its name in the model, which its dropout is drawn from, is not known.
    """
    from peft.tuners.lora import LoraLayer

    if isinstance(model, LoraLayer):
        raise ValueError(f"model: expected one that contains LoRA layers, found such a layer, a {type(model).__name__}")
    summary = PatchSummary()
    for parent_name, parent in model.named_modules():
        fitting = {}
        for name, layer in parent.named_children():
            if isinstance(layer, LoraLayer) and STATE not in layer.__dict__:
                full_name = f"{parent_name}.{name}" if parent_name else name
                reason = _unsupported(layer)
                if reason:
                    summary.skipped[full_name] = reason
                else:
                    fitting[name] = (full_name, layer)
        for names in _grouped(list(fitting), group):
            members = [fitting[name] for name in names]
            _install(_Group([layer for _, layer in members], [mask_key(0, 0, full_name) for full_name, _ in members]))
            summary.patched.extend(full_name for full_name, _ in members)
            if len(members) > 1:
                summary.groups.append([full_name for full_name, _ in members])
    return summary


def unpatch(model: nn.Module) -> int:
    """Give all patched linears PEFT's forward back; returns how many there were."""
    count = 0
    for layer in model.modules():
        state = layer.__dict__.pop(STATE, None)
        if state is not None:
            count += 1
            if layer.forward == state.forward:  # else it is wrapped by others', and finds the state gone
                del layer.forward
    return count


def _grouped(names: list[str], group: bool) -> list[list[str]]:
    """Names of siblings that are computed together; the others alone."""
    groups = [[name for name in shared if name in names] for shared in SHARED_INPUTS] if group else []
    together = [names for names in groups if len(names) > 1]
    alone = [name for name in names if not any(name in names for names in together)]
    return [*together, *([name] for name in alone)]


def _install(group: _Group) -> None:
    for index, layer in enumerate(group.layers):
        state = _Patched(group, index, _Group([layer], [group.keys[index]]))
        setattr(layer, STATE, state)
        layer.forward = state.forward


def _unsupported(layer: Any) -> str | None:
    """Why a LoRA layer can never be computed by the kernels, or None."""
    from peft.tuners.lora import Linear

    base = layer.get_base_layer()
    if type(layer) is not Linear:
        return f"{type(layer).__module__}.{type(layer).__name__} is no plain LoRA linear"
    if type(base) is not nn.Linear:
        return f"its base is {type(base).__module__}.{type(base).__name__}, not torch.nn.Linear"
    if layer.lora_variant and all(name in layer.lora_variant for name in layer.lora_A):
        return f"its adapters are of a variant: {type(next(iter(layer.lora_variant.values()))).__name__}"
    if "forward" in layer.__dict__:
        return "its forward was replaced, as by accelerate's hooks"
    for name in layer.active_adapters:
        if name in layer.lora_A and _hooked(layer, name):
            return "its base or its adapter has hooks, or a forward that was replaced, as by accelerate's offloading"
    return None


def _hooked(layer: Any, name: str) -> bool:
    """Would a call of the modules whose weights the kernels read do more than their own forward?"""
    parts = (layer.get_base_layer(), layer.lora_A[name], layer.lora_B[name], layer.lora_dropout[name])
    return any("forward" in part.__dict__ or any(getattr(part, hooks) for hooks in HOOKS) for part in parts)


def _computable(layer: Any, x: Tensor) -> bool:
    """Do the kernels compute this call as PEFT would?"""
    if not layer.training or layer.merged or layer.disable_adapters or len(layer.active_adapters) != 1:
        return False
    [name] = layer.active_adapters
    if name not in layer.lora_A or name in layer.lora_variant or _hooked(layer, name):
        return False
    a, b, dropout = layer.lora_A[name], layer.lora_B[name], layer.lora_dropout[name]
    if type(dropout) is not nn.Identity and (type(dropout) is not nn.Dropout or dropout.p == 1):
        return False
    base = layer.get_base_layer()
    frozen = not base.weight.requires_grad and (base.bias is None or not base.bias.requires_grad)
    autocast = torch.is_autocast_enabled(x.device.type)
    computed = torch.get_autocast_dtype(x.device.type) if autocast else x.dtype
    dtypes = (x.dtype, base.weight.dtype, a.weight.dtype, b.weight.dtype, computed)
    supported = all(dtype in KERNEL_DTYPES for dtype in dtypes) and (autocast or x.dtype == base.weight.dtype)
    plain = b.bias is None and base.weight.is_contiguous() and a.weight.shape[0] <= 256
    return frozen and supported and plain and x.numel() > 0


def _setting(layer: Any) -> tuple[str, float, float]:
    """The active adapter's name, scaling and dropout: all may be changed at any time."""
    [name] = layer.active_adapters
    dropout = layer.lora_dropout[name]
    p = dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0
    return name, layer.scaling[name], p


def _adapter(layer: Any, key: int) -> LoRAAdapter:
    name, scaling, p = _setting(layer)
    return LoRAAdapter(layer.lora_A[name].weight, layer.lora_B[name].weight, scaling, p, key)
