"""A microbatch as tensors: samples packed end to end, with their borders, labels, weights and adapters."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from fused_lora import LoRABatch, LoRASegment
from fused_lora.adapters import NO_ADAPTER
from lorafusion.core.plan import Bucket, Microbatch
from lorafusion.core.schema import UserError
from lorafusion.core.workload import Job, Sample, Workload
from lorafusion.data.tokens import Tokens, TokenSource

IGNORE = -100  # the label of a token after which nothing is to be predicted
ROWS = 16  # tokens of which logits are made are a multiple of it, so that their products have few shapes


@dataclass(frozen=True)
class SampleBorders:
    """Where the samples of a microbatch begin and end.

    offsets: int32 [samples + 1], token offsets from 0 to the microbatch's length, on the device of the run; in a bucket
        empty samples follow, up to the most that a microbatch of it has.
    lengths: the samples' tokens, known on the host so that nothing waits for the device.
    longest: the tokens of the longest, or of the longest that the bucket has.
    """

    offsets: torch.Tensor
    lengths: tuple[int, ...]
    longest: int

    @classmethod
    def of(cls, lengths: Sequence[int], device: torch.device) -> SampleBorders:
        offsets = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)
        return cls(offsets.to(device, non_blocking=True), tuple(lengths), max(lengths))


@dataclass(frozen=True)
class AdapterSegment(LoRASegment):
    """The tokens [start, stop) of one adapter, and which of its global batches they belong to."""

    batch: int


@dataclass(frozen=True)
class PackedBatch:
    """T tokens of a microbatch, padding included, which has the label IGNORE: that of a row comes after the tokens of
    its sample, that of a bucket is the last sample, of no adapter.

    input_ids int64 [1, T]; position_ids int64 [1, T], from 0 in each sample; labels int64 [T], the next token of the
    sample; weights float64 [T], one over the label tokens of the adapter's global batch. lora: whose tokens are where;
    adapters are indices of the workload's jobs. segments: the same, known on the host. rows int64 [R], rising: the
    tokens of which logits are made, all that have a label among them; None: all tokens.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    labels: torch.Tensor
    weights: torch.Tensor
    borders: SampleBorders
    lora: LoRABatch
    segments: tuple[AdapterSegment, ...]
    rows: torch.Tensor | None = None

    @property
    def positions(self) -> torch.Tensor:
        """int64 [T], each token's place in its adapter's own stream, which the dropout masks are drawn from."""
        return self.lora.positions

    @property
    def tensors(self) -> list[torch.Tensor]:
        """All that a device needs of it. Those of the microbatches of a bucket have the same shapes."""
        tensors = [self.input_ids, self.position_ids, self.labels, self.weights, self.borders.offsets]
        tensors += [self.lora.offsets, self.lora.adapters, self.lora.positions]
        return tensors if self.rows is None else [*tensors, self.rows]

    def of(self, tensors: Sequence[torch.Tensor]) -> PackedBatch:
        """The same microbatch, of other tensors."""
        ids, places, labels, weights, borders, offsets, adapters, positions, *rows = tensors
        lora = LoRABatch(offsets, adapters, positions)
        borders = replace(self.borders, offsets=borders)
        return PackedBatch(ids, places, labels, weights, borders, lora, self.segments, *rows)

    def on(self, device: torch.device) -> PackedBatch:
        """The same microbatch on a device, which nobody waits for."""
        return self.of([tensor.to(device, non_blocking=True) for tensor in self.tensors])


class BatchBuilder:
    """Builds the tensors of any microbatch of a workload, on the host, for a device to copy."""

    def __init__(self, workload: Workload, source: TokenSource, device: torch.device) -> None:
        self.workload, self.source, self.device = workload, source, device
        self._labels: dict[tuple[int, int], int] = {}  # of a job's global batches

    def build(self, microbatch: Microbatch, bucket: Bucket | None = None, rows: int | None = None) -> PackedBatch:
        """The tensors of a microbatch that is not a no-op; bucket: that it is padded to, if there is one; rows: the
        `logit_rows` of the bucket. Raises `UserError` for samples of another length than the workload says."""
        parts = _Parts()
        for part in microbatch.segments:
            job = self.workload.jobs[part.adapter]
            batch = job.batch_of(part.samples[0])
            weight = 1.0 / self.label_tokens(part.adapter, batch)
            start = parts.length
            for position in part.samples:
                tokens = self._tokens(job, job.sample_at(position))
                parts.add(*tokens, weight, job.stream_offset(position), microbatch.row_tokens)
            parts.segments.append(AdapterSegment(start, parts.length, part.adapter, batch))
        if microbatch.padding:
            parts.pad(microbatch.padding)
        return self._tensors(parts, bucket, rows)

    def logit_rows(self, bucket: Bucket, microbatches: Iterable[Microbatch]) -> int | None:
        """Of how many tokens logits are made, in all of a plan's microbatches that are in a bucket; None: of all."""
        most = prompts = 0
        for microbatch in microbatches:
            if microbatch.bucket == bucket.tokens:
                learnt = [
                    self.source.labels(job, job.sample_at(position))
                    for part in microbatch.segments
                    for job in [self.workload.jobs[part.adapter]]
                    for position in part.samples
                ]
                prompts += microbatch.tokens - len(learnt) - sum(learnt)
                most = max(most, sum(learnt))
        return _logit_rows(most, prompts, bucket.tokens)

    def label_tokens(self, adapter: int, batch: int) -> int:
        """Tokens of one of a job's global batches that are learnt."""
        if (adapter, batch) not in self._labels:
            job = self.workload.jobs[adapter]
            samples = [job.sample_at(position) for position in job.batches[batch]]
            self._labels[adapter, batch] = sum(self.source.labels(job, sample) for sample in samples)
        return self._labels[adapter, batch]

    def evaluations(self, adapter: int, capacity: int) -> list[PackedBatch]:
        """A job's evaluation samples in as few batches as they fit in one after another; their losses, weighted, add up
        to the mean over all label tokens."""
        job = self.workload.jobs[adapter]
        weight = 1.0 / max(1, sum(self.source.labels(job, sample) for sample in job.evaluation))
        batches: list[_Parts] = []
        for sample in job.evaluation:
            if not batches or batches[-1].length + sample.tokens > capacity:
                batches.append(_Parts())
            batches[-1].add(*self._tokens(job, sample), weight, batches[-1].length)
        for parts in batches:
            parts.segments.append(AdapterSegment(0, parts.length, adapter, 0))
        return [self._tensors(parts).on(self.device) for parts in batches]

    def _tensors(self, parts: _Parts, bucket: Bucket | None = None, rows: int | None = None) -> PackedBatch:
        """A batch that a GPU can copy: a copy from other memory waits for it where it is larger than 64 KiB."""
        if bucket is None:
            rows = _logit_rows(parts.learnt, parts.prompts, parts.length)
        batch = parts.packed(bucket, rows)
        return batch.of([tensor.pin_memory() for tensor in batch.tensors]) if self.device.type == "cuda" else batch

    def _tokens(self, job: Job, sample: Sample) -> Tokens:
        tokens = self.source.tokens(job, sample)
        if len(tokens.ids) != sample.tokens:
            raise UserError(
                f"dataset {job.dataset}: sample {sample.id} of {job.name!r} has {len(tokens.ids)} tokens, "
                f"the workload says {sample.tokens}; make the workload again"
            )
        return tokens


