"""Put the kernels under a PEFT model, and take them away again: `patch(model)`, `unpatch(model)`.

Parameters, checkpoints and everything else of the model stay PEFT's: only the forward of its LoRA linears is replaced.
What the kernels do not do, they leave to PEFT's own forward, at each call: eval mode, merged or disabled adapters,
several active ones, `adapter_names`, variants such as DoRA, biases of adapters, float64, and layers whose parts have
hooks (the kernels read weights, and call no part). Products are computed in the dtype of the input (under autocast,
autocast's), also where the adapters are float32, PEFT's default.
"""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any, NamedTuple

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


class _Reading(NamedTuple):
    """What a call takes from a layer. setting: the active adapter's name, scaling and dropout, which may be changed at
    any time, as all that is read may."""

    weight: Tensor
    bias: Tensor | None
    a: Tensor
    b: Tensor
    setting: tuple[str, float, float]


class _Group:
    """Patched linears that are computed together: one, or those that share their input."""

    def __init__(self, layers: list[Any], keys: list[int]) -> None:
        self.layers = layers
        self.keys = keys
        self.shared = SharedInput(self.compute)
        self._tables = AdapterTables()

    def compute(self, x: Tensor) -> list[Tensor]:
        """The outputs of all linears of the group, which are computable."""
        readings = [_read(layer, x) for layer in self.layers]
        return self.outputs(x, [reading for reading in readings if reading])

    def outputs(self, x: Tensor, readings: list[_Reading]) -> list[Tensor]:
        """The same from what was read of each."""
        adapters = [
            [LoRAAdapter(a, b, scaling, dropout, key)]
            for (_, _, a, b, (_, scaling, dropout)), key in zip(readings, self.keys, strict=True)
        ]
        weights, biases = [reading.weight for reading in readings], [reading.bias for reading in readings]
        x, weights, biases = autocasted(x, weights, biases)
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
        reading = None if args or kwargs or STATE not in layer.__dict__ else _read(layer, x)
        if reading is None:
            return type(layer).forward(layer, x, *args, **kwargs)
        if len(members) > 1:
            readings = [reading if member is layer else _read(member, x) for member in members]
            if all(readings):
                return self.group.shared.output(self.index, x, [each.setting for each in readings if each])
        return self.single.outputs(x, [reading])[0]


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
    return any(
        map(_is_hooked, (layer.get_base_layer(), layer.lora_A[name], layer.lora_B[name], layer.lora_dropout[name]))
    )


def _is_hooked(part: nn.Module) -> bool:
    state = part.__dict__
    return "forward" in state or any(map(state.get, HOOKS))


def _read(layer: Any, x: Tensor) -> _Reading | None:
    """What the kernels compute a call from; None where they would not compute it as PEFT does."""
    if not layer.training or layer.merged or layer.disable_adapters or len(layer.active_adapters) != 1:
        return None
    [name] = layer.active_adapters
    modules = layer._modules  # attributes of modules are slow, and this is read at each call
    down, up = modules["lora_A"]._modules.get(name), modules["lora_B"]._modules.get(name)
    if down is None or up is None or name in layer.lora_variant:
        return None
    base, dropout = layer.get_base_layer(), modules["lora_dropout"]._modules[name]
    if any(map(_is_hooked, (base, down, up, dropout))) or not _is_plain(dropout):
        return None
    a, b, weight, bias = down.weight, up.weight, base.weight, base.bias
    autocast = torch.is_autocast_enabled(x.device.type)
    computed = torch.get_autocast_dtype(x.device.type) if autocast else x.dtype
    frozen = not weight.requires_grad and (bias is None or not bias.requires_grad)
    dtypes = {x.dtype, weight.dtype, a.dtype, b.dtype, computed}
    supported = dtypes.issubset(KERNEL_DTYPES) and (autocast or x.dtype == weight.dtype)
    plain = up.bias is None and weight.is_contiguous() and a.shape[0] <= 256
    if not (frozen and supported and plain and x.numel()):
        return None
    p = dropout.p if type(dropout) is nn.Dropout and dropout.training else 0.0
    return _Reading(weight, bias, a, b, (name, layer.scaling[name], p))


def _is_plain(dropout: nn.Module) -> bool:
    """Is it one that the kernels draw? That of p = 1 keeps nothing."""
    return type(dropout) is nn.Identity or (type(dropout) is nn.Dropout and dropout.p != 1)
