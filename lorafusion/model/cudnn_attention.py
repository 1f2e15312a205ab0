"""cuDNN's attention over packed samples, through its frontend, on GPUs of sm_90.

cuDNN makes a plan for bounds of a microbatch, which takes tens of milliseconds. So the bounds are rounded up, and a
plan serves all microbatches within them. Where samples begin and end is on the device: the host tells cuDNN nothing of
a microbatch, whose attention can therefore be captured in a CUDA graph.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from lorafusion.core.config import ModelConfig
from lorafusion.data.packing import SampleBorders

CAPABILITY, DTYPE, SIZES = (9, 0), torch.bfloat16, (64, 80, 96, 128, 256)  # that it was tried with
LEAST_SAMPLES, LEAST_TOKENS = 8, 128
WORKSPACE_TOKENS = 1024  # that the workspace of a backward pass is for a multiple of; it takes 48 KiB a token


class Heads(NamedTuple):
    """Of an attention: queries', keys', and their columns."""

    queries: int
    keys: int
    size: int

    @classmethod
    def of(cls, config: ModelConfig) -> Heads:
        heads = config.num_attention_heads
        return cls(heads, config.num_key_value_heads, config.hidden_size // heads)


class Bounds(NamedTuple):
    """What a plan is made for. longest: of a sample's tokens."""

    samples: int
    longest: int
    heads: Heads
    scaling: float
    dtype: torch.dtype


@dataclass(frozen=True)
class RaggedBorders(SampleBorders):
    """Borders as cuDNN reads them, with bounds rounded up; empty samples follow.

    starts: int32 [samples + 1] each, where samples begin in the queries [T, H, D], in the keys [T, H_kv, D] and in the
        statistics [T, H], in elements. sizes: int32 [samples], their tokens.
    """

    starts: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
    sizes: torch.Tensor

    @classmethod
    def of(cls, borders: SampleBorders, tokens: int, heads: Heads) -> RaggedBorders:
        """Nothing waits for the device."""
        samples = _rounded(len(borders.offsets) - 1, LEAST_SAMPLES)
        offsets = F.pad(borders.offsets, (0, samples + 1 - len(borders.offsets)), value=tokens)
        longest = _rounded(borders.longest, LEAST_TOKENS)
        columns = (heads.queries * heads.size, heads.keys * heads.size, heads.queries)
        starts = tuple(offsets * count for count in columns)
        return cls(offsets, borders.lengths, longest, starts, offsets.diff())

    @property
    def tensors(self) -> list[torch.Tensor]:
        return [self.sizes, *self.starts]


def why_not(device: torch.device, dtype: torch.dtype, heads: Heads) -> str:
    """Why cuDNN's attention cannot be used; empty where it can."""
    if device.type != "cuda":
        return "it needs a GPU"
    if torch.cuda.get_device_capability(device) != CAPABILITY:
        return "it was tried on sm_90 alone"
    if dtype != DTYPE:
        return f"it was tried with {DTYPE} alone, found {dtype}"
    if heads.size not in SIZES:
        return f"it was tried with heads of {', '.join(map(str, SIZES))} columns alone, found {heads.size}"
    if importlib.util.find_spec("cudnn") is None:
        return "nvidia-cudnn-frontend is not installed"
    return ""


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, borders: RaggedBorders, scaling: float
) -> torch.Tensor:
    """Causal attention within each sample. query [T, H, D], key and value [T, H_kv, D], contiguous; returns [T, H, D].

    Its backward pass gives the same bits each time where `torch.use_deterministic_algorithms` asks for it; it then
    takes up to two bytes more for each head, sample and pair of tokens of the longest."""
    return _Attention.apply(query, key, value, borders, scaling)


