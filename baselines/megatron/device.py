"""Lets megatron-core run on a CPU with gloo, for tests and the smoke suite; on a GPU it changes nothing.

megatron-core 0.16.1 writes the device "cuda" into a few tensor constructors of its schedules and its point-to-point
communication. The schedule's own code stays as it is: what is redirected is where those tensors are made.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch
from torch.overrides import TorchFunctionMode


class _OnCPU(TorchFunctionMode):
    """Makes tensors asked for on a GPU on the CPU."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = "cpu"
        return function(*args, **kwargs)


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
    ):
        yield
