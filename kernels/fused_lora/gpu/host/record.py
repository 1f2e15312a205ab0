"""What the host code does, written down once: memory, kernels and operations of PyTorch, in their order.

It is run on tensors without storage. What it does depends on shapes, dtypes and choices alone, so that the record
serves every call with the same ones (`replay`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

ALLOCATIONS = ("aten::empty", "aten::new_empty", "aten::empty_like")


@dataclass(frozen=True)
class Reference:
    """A tensor in the memory of a slot. offset: in elements."""

    slot: int
    offset: int
    shape: torch.Size
    strides: tuple[int, ...]
    dtype: torch.dtype


class Allocation(NamedTuple):
    """Memory for a slot."""

    memory: Reference


class Operation(NamedTuple):
    """An operation of PyTorch; its references stand for tensors. result: the slot of a new tensor, or None."""

    function: Callable
    arguments: tuple
    keywords: dict[str, Any]
    result: int | None


class Launch(NamedTuple):
    """A kernel's launch. arguments: as the host code gave them; tensors have no storage."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple
    settings: dict[str, Any]


Step = Allocation | Operation | Launch


class Recorder(TorchDispatchMode):
    """Writes down what happens inside. inputs: stand-ins for the tensors that every call brings, the first slots."""

    def __init__(self, inputs: Iterable[Tensor], target: Any) -> None:
        super().__init__()
        self.target = target
        self.steps: list[Step] = []
        self._slots: dict[int, int] = {}
        self.memory: list[Tensor] = []  # of each slot; kept, else another one could get the storage of one that is gone
        for tensor in inputs:
            self._new_slot(tensor)

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        keywords = keywords or {}
        result = function(*arguments, **keywords)
        fresh = isinstance(result, Tensor) and result.untyped_storage()._cdata not in self._slots
        if fresh and function._schema.name in ALLOCATIONS:
            self._new_slot(result)
            self.steps.append(Allocation(self.reference(result)))
        elif fresh or function._schema.is_mutable:
            positional = tuple(self._referred(argument) for argument in arguments)
            named = {name: self._referred(argument) for name, argument in keywords.items()}
            self.steps.append(Operation(function, positional, named, self._new_slot(result) if fresh else None))
        return result

    def launch(self, kernel: Any, grid: tuple[int, ...], arguments: tuple, settings: dict[str, Any]) -> None:
        self.steps.append(Launch(kernel, grid, arguments, settings))

    def reference(self, tensor: Tensor) -> Reference:
        slot = self._slots[tensor.untyped_storage()._cdata]
        return Reference(slot, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype)

    def _referred(self, argument: Any) -> Any:
        return self.reference(argument) if isinstance(argument, Tensor) else argument

    def _new_slot(self, tensor: Tensor) -> int:
        self.memory.append(tensor)
        return self._slots.setdefault(tensor.untyped_storage()._cdata, len(self._slots))


def stand_in(tensor: Tensor) -> Tensor:
    """One without storage, whose rows lie as the tensor's."""
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
