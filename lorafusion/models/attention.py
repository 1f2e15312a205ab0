"""Causal attention over packed samples that do not see each other, through transformers' attention interface.

On CUDA it is PyTorch's variable-length flash attention, whose work is the sum of squared sample lengths; on a CPU it
is SDPA with a block-diagonal mask, quadratic in the whole microbatch and exact.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from transformers import AttentionInterface

NAME = "lorafusion_packed"


@dataclass(frozen=True)
class SampleBorders:
    """Where the samples of a microbatch begin and end.

    offsets: int32 [samples + 1], token offsets from 0 to the microbatch's length, on the device of the run.
    longest: tokens of the longest sample, known on the host so that nothing waits for the device.
    """

    offsets: torch.Tensor
    longest: int

    @cached_property
    def mask(self) -> torch.Tensor:
        """Boolean [tokens, tokens]: may the row's token see the column's."""
        tokens = torch.arange(int(self.offsets[-1]), device=self.offsets.device)
        sample = torch.bucketize(tokens, self.offsets[1:], right=True)
        return (sample[:, None] == sample[None, :]) & (tokens[:, None] >= tokens[None, :])


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    borders: SampleBorders,
    scaling: float,
    dropout: float = 0.0,
    **_: object,
) -> tuple[torch.Tensor, None]:
    """Attention within each sample. query [1, H, T, D], key and value [1, H_kv, T, D]; returns ([1, T, H, D], None)."""
    if dropout:
        raise ValueError(f"packed attention has no attention dropout, found {dropout}")
    if query.is_cuda:
        return _varlen(query, key, value, borders, scaling)[None], None
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=borders.mask, scale=scaling, enable_gqa=True)
    return out.transpose(1, 2), None


def _varlen(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, borders: SampleBorders, scaling: float
) -> torch.Tensor:
    from torch.nn.attention.varlen import varlen_attn

    # torch 2.11 needs equal head counts and calls the causal case is_causal or window_size by its build; ask once.
    parameters = inspect.signature(varlen_attn).parameters
    options: dict = {"window_size": (-1, 0)} if "window_size" in parameters else {"is_causal": True}
    groups = query.shape[1] // key.shape[1]
    if "enable_gqa" in parameters:
        options["enable_gqa"] = groups > 1
    elif groups > 1:
        key, value = (tensor.repeat_interleave(groups, dim=1) for tensor in (key, value))
    flat = [tensor[0].transpose(0, 1).contiguous() for tensor in (query, key, value)]
    offsets, longest = borders.offsets, borders.longest
    return varlen_attn(*flat, offsets, offsets, longest, longest, scale=scaling, **options)


AttentionInterface.register(NAME, packed_attention)
