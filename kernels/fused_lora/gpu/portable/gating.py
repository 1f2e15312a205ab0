"""The gate before a down projection, h = silu(gate) * up, and its derivatives, over all elements.

Arithmetic is in float32, and each result is rounded once.
"""

import triton
import triton.language as tl

from fused_lora.gpu.portable.segments import wait_for_the_kernel_before


@triton.jit
def _places(size, BLOCK: tl.constexpr):
    """This program's elements, and which of them there are; a tensor may have more than 2^31."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    return place, place < size


@triton.jit
def gate_kernel(gate, up, h, size, BLOCK: tl.constexpr, OVERLAP: tl.constexpr):
    """h of gate and up, all contiguous, of `size` elements."""
    wait_for_the_kernel_before(OVERLAP)
    place, inside = _places(size, BLOCK)
    x = tl.load(gate + place, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(h + place, (x * tl.sigmoid(x) * u).to(h.dtype.element_ty), mask=inside)


@triton.jit
def gate_backward_kernel(gate, up, dh, dgate, dup, size, BLOCK: tl.constexpr, OVERLAP: tl.constexpr):
    """dgate and dup of dh, over which h is then written; all contiguous, of `size` elements."""
    wait_for_the_kernel_before(OVERLAP)
    place, inside = _places(size, BLOCK)
    x = tl.load(gate + place, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + place, mask=inside, other=0.0).to(tl.float32)
    d = tl.load(dh + place, mask=inside, other=0.0).to(tl.float32)
    share = tl.sigmoid(x)
    tl.store(dgate + place, (d * u * share * (1.0 + x * (1.0 - share))).to(dgate.dtype.element_ty), mask=inside)
    tl.store(dup + place, (d * x * share).to(dup.dtype.element_ty), mask=inside)
    tl.store(dh + place, (x * share * u).to(dh.dtype.element_ty), mask=inside)