def _rounded(count: int, least: int) -> int:
    """Up to a power of two: few plans serve all microbatches."""
    return max(least, 1 << (count - 1).bit_length())


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, borders: RaggedBorders, scaling: float):
        heads = Heads(query.shape[1], *key.shape[1:])
        ctx.borders, ctx.bounds = borders, Bounds(len(borders.sizes), borders.longest, heads, scaling, query.dtype)
        out, statistics = torch.empty_like(query), query.new_empty(query.shape[:2], dtype=torch.float32)
        _forward_plan(query.device, ctx.bounds).run([*borders.tensors, query, key, value, out, statistics])
        ctx.save_for_backward(query, key, value, out, statistics)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        query, *_ = kept = ctx.saved_tensors
        gradients = [torch.empty_like(tensor) for tensor in kept[:3]]
        tokens = -(-len(query) // WORKSPACE_TOKENS) * WORKSPACE_TOKENS
        plan = _backward_plan(query.device, ctx.bounds, tokens, torch.are_deterministic_algorithms_enabled())
        plan.run([*ctx.borders.tensors, *kept, gradient.contiguous(), *gradients])
        return *gradients, None, None


class _Plan:
    """A cuDNN graph, and the tensors that it is run on, in order."""

    def __init__(self, device: torch.device, graph: Any, tensors: Sequence[Any]) -> None:
        import cudnn

        graph.validate()
        graph.build_operation_graph()
        graph.create_execution_plans([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
        graph.check_support()
        graph.build_plans()
        self._device, self._graph, self._cudnn = device, graph, cudnn
        self._uids = [tensor.get_uid() for tensor in tensors]
        self._bytes = graph.get_workspace_size()

    def run(self, tensors: Sequence[torch.Tensor]) -> None:
        """On the current stream."""
        addresses = {uid: tensor.data_ptr() for uid, tensor in zip(self._uids, tensors, strict=True)}
        workspace = torch.empty(self._bytes, dtype=torch.uint8, device=self._device)
        handle = _handle(self._device)
        self._cudnn.set_stream(handle=handle, stream=torch.cuda.current_stream(self._device).cuda_stream)
        self._graph.execute(addresses, workspace.data_ptr(), handle=handle)


@cache
def _handle(device: torch.device) -> Any:
    import cudnn

    with torch.cuda.device(device):
        return cudnn.create_handle()


@cache
def _forward_plan(device: torch.device, bounds: Bounds) -> _Plan:
    graph, borders, packed = _begin(device, bounds)
    sizes, queries, keys, rows = borders
    heads = bounds.heads
    query, key, value = packed(heads.queries, queries), packed(heads.keys, keys), packed(heads.keys, keys)
    out, statistics = graph.sdpa(q=query, k=key, v=value, generate_stats=True, **_causal(bounds, sizes))
    _give_out(out, bounds, heads.queries, heads.size, queries)
    _give_out(statistics, bounds, heads.queries, 1, rows)
    statistics.set_data_type(_type_of(torch.float32))
    return _Plan(device, graph, [*borders, query, key, value, out, statistics])


@cache
def _backward_plan(device: torch.device, bounds: Bounds, tokens: int, deterministic: bool) -> _Plan:
    """tokens: the most of a microbatch, which its workspace is for."""
    graph, borders, packed = _begin(device, bounds)
    sizes, queries, keys, rows = borders
    heads = bounds.heads
    operands = [(heads.queries, queries), (heads.keys, keys), (heads.keys, keys)]
    query, key, value, out, gradient = (packed(*operand) for operand in (*operands, operands[0], operands[0]))
    dim, stride = _packed(bounds, heads.queries, 1)
    statistics = graph.tensor(dim=dim, stride=stride, data_type=_type_of(torch.float32), ragged_offset=rows)
    gradients = graph.sdpa_backward(
        q=query, k=key, v=value, o=out, dO=gradient, stats=statistics, max_total_seq_len_q=tokens,
        max_total_seq_len_kv=tokens, use_deterministic_algorithm=deterministic, **_causal(bounds, sizes),
    )  # fmt: skip
    for tensor, (count, starts) in zip(gradients, operands, strict=True):
        _give_out(tensor, bounds, count, heads.size, starts)
    return _Plan(device, graph, [*borders, query, key, value, out, statistics, gradient, *gradients])


def _begin(device: torch.device, bounds: Bounds) -> tuple[Any, list[Any], Callable[[int, Any], Any]]:
    """A cuDNN graph; the tensors of `RaggedBorders` in it; what adds a packed tensor, of so many heads, with the places
    where samples begin."""
    import cudnn

    graph = cudnn.pygraph(io_data_type=_type_of(bounds.dtype), intermediate_data_type=_type_of(torch.float32),
                          compute_data_type=_type_of(torch.float32), handle=_handle(device))  # fmt: skip
    borders = [
        graph.tensor(dim=[count, 1, 1, 1], stride=[1, 1, 1, 1], data_type=_type_of(torch.int32))
        for count in (bounds.samples, *[bounds.samples + 1] * 3)
    ]

    def packed(heads: int, starts: Any) -> Any:
        dim, stride = _packed(bounds, heads, bounds.heads.size)
        return graph.tensor(dim=dim, stride=stride, data_type=_type_of(bounds.dtype), ragged_offset=starts)

    return graph, borders, packed


def _causal(bounds: Bounds, sizes: Any) -> dict[str, Any]:
    import cudnn

    return {"attn_scale": bounds.scaling, "use_padding_mask": True, "seq_len_q": sizes, "seq_len_kv": sizes,
            "diagonal_alignment": cudnn.diagonal_alignment.TOP_LEFT, "diagonal_band_right_bound": 0}  # fmt: skip


def _give_out(tensor: Any, bounds: Bounds, heads: int, size: int, starts: Any) -> None:
    dim, stride = _packed(bounds, heads, size)
    tensor.set_output(True).set_dim(dim).set_stride(stride)
    tensor.set_ragged_offset(starts)


def _packed(bounds: Bounds, heads: int, size: int) -> tuple[list[int], list[int]]:
    """Dimensions and strides of [T, heads, size] as samples of the longest; the stride between them is not read."""
    samples, longest = bounds.samples, bounds.longest
    return [samples, heads, longest, size], [longest * heads * size, size, heads * size, 1]


def _type_of(dtype: torch.dtype) -> Any:
    import cudnn

    names = {torch.bfloat16: "BFLOAT16", torch.float16: "HALF", torch.float32: "FLOAT", torch.int32: "INT32"}
    return getattr(cudnn.data_type, names[dtype])
