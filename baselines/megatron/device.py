"""Lets megatron-core run on a CPU with gloo, for tests and the smoke suite; on a GPU it changes nothing.

megatron-core 0.16.1 writes the device "cuda" into a few tensor constructors of its schedules and its point-to-point
communication, and into its device meshes. Its own code stays as it is: what is redirected is where those are made.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

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
def device_of(device: torch.device) -> Iterator[None]:
    """Within it, megatron-core works on `device`."""
    if device.type == "cuda":
        yield
        return
    with (
        _OnCPU(),
        patch("torch.cuda.current_device", lambda: torch.device("cpu")),
        patch("torch.cuda.synchronize", lambda *_: None),
        patch.object(torch_fully_sharded_data_parallel, "DeviceMesh", _CPUMesh),
    ):
        yield
