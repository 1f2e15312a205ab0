"""Lets megatron-core run on a CPU with gloo, for tests and the smoke suite; on a GPU it changes nothing.

megatron-core 0.16.1 writes the device "cuda" into a few tensor constructors of its schedules and its point-to-point
communication, and into its device meshes. Its own code stays as it is: what is redirected is where those are made.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core.distributed import torch_fully_sharded_data_parallel
from torch.distributed import DeviceMesh
from torch.overrides import TorchFunctionMode


class _OnCPU(TorchFunctionMode):
    """Makes tensors asked for on a GPU on the CPU."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        device = kwargs.get("device")
        # A number is the index of a GPU.
        if str(device).startswith("cuda") or type(device) is int:
            kwargs["device"] = "cpu"
        return function(*args, **kwargs)


class _CPUMesh:
    """`DeviceMesh` where only meshes of CPUs can be had."""

    @staticmethod
    def from_group(group, _device_type: str) -> DeviceMesh:
        return DeviceMesh.from_group(group, "cpu")


@contextmanager
def replaced(*replacements: tuple[Any, str, object]) -> Iterator[None]:
    """Within it, attributes of modules are others: (module, name, value)."""
    originals = [(module, name, getattr(module, name)) for module, name, _ in replacements]
    try:
        for module, name, value in replacements:
            setattr(module, name, value)
        yield
    finally:
        for module, name, value in originals:
            setattr(module, name, value)


@contextmanager
def device_of(device: torch.device) -> Iterator[None]:
    """Within it, megatron-core works on `device`."""
    if device.type == "cuda":
        yield
        return
    replacements = (
        (torch.cuda, "current_device", lambda: torch.device("cpu")),
        (torch.cuda, "synchronize", lambda *_: None),
        (torch_fully_sharded_data_parallel, "DeviceMesh", _CPUMesh),
    )
    with _OnCPU(), replaced(*replacements):
        yield
