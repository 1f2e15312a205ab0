"""Cross-entropy of packed samples, weighted so that what an adapter learns does not depend on its neighbours."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from lorafusion.data.packing import IGNORE


def weighted_losses(logits: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Each token's share of its adapter's loss, [T] in float32, or float64 where the logits are.

    logits [1, T, V]; labels int64 [T], IGNORE where nothing is to be predicted; weights float32 [T], one over the
    label tokens of the adapter's global batch. The sum over all tokens of a global batch, whatever microbatches
    they came in, is the mean token loss of that batch.
    """
    dtype = torch.promote_types(logits.dtype, torch.float32)
    losses = F.cross_entropy(logits[0].to(dtype), labels, ignore_index=IGNORE, reduction="none")
    return losses * weights
