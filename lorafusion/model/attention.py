"""Causal attention over packed samples that do not see each other, through transformers' attention interface.

On CUDA it is PyTorch's variable-length flash attention or cuDNN's, on a CPU its SDPA for one sample after another: in
all of them the work is the sum of squared sample lengths, and what is no number in one sample stays in it.
"""

import logging

import torch
import torch.nn.functional as F
from transformers import AttentionInterface

from lorafusion.core.config import Attention
from lorafusion.core.schema import UserError
from lorafusion.data.packing import SampleBorders
from lorafusion.model import cudnn_attention
from lorafusion.model.cudnn_attention import Heads, RaggedBorders

LOGGER = logging.getLogger(__name__)
NAME = "lorafusion_packed"
BACKENDS = ("cudnn", "flash")


def chosen_backend(word: Attention, device: torch.device, dtype: torch.dtype, heads: Heads) -> str:
    """Of `BACKENDS`. On a GPU a line says why `auto` is not cuDNN's. `UserError` where cuDNN's is asked for in vain."""
    reason = "" if word == "flash" else cudnn_attention.why_not(device, dtype, heads)
    if reason and word == "cudnn":
        raise UserError(f"attention: cudnn, but {reason}; expected auto or flash")
    if reason and device.type == "cuda":
        LOGGER.info(f"attention: FlashAttention-2; not cuDNN's, for {reason}")
    return "flash" if reason or word == "flash" else "cudnn"


def prepared(borders: SampleBorders, backend: str, heads: Heads, hidden: torch.Tensor) -> SampleBorders:
    """Borders as a backend needs them, made once for all layers. hidden: [1, T, H]."""
    tokens = hidden.shape[1]
    if backend == "flash" or not hidden.is_cuda or tokens * heads.queries * heads.size >= 2**31:  # cuDNN's are int32
        return borders
    return RaggedBorders.of(borders, tokens, heads)


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
    """Attention within each sample, by the backend that the borders are `prepared` for. query [1, H, T, D], key and
    value [1, H_kv, T, D]; returns ([1, T, H, D], None)."""
    if dropout:
        raise ValueError(f"packed attention has no attention dropout, found {dropout}")
    if not query.is_cuda:
        return _each_sample(query, key, value, borders, scaling).transpose(1, 2), None
    flat = [tensor[0].transpose(0, 1).contiguous() for tensor in (query, key, value)]
    attend = cudnn_attention.attend if isinstance(borders, RaggedBorders) else _varlen
    return attend(*flat, borders, scaling)[None], None


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
    offsets, longest = borders.offsets, borders.longest
    return torch.ops.aten._flash_attention_forward(
        query, key, value, offsets, offsets, longest, longest, dropout_p=0.0, is_causal=True, return_debug_mask=False,
        scale=scaling,
    )[0]  # fmt: skip


AttentionInterface.register(NAME, packed_attention)