class _Parts:
    """A batch that samples are added to."""

    def __init__(self) -> None:
        self.ids: list[torch.Tensor] = []
        self.labels: list[torch.Tensor] = []
        self.weights: list[torch.Tensor] = []
        self.places: list[torch.Tensor] = []
        self.positions: list[torch.Tensor] = []
        self.segments: list[AdapterSegment] = []
        self.lengths: list[int] = []
        self.length = 0
        self.learnt = self.prompts = 0  # tokens that are labels, and those before them but each sample's first

    def add(
        self, ids: torch.Tensor, first_label: int, weight: float, stream_offset: int, row_tokens: int | None = None
    ) -> None:
        """Add a sample; row_tokens: that it is padded to."""
        padding = 0 if row_tokens is None else row_tokens - len(ids)
        labels = torch.cat([ids[1:], torch.full((1 + padding,), IGNORE)])
        labels[: first_label - 1] = IGNORE
        ids = F.pad(ids, (0, padding))
        place = torch.arange(len(ids))
        self.ids.append(ids)
        self.labels.append(labels)
        self.weights.append(torch.full((len(ids),), weight, dtype=torch.float64))
        self.places.append(place)
        self.positions.append(place + stream_offset)
        self.lengths.append(len(ids))
        self.length += len(ids)
        self.learnt += len(ids) - padding - first_label
        self.prompts += first_label - 1

    def pad(self, tokens: int) -> None:
        """Add a sample that nothing is learnt from. Its tokens are all at place 0: it may be longer than any text."""
        zeros = torch.zeros(tokens, dtype=torch.int64)
        for parts in (self.ids, self.places, self.positions):
            parts.append(zeros)
        self.labels.append(torch.full((tokens,), IGNORE))
        self.weights.append(zeros.double())
        self.lengths.append(tokens)
        self.length += tokens

    def packed(self, bucket: Bucket | None, rows: int | None) -> PackedBatch:
        """bucket: has the samples and segments, some of them empty, that the batch gets; rows: tokens of which logits
        are made, as many as there are labels or more."""
        lora = LoRABatch.of(self.segments, torch.cat(self.positions))
        borders = SampleBorders.of(self.lengths, lora.positions.device)
        if bucket is not None:
            # One segment more than there are adapters: the padding's.
            lora = LoRABatch(
                _filled(lora.offsets, bucket.segments + 2, self.length),
                _filled(lora.adapters, bucket.segments + 1, NO_ADAPTER),
                lora.positions,
            )
            offsets = _filled(borders.offsets, bucket.samples + 1, self.length)
            borders = replace(borders, offsets=offsets, longest=bucket.longest)
        labels = torch.cat(self.labels)
        return PackedBatch(
            input_ids=torch.cat(self.ids)[None],
            position_ids=torch.cat(self.places)[None],
            labels=labels,
            weights=torch.cat(self.weights),
            borders=borders,
            lora=lora,
            segments=tuple(self.segments),
            rows=None if rows is None else (labels == IGNORE).byte().argsort(stable=True)[:rows].sort().values,
        )


def _logit_rows(labels: int, prompts: int, tokens: int) -> int | None:
    """Of how many of a microbatch's tokens logits are made; None: of all. prompts: tokens of prompts. Without any all
    tokens have a label but the last of each sample and padding; it is not worth it to gather the others."""
    rows = -(-labels // ROWS) * ROWS
    return rows if prompts and rows < tokens else None


def _filled(values: torch.Tensor, count: int, value: int) -> torch.Tensor:
    """A vector with as many of a value at its end that it has so many elements."""
    return F.pad(values, (0, count - len(values)), value=value)
