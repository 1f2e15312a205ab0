"""q, k and v as one linear, so that one adapter, with one A for the three, is on them.

Megatron-LM's layers have it so, and LoRAFusion's authors merge them in their own arm alone. Here it is the workload
that asks for it, and then every system trains the same adapter.
"""

import torch
from torch import nn

from fused_lora.modules import SharedInput
from lorafusion.core.workload import MERGED, MERGED_PARTS
from lorafusion.model.stage import ARCHITECTURES, Stage


class _Part(nn.Module):
    """The outputs of the merged linear that were those of one of the three."""

    def __init__(self, shared: SharedInput, index: int) -> None:
        super().__init__()
        self.shared, self.index = shared, index

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.shared.output(self.index, x)


def merge_qkv(stage: Stage) -> None:
    """Merge the linears of every attention of a stage whose parameters have no storage yet."""
    attentions = tuple(parts.attention for parts in ARCHITECTURES.values())
    for module in stage.modules():
        if isinstance(module, attentions):
            _merge(module)


def _merge(attention: nn.Module) -> None:
    linears = [getattr(attention, name) for name in MERGED_PARTS]
    sizes = [linear.out_features for linear in linears]
    bias = linears[0].bias is not None
    merged = nn.Linear(linears[0].in_features, sum(sizes), bias=bias, device="meta", dtype=linears[0].weight.dtype)
    setattr(attention, MERGED, merged)
    # By name, for an adapter may be put in the linear's place.
    shared = SharedInput(lambda x: list(getattr(attention, MERGED)(x).split(sizes, dim=-1)))
    for index, name in enumerate(MERGED_PARTS):
        setattr(attention, name, _Part(shared, index))
