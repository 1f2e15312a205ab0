"""Several adapters by torch's grouped matrix product, as today's closest industrial multi-LoRA computes them.

Reproduced, from `MultiLoRALinear` of Megatron-Bridge (multi_lora_layers.py at bebdfab, 2026; read, not copied): tokens
lie adapter by adapter; the factors of all adapters of a linear have one rank, short ones filled up with zeros, and are
stacked anew at each forward pass; one grouped product takes x to s, another one s to the LoRA term, which is added to
what the frozen linear gave; the backward pass is autograd's. Not reproduced: its tensor and sequence parallelism; slots
of adapters that have no tokens in the microbatch; the scaling of the term, a pass over its N columns in bfloat16 after
a `repeat_interleave` that waits for the device, where here B is scaled, which is small. Added: dropout, which Bridge
refuses (it asserts a rate of 0); here it is torch's, on the input, with each adapter's own rate.

What stacking costs: copies of A and B, their scaling, and the same again backward, at each pass of each linear:
(K + N) R numbers an adapter, against (K + N) T for the tokens themselves.
"""

import torch
import torch.nn.functional as F

from lorafusion.core.workload import Job
from lorafusion.model.lora import ActiveBatch, StageLinear, each

# Rows must begin at multiples of 16 bytes: 8 numbers of bfloat16.
ALIGNMENT = 8


@each
def grouped(linear: StageLinear, active: ActiveBatch) -> None:
    """The LoRA kind: any number of adapters in a microbatch, in two grouped products."""
    layer = linear.layer

    def forward(x: torch.Tensor) -> torch.Tensor:
        y, segments = layer.get_base_layer()(x), active.batch.segments
        jobs = [linear.jobs[segment.adapter] for segment in segments]
        if not any(job.name in layer.lora_A for job in jobs):
            return y
        ends = [segment.stop for segment in segments]
        if [0, *ends] != [*(segment.start for segment in segments), x.shape[1]]:
            raise ValueError(f"grouped: expected segments end to end over {x.shape[1]} tokens, found {segments}")
        lengths = [segment.stop - segment.start for segment in segments]
        rates = [job.dropout if layer.training and job.name in layer.lora_A else 0.0 for job in jobs]
        a, b = _stacked(linear, jobs)
        offsets = active.batch.lora.offsets[1:]
        dropped = _dropped(x.flatten(0, 1), lengths, rates).to(a.dtype)
        s = _grouped_product(dropped, a.transpose(1, 2), lengths, offsets)
        return y + _grouped_product(s, b.transpose(1, 2), lengths, offsets).view_as(y).to(y.dtype)

    layer.forward = forward


def has_grouped_gemm(x: torch.Tensor, weights: torch.Tensor) -> bool:
    """Is there a kernel for the grouped product of x [T, K] and weights [G, K, N]? In bfloat16 on a GPU from Ampere on,
    where rows are aligned; elsewhere torch refuses, or waits for the device and loops over the groups itself."""
    return (
        x.is_cuda
        and x.dtype == weights.dtype == torch.bfloat16
        and torch.cuda.get_device_capability(x.device) >= (8, 0)
        and all(size % ALIGNMENT == 0 for size in weights.shape[1:])
    )


def _grouped_product(x: torch.Tensor, weights: torch.Tensor, lengths: list[int], ends: torch.Tensor) -> torch.Tensor:
    """[T, N]: x [T, K], its rows in groups of `lengths`, each times its own of weights [G, K, N]. ends: int32 [G], on
    the device, where the groups end. All groups have rows, so that no gradient is of a group without."""
    if has_grouped_gemm(x, weights):
        # Public since torch 2.10; the name before took the same arguments.
        product = getattr(F, "grouped_mm", None) or torch._grouped_mm
        return product(x, weights, offs=ends)
    return torch.cat([rows @ weight for rows, weight in zip(x.split(lengths), weights, strict=True)])


def _stacked(linear: StageLinear, jobs: list[Job]) -> tuple[torch.Tensor, torch.Tensor]:
    """a [G, R, K] and the scaled b [G, N, R], zeros where an adapter has a lower rank or no factors on the linear; R is
    the largest rank, rounded up to the alignment. Autograd takes their gradients apart again."""
    layer, weight = linear.layer, linear.layer.get_base_layer().weight
    rank = max(job.rank for job in jobs if job.name in layer.lora_A)
    rank += -rank % ALIGNMENT
    a, b = [], []
    for job in jobs:
        if job.name in layer.lora_A:
            factor, missing = layer.lora_A[job.name].weight, rank - job.rank
            a.append(F.pad(factor, (0, 0, 0, missing)) if missing else factor)
            # One rounding of the product, as the scaling is a number and not a tensor of b's dtype.
            scaled = layer.lora_B[job.name].weight * job.scaling
            b.append(F.pad(scaled, (0, missing)) if missing else scaled)
        else:
            dtype = next(iter(layer.lora_A.values())).weight.dtype
            a.append(weight.new_zeros(rank, weight.shape[1], dtype=dtype))
            b.append(weight.new_zeros(weight.shape[0], rank, dtype=dtype))
    return torch.stack(a), torch.stack(b)


def _dropped(x: torch.Tensor, lengths: list[int], rates: list[float]) -> torch.Tensor:
    """x [T, K] after dropout, each group of rows at its own rate."""
    if len(set(rates)) == 1:
        return F.dropout(x, rates[0]) if rates[0] else x
    pieces = zip(x.split(lengths), rates, strict=True)
    return torch.cat([F.dropout(rows, rate) if rate else rows for rows, rate in pieces])
