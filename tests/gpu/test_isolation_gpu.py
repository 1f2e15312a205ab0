"""An adapter whose numbers are gone takes nobody along: NaN and infinity in the rows of one segment change no bit of
what other segments and adapters get, by the kernels for any GPU and by those for sm_90."""

from __future__ import annotations

import pytest
import torch

from fused_lora import LoRAAdapter, LoRABatch, LoRASegment, lora_gated_linear, lora_linears
from tests.gpu.test_fused_lora_gpu import GEMMS, with_gemm

GPU = torch.device("cuda")
TOKENS, COLUMNS = 700, 384
# Borders within tiles; 130 to 140 have no adapter, and so have the rows after 690.
SEGMENTS = [LoRASegment(0, 130, 1), LoRASegment(140, 401, 0), LoRASegment(401, 690, 2)]
ROWS = {1: slice(0, 130), "none": slice(130, 140), 0: slice(140, 401), 2: slice(401, 690), "end": slice(690, 700)}


def results(dtype: torch.dtype, dropout: float, gated: bool, widths: tuple[int, ...], spoilt=None):
    """Tensors by row, and by adapter: y and the inputs' gradients; da and db."""
    generator = torch.Generator(GPU).manual_seed(3)

    def normal(*shape, scale=1.0):
        return (torch.randn(*shape, device=GPU, generator=generator) * scale).to(dtype)

    inputs = [normal(TOKENS, COLUMNS) for _ in range(2 if gated else 1)]
    dys, weights = [normal(TOKENS, n) for n in widths], [normal(n, COLUMNS, scale=0.05) for n in widths]
    rows = [
        [LoRAAdapter(normal(r, COLUMNS, scale=0.05).requires_grad_(), normal(n, r).requires_grad_(), 1.5, dropout,
                     9 * i + g) for g, r in enumerate((16, 40, 5))]
        for i, n in enumerate(widths)
    ]  # fmt: skip
    if spoilt is not None:
        bad = torch.tensor([float("nan"), float("inf"), -float("inf")], device=GPU, dtype=dtype)
        for tensor in (*inputs, *dys):
            tensor[ROWS[spoilt]] = bad.repeat(tensor.shape[1])[: tensor.shape[1]]
    leaves = [one.requires_grad_() for one in inputs]
    batch = LoRABatch.of(SEGMENTS, torch.arange(TOKENS, device=GPU))
    if gated:
        ys = [lora_gated_linear(*leaves, weights[0], None, rows[0], batch)]
    else:
        ys = lora_linears(leaves[0], weights, [None] * len(widths), rows, batch)
    torch.autograd.backward(ys, dys)
    by_row = {f"y{i}": y.detach() for i, y in enumerate(ys)} | {f"dx{i}": one.grad for i, one in enumerate(leaves)}
    return by_row, {(i, g): (one.a.grad, one.b.grad) for i, row in enumerate(rows) for g, one in enumerate(row)}


@pytest.mark.parametrize("gemm", ["library", "ours"])
@pytest.mark.parametrize("spoilt", list(ROWS))
@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize(
    ("dtype", "gated", "widths"),
    [
        (torch.bfloat16, False, (512,)),
        (torch.bfloat16, False, (512, 136, 264)),
        (torch.bfloat16, True, (512,)),
        (torch.float32, False, (512, 136)),
    ],
    ids=["one", "three", "gated", "float32"],
)
def test_rows_that_are_no_numbers_stay_with_their_adapter(gemm, spoilt, dropout, dtype, gated, widths):
    if gemm == "ours" and (torch.cuda.get_device_capability() != (9, 0) or dtype != torch.bfloat16):
        pytest.skip("our GEMM is for sm_90 and 16 bits")
    with with_gemm(GEMMS[gemm]):
        clean_rows, clean = results(dtype, dropout, gated, widths)
        found_rows, found = results(dtype, dropout, gated, widths, spoilt)
    for owner, rows in ROWS.items():
        if owner != spoilt:
            for name, tensor in found_rows.items():
                assert torch.equal(tensor[rows], clean_rows[name][rows]), (name, owner)
    for (linear, adapter), gradients in found.items():
        if adapter != spoilt:
            for name, ours, expected in zip(("da", "db"), gradients, clean[linear, adapter], strict=True):
                assert torch.equal(ours, expected), (name, linear, adapter)


def test_attention_and_loss_of_a_neighbour_that_are_no_numbers_stay_its_own():
    """Packed samples of one microbatch, through the attention and the loss that runs use."""
    from lorafusion.data.packing import SampleBorders
    from lorafusion.model.attention import packed_attention
    from lorafusion.model.loss import weighted_losses

    generator, lengths, middle = torch.Generator(GPU).manual_seed(5), (70, 33, 129), slice(70, 103)
    others = torch.ones(sum(lengths), dtype=torch.bool, device=GPU)
    others[middle] = False
    q, k, v = (torch.randn(1, 4, sum(lengths), 64, device=GPU, generator=generator).bfloat16() for _ in range(3))
    hidden, head = (torch.randn(*shape, device=GPU, generator=generator).bfloat16() for shape in ((232, 64), (512, 64)))
    labels, weights = torch.arange(232, device=GPU), torch.full((232,), 0.1, dtype=torch.float64, device=GPU)
    found = []
    for spoilt in (False, True):
        leaves = [one.clone() for one in (q, k, v, hidden[None])]
        if spoilt:
            for one in leaves:
                one[..., middle, :] = float("nan")
        leaves = [one.requires_grad_() for one in leaves]
        borders = SampleBorders.of(lengths, GPU)
        out, _ = packed_attention(torch.nn.Module(), *leaves[:3], None, borders=borders, scaling=0.125)
        losses = weighted_losses(leaves[3], head, labels, weights)
        (out[:, others].float().sum() + losses[others].sum()).backward(retain_graph=True)
        found.append([out[:, others], losses[others], *(one.grad[..., others, :] for one in leaves)])
    for clean, ours in zip(*found, strict=True):  # flash attention's backward pass adds in any order
        assert (ours - clean).norm() <= 1e-3 * clean.norm()
