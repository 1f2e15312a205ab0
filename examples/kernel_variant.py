"""A kernel variant, checked against the reference: `TRITON_INTERPRET=1 python examples/kernel_variant.py`.

The variant adds the LoRA term s b^T to the base linear's output y in one kernel, for one adapter. Without a GPU
Triton's interpreter runs it, on the CPU. CONTRIBUTING.md says where a kernel goes once it is right.
"""

import torch
import triton
import triton.language as tl

from fused_lora.adapters import LoRAAdapter, LoRASegment
from fused_lora.reference import lora_forward

TOKENS, INPUTS, OUTPUTS, RANK = 48, 64, 80, 16
MOST_ERROR = 2.0  # of that of plain PyTorch in the same dtype


@triton.jit
def add_term_kernel(y, s, b, tokens, outputs, rank: tl.constexpr, rows: tl.constexpr, columns: tl.constexpr):
    """y [tokens, outputs] += s [tokens, rank] b [outputs, rank]^T; a program has a tile of y."""
    row = tl.program_id(0) * rows + tl.arange(0, rows)
    column = tl.program_id(1) * columns + tl.arange(0, columns)
    ranks = tl.arange(0, rank)
    left = tl.load(s + row[:, None] * rank + ranks[None, :], mask=row[:, None] < tokens, other=0.0)
    right = tl.load(b + column[None, :] * rank + ranks[:, None], mask=column[None, :] < outputs, other=0.0)
    place = y + row[:, None] * outputs + column[None, :]
    inside = (row[:, None] < tokens) & (column[None, :] < outputs)
    base = tl.load(place, mask=inside, other=0.0)
    tl.store(place, base + tl.dot(left, right, input_precision="ieee"), mask=inside)


def variant(x: torch.Tensor, weight: torch.Tensor, adapter: LoRAAdapter) -> torch.Tensor:
    """x [M, K] to [M, N]: the base linear, the projection, and the kernel."""
    y, s = x @ weight.T, adapter.scaling * (x @ adapter.a.T)
    grid = (triton.cdiv(y.shape[0], 16), triton.cdiv(y.shape[1], 16))
    add_term_kernel[grid](y, s, adapter.b, *y.shape, rank=s.shape[1], rows=16, columns=16)
    return y


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    draw = torch.Generator().manual_seed(0)
    x, weight, a, b = (
        torch.randn(shape, generator=draw).to(device)
        for shape in ((TOKENS, INPUTS), (OUTPUTS, INPUTS), (RANK, INPUTS), (OUTPUTS, RANK))
    )

    def reference(dtype: torch.dtype) -> torch.Tensor:
        adapter = LoRAAdapter(a.to(dtype), b.to(dtype), scaling=2.0)
        y, _ = lora_forward(x.to(dtype), weight.to(dtype), None, [adapter], [LoRASegment(0, TOKENS, 0)], [None])
        return y

    exact, plain = reference(torch.float64), reference(torch.float32)
    ours = variant(x, weight, LoRAAdapter(a, b, scaling=2.0))
    error, allowed = ((y - exact).norm().item() for y in (ours, plain))
    print(f"error of the variant: {error:.2e}; of plain PyTorch: {allowed:.2e}")
    if error > MOST_ERROR * allowed:
        raise SystemExit("the variant is wrong")


if __name__ == "__main__":
    main()
