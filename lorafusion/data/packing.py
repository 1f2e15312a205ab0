"""A microbatch as tensors: samples packed end to end, with their borders, labels, weights and adapters."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch

from fused_lora import LoRABatch, LoRASegment
from lorafusion.data.tokens import TokenSource
from lorafusion.errors import UserError
from lorafusion.plan import Microbatch
from lorafusion.workload import Workload

IGNORE = -100  # the label of a token after which nothing is to be predicted


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


@dataclass(frozen=True)
class AdapterSegment(LoRASegment):
    """The tokens [start, stop) of one adapter, and which of its global batches they belong to."""

    batch: int


@dataclass(frozen=True)
class PackedBatch:
    """T tokens of a microbatch.

    input_ids int64 [1, T]; position_ids int64 [1, T], from 0 in each sample; labels int64 [T], the next token of the
    sample; weights float32 [T], one over the label tokens of the adapter's global batch; positions int64 [T], the
    token's place in its adapter's own stream, which the dropout masks are drawn from.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    labels: torch.Tensor
    weights: torch.Tensor
    positions: torch.Tensor
    borders: SampleBorders
    segments: tuple[AdapterSegment, ...]

    @cached_property
    def adapters(self) -> tuple[int, ...]:
        """The adapters of the microbatch, as indices of the workload's jobs."""
        return tuple(sorted({segment.adapter for segment in self.segments}))

    @cached_property
    def lora(self) -> LoRABatch:
        """Whose tokens are where, on the device; adapters are counted within `adapters`."""
        places = {adapter: place for place, adapter in enumerate(self.adapters)}
        segments = [LoRASegment(one.start, one.stop, places[one.adapter]) for one in self.segments]
        return LoRABatch.of(segments, self.positions)


class BatchBuilder:
    """Builds the tensors of any microbatch of a workload on a device."""

    def __init__(self, workload: Workload, source: TokenSource, device: torch.device) -> None:
        self.workload = workload
        self.source = source
        self.device = device

    def build(self, microbatch: Microbatch) -> PackedBatch:
        """The tensors of a microbatch that is not a no-op."""
        tokens, labels, weights, places, positions = [], [], [], [], []
        segments, lengths = [], []
        for part in microbatch.segments:
            job = self.workload.jobs[part.adapter]
            batch = job.batch_of(part.samples[0])
            weight = 1.0 / job.label_tokens(batch)
            start = sum(lengths)
            for position in part.samples:
                ids = self._tokens(part.adapter, position)
                place = torch.arange(len(ids))
                tokens.append(ids)
                labels.append(torch.cat([ids[1:], torch.tensor([IGNORE])]))
                weights.append(torch.full((len(ids),), weight, dtype=torch.float32))
                places.append(place)
                positions.append(place + job.stream_offset(position))
                lengths.append(len(ids))
            segments.append(AdapterSegment(start, sum(lengths), part.adapter, batch))
        return PackedBatch(
            input_ids=self._joined(tokens)[None],
            position_ids=self._joined(places)[None],
            labels=self._joined(labels),
            weights=self._joined(weights),
            positions=self._joined(positions),
            borders=SampleBorders(self._offsets(lengths), max(lengths)),
            segments=tuple(segments),
        )

    def _tokens(self, adapter: int, position: int) -> torch.Tensor:
        job = self.workload.jobs[adapter]
        ids = self.source.tokens(job, position)
        sample = job.sample_at(position)
        if len(ids) != sample.tokens:
            raise UserError(
                f"dataset {job.dataset}: sample {sample.id} of {job.name!r} has {len(ids)} tokens, "
                f"the workload says {sample.tokens}; make the workload again"
            )
        return ids

    def _joined(self, parts: list[torch.Tensor]) -> torch.Tensor:
        return torch.cat(parts).to(self.device, non_blocking=True)

    def _offsets(self, lengths: list[int]) -> torch.Tensor:
        offsets = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)
        return offsets.to(self.device, non_blocking=True)
