"""Launches of the gate before a down projection, h = silu(gate) * up, and of its derivatives."""

from __future__ import annotations

from torch import Tensor
from triton.runtime.jit import JITFunction

from fused_lora.gpu.host.calls import cdiv, launch, overlap_of, target_for
from fused_lora.gpu.portable import gating

BLOCK = 2048  # elements of a program
WARPS = 8  # of a program: 16 bytes a thread, of elements of 16 bits


def gate(gate: Tensor, up: Tensor, h: Tensor) -> Tensor:
    """Fill h, which is contiguous; all are [M, K]."""
    _run(gating.gate_kernel, gate.contiguous(), up.contiguous(), h)
    return h


def gate_backward(gate: Tensor, up: Tensor, dh: Tensor, dgate: Tensor, dup: Tensor) -> None:
    """Fill dgate and dup, and the memory of dh with h; these three are contiguous, and all are [M, K]."""
    _run(gating.gate_backward_kernel, gate.contiguous(), up.contiguous(), dh, dgate, dup)


def _run(kernel: JITFunction, *tensors: Tensor) -> None:
    """A kernel over all elements."""
    size = tensors[0].numel()
    if size:
        settings = overlap_of(target_for(tensors[0]))
        launch(kernel, (cdiv(size, BLOCK),), *tensors, size, BLOCK=BLOCK, num_warps=WARPS, **settings)
