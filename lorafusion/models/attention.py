"""Causal attention over packed samples that do not see each other, through transformers' attention interface.

On CUDA it is PyTorch's variable-length flash attention, on a CPU its SDPA for one sample after another: in both the
work is the sum of squared sample lengths, and what is no number in one sample stays in it.
"""

from __future__ import annotations

import inspect

import torch
import torch.nn.functional as F
from transformers import AttentionInterface

from lorafusion.data.packing import SampleBorders

NAME = "lorafusion_packed"


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
    samples = zip(*(tensor.split(borders.lengths, dim=2) for tensor in (query, key, value)), strict=True)
    outputs = [F.scaled_dot_product_attention(*one, is_causal=True, scale=scaling, enable_gqa=True) for one in samples]
    return torch.cat(outputs, dim=2).transpose(1, 2), None


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
