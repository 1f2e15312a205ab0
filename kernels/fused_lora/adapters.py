"""What the LoRA linear is told beside its tensors: the adapters, and which tokens of a batch are whose.

`LoRAAdapter` and `LoRASegment` are how a person says it. `AdapterTable` and `LoRABatch` are the same as small tensors
on the device, which is how kernels read it: a table is made once for a set of adapters, a batch once for a microbatch,
and nothing is copied or waited for when a linear runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch._subclasses import FakeTensor

from fused_lora.philox import check_key, drop_threshold

Tensors = Sequence[torch.Tensor]
NO_ADAPTER = -1
MOST_TABLES = 16  # of one module, for so many sets of scalings and dropouts


@dataclass(frozen=True)
class LoRASegment:
    """The tokens [start, stop) of a batch that belong to one adapter; `adapter` is its index."""

    start: int
    stop: int
    adapter: int


@dataclass(frozen=True, eq=False)
class LoRAAdapter:
    """One adapter of a linear: a [r, K], b [N, r]; scaling is alpha/r or alpha/sqrt(r); key from `mask_key`."""

    a: torch.Tensor
    b: torch.Tensor
    scaling: float
    dropout: float = 0.0
    key: int = 0

    @property
    def rank(self) -> int:
        return self.a.shape[0]


@dataclass(frozen=True, eq=False)
class LoRABatch:
    """The tokens of a batch on the device. The tensors may be overwritten between two runs, as a CUDA graph needs it.

    offsets: int32 [n + 1], rising, within [0, M]: segment i is the tokens [offsets[i], offsets[i + 1]).
    adapters: int32 [n], the segments' adapters; -1 for tokens without one.
    positions: int64 [M], each token's place in its adapter's own stream, which dropout masks are drawn from; or
        int64 [1], the place of the first token, the others following it.
    """

    offsets: torch.Tensor
    adapters: torch.Tensor
    positions: torch.Tensor

    @classmethod
    def of(cls, segments: Sequence[LoRASegment], positions: torch.Tensor) -> LoRABatch:
        """From segments in order and apart; raises ValueError naming the one that is not."""
        offsets, adapters = [0], []
        for index, segment in enumerate(segments):
            if not offsets[-1] <= segment.start <= segment.stop:
                span = f"[{segment.start}, {segment.stop})"
                raise ValueError(f"segments[{index}]: expected a span from {offsets[-1]}, in order, found {span}")
            if segment.start > offsets[-1]:
                offsets.append(segment.start)
                adapters.append(NO_ADAPTER)
            offsets.append(segment.stop)
            adapters.append(segment.adapter)
        device = positions.device
        return cls(_int32(offsets, device), _int32(adapters, device), positions)

    @classmethod
    def single(cls, tokens: int, position: torch.Tensor) -> LoRABatch:
        """All tokens for adapter 0; position: int64 [1] or [tokens]."""
        return cls.of([LoRASegment(0, tokens, 0)], position)

    def segments(self) -> list[LoRASegment]:
        """Those with an adapter, as a person says it; waits for the device."""
        offsets = self.offsets.tolist()
        spans = zip(offsets, offsets[1:], self.adapters.tolist(), strict=False)
        return [LoRASegment(start, stop, adapter) for start, stop, adapter in spans if adapter != NO_ADAPTER]


@dataclass(frozen=True, eq=False)
class AdapterTable:
    """What kernels must know of G adapters on P linears that share their input. The tensors lie on the device.

    ranks: the rank of each adapter on each linear, [P][G], 0 where it has no factors there.
    total_ranks: the rows of a that each linear has. max_rank, dropout: the largest of all.
    scalings: float32 [P, G], float64 on a CPU. factors: the same, scaling / (1 - p).
    thresholds: int32 [P, G], numbers below which an element is dropped. keys: int64 [P, G], Philox's, signed.
    rank_offsets: int32 [P, G + 1], rows of the adapters' a stacked, linear after linear.
    """

    ranks: tuple[tuple[int, ...], ...]
    total_ranks: list[int]
    max_rank: int
    dropout: float
    scalings: torch.Tensor
    factors: torch.Tensor
    thresholds: torch.Tensor
    keys: torch.Tensor
    rank_offsets: torch.Tensor

    @classmethod
    @torch.inference_mode(False)  # a table made in an evaluation serves training, too
    def of(cls, adapters: Sequence[Sequence[LoRAAdapter | None]], device: torch.device) -> AdapterTable:
        """From the adapters of each linear, None where one has no factors. Raises ValueError naming a bad one."""
        checked = [[_settings(f"adapters[{i}]", adapter) for i, adapter in enumerate(row)] for row in adapters]
        precision = torch.float64 if torch.device(device).type == "cpu" else torch.float32
        ranks = tuple(tuple(adapter.rank if adapter is not None else 0 for adapter in row) for row in adapters)
        offsets, first = [], 0
        for row in ranks:
            offsets.append([first])
            for rank in row:
                first += rank
                offsets[-1].append(first)
        scalings = [[scaling for scaling, _, _ in row] for row in checked]
        factors = [[scaling / (1.0 - p) for scaling, p, _ in row] for row in checked]
        thresholds = [[drop_threshold(p) for _, p, _ in row] for row in checked]
        return cls(
            ranks=ranks,
            total_ranks=[sum(row) for row in ranks],
            max_rank=max([0, *(rank for row in ranks for rank in row)]),  # torch.compile knows no `default`
            dropout=max([0.0, *(p for row in checked for _, p, _ in row)]),
            scalings=torch.tensor(scalings, dtype=torch.float64).to(device, precision),
            factors=torch.tensor(factors, dtype=torch.float64).to(device, precision),
            thresholds=_int32(thresholds, device),
            keys=torch.tensor([[_signed(key) for _, _, key in row] for row in checked], dtype=torch.int64).to(device),
            rank_offsets=_int32(offsets, device),
        )


class Operands(NamedTuple):
    """The tensors of one call that belong to its adapters and its batch, for G adapters on P linears.

    a [R, K]: the adapters' a stacked, linear after linear. b [sum of N_p R_p]: each [N_p, r] flat, in the same order.
    scales [P, G]: factors or scalings of an `AdapterTable`, which also explains thresholds, keys and rank_offsets.
    offsets, adapters, positions: as in `LoRABatch`.
    """

    a: torch.Tensor
    b: torch.Tensor
    scales: torch.Tensor
    thresholds: torch.Tensor
    keys: torch.Tensor
    rank_offsets: torch.Tensor
    offsets: torch.Tensor
    adapters: torch.Tensor
    positions: torch.Tensor


class Settings(NamedTuple):
    """What the host knows of the same call. ranks: the rows of a of each linear, R_p. max_rank: of any adapter.
    masked: is there dropout?"""

    ranks: list[int]
    max_rank: int
    masked: bool


class AdapterTables:
    """The tables of one module's adapters, kept since making one copies to the device. A copy of it is empty.

    There is a table for each device and each set of ranks, scalings and dropouts: they may change at any time. None is
    given up, as a captured CUDA graph may read it; when there are `MOST_TABLES`, further ones are made at each call.
    """

    def __init__(self) -> None:
        self._kept: dict[tuple, AdapterTable] = {}

    def of(self, adapters: Sequence[Sequence[LoRAAdapter]], x: torch.Tensor) -> AdapterTable:
        """The table for a call with x."""
        setting = (x.device, *((lora.rank, lora.scaling, lora.dropout) for row in adapters for lora in row))
        table = self._kept.get(setting)
        if table is None or isinstance(x, FakeTensor):
            table = AdapterTable.of(adapters, x.device)
            # Fake ones, as of a FakeTensorMode, serve no other call.
            if len(self._kept) < MOST_TABLES and not isinstance(table.keys, FakeTensor):
                self._kept.setdefault(setting, table)
        return table

    def __reduce__(self):
        return AdapterTables, ()  # its tensors may be loaded onto another device


def rank_width(max_rank: int) -> int:
    """Columns of s: aligned, so that kernels read whole vectors."""
    return -(-max_rank // 16) * 16


def _settings(name: str, adapter: LoRAAdapter | None) -> tuple[float, float, int]:
    """Scaling, dropout and key, checked."""
    if adapter is None:
        return 0.0, 0.0, 0
    try:
        drop_threshold(adapter.dropout)
        check_key(adapter.key)
    except ValueError as error:
        raise ValueError(f"{name}.{error}") from None
    if not 1 <= adapter.rank <= 256:
        raise ValueError(f"{name}.a: expected a rank from 1 to 256, found {list(adapter.a.shape)}")
    if not abs(adapter.scaling) < float("inf"):
        raise ValueError(f"{name}.scaling: expected a finite number, found {adapter.scaling}")
    return adapter.scaling, adapter.dropout, adapter.key


def _signed(key: int) -> int:
    return key - (1 << 64) if key >= 1 << 63 else key


def _int32(values: list, device: torch.device) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32).to(device, non_blocking=True)
