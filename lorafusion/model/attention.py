"""Causal attention over packed samples that do not see each other, through transformers' attention interface.

On CUDA it is PyTorch's variable-length flash attention, on a CPU its SDPA for one sample after another: in both the
work is the sum of squared sample lengths, and what is no number in one sample stays in it.
"""

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
    return _each_sample(query, key, value, borders, scaling).transpose(1, 2), None


def _each_sample(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, borders: SampleBorders, scaling: float
) -> torch.Tensor:
    """[1, H, T, D]."""
    samples = zip(*(tensor.split(borders.lengths, dim=2) for tensor in (query, key, value)), strict=True)
    outputs = [
        F.scaled_dot_product_attention(*sample, is_causal=True, scale=scaling, enable_gqa=True) for sample in samples
    ]
    return torch.cat(outputs, dim=2)


def _varlen(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, borders: SampleBorders, scaling: float
) -> torch.Tensor:
    """[T, H, D]. The operator behind `torch.nn.attention.varlen`, which in torch 2.11 asks for as many heads of keys as
    of queries: to repeat them took 30 ms of a microbatch's 496 with Llama-3.1-8B on an H200."""
    flat = [tensor[0].transpose(0, 1).contiguous() for tensor in (query, key, value)]
    offsets, longest = borders.offsets, borders.longest
    return torch.ops.aten._flash_attention_forward(
        *flat, offsets, offsets, longest, longest, dropout_p=0.0, is_causal=True, return_debug_mask=False, scale=scaling
    )[0]


AttentionInterface.register(NAME, packed_attention)
