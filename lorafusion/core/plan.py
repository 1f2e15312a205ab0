"""Who computes what, in which order, and when each optimizer steps; and the one checker that every plan passes.

A plan is data with a content hash. Systems differ in how they make it and in how they execute it, not in what it is.

Words: a *slot* is what one pipeline takes in one turn: one microbatch, or one for each data-parallel replica
(microbatch i goes to replica i mod D in slot i // D). A *no-op* keeps its slot and computes nothing. A plan with
`flush` drains the pipeline after each slot that steps an optimizer (Megatron's 1F1B); without it the stream never
stops (LoRAFusion, mLoRA).

The dependency rule (the bubble lemma of arXiv 2510.00206): in 1F1B with S stages, stage 0 runs the forward of slot k
after the backward of slot k-S. So samples of an adapter's global batch j+1 see the weights of batch j's step exactly
when the first of them enters at least S slots after the last one of batch j.

A plan for stages that replay CUDA graphs has *buckets*: the few token counts that graphs are captured for. A microbatch
is padded to the smallest that holds it, by tokens without an adapter in a sample of their own, the last one.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Final, Literal

from pydantic import Field

from lorafusion.core.schema import MOST_PROCESSES, MOST_STAGES, MOST_TOKENS, Data, Float, Int, UserError, validated
from lorafusion.core.workload import Job, Workload, content_hash, read_versioned

VERSION: Final = 1


class PlanError(UserError):
    """A plan that would not train its workload exactly."""


class Segment(Data):
    """Consecutive tokens of one adapter in a microbatch: whole samples, in this order."""

    adapter: Int = Field(ge=0, description="index of the job in the workload")
    samples: tuple[Int, ...] = Field(min_length=1, description="positions in the job's stream")
    tokens: Int = Field(ge=1, le=MOST_TOKENS)


class Microbatch(Data):
    """What passes through the pipeline at once; `step_after` names the adapters that step after its backward."""

    segments: tuple[Segment, ...] = ()
    step_after: tuple[Int, ...] = ()
    noop: bool = False
    row_tokens: Int | None = Field(
        default=None,
        ge=1,
        le=MOST_TOKENS,
        description="tokens that each sample is padded to; none packs them end to end",
    )
    bucket: Int | None = Field(
        default=None,
        ge=1,
        le=MOST_TOKENS,
        exclude_if=lambda bucket: bucket is None,
        description="tokens that the whole is padded to, of one of the plan's buckets; none of a plan without graphs",
    )

    @property
    def tokens(self) -> int:
        """Real tokens."""
        return sum(segment.tokens for segment in self.segments)

    @property
    def rows(self) -> int:
        """Samples."""
        return sum(len(segment.samples) for segment in self.segments)

    @property
    def sample_tokens(self) -> int:
        """Tokens of its samples, each with the padding of its row."""
        return self.tokens if self.row_tokens is None else self.rows * self.row_tokens

    @property
    def padding(self) -> int:
        """Tokens of the sample without an adapter that fills its bucket; 0: there is none."""
        return 0 if self.bucket is None else self.bucket - self.sample_tokens

    @property
    def length(self) -> int:
        """Tokens that pass through the model, padding included."""
        return self.sample_tokens if self.bucket is None else self.bucket


class Bucket(Data):
    """A token count that graphs are captured for, and bounds of all microbatches that are padded to it."""

    tokens: Int = Field(ge=1, le=MOST_TOKENS)
    samples: Int = Field(ge=1, le=MOST_TOKENS, description="the most of a microbatch, that of the padding counted")
    segments: Int = Field(ge=1, le=MOST_TOKENS, description="the most of a microbatch")
    longest: Int = Field(ge=1, le=MOST_TOKENS, description="tokens of the longest sample, the padding's included")


class Statistics(Data):
    """What a plan says of itself; derived, so not part of its hash."""

    tokens: Int
    microbatches: Int = Field(description="no-ops included")
    noops: Int
    lower_bound: Int = Field(description="microbatches without which the tokens do not fit: ceil(tokens/capacity)")
    fill: Float = Field(
        description="real tokens over the capacity of all microbatches, no-ops included; padding fills nothing"
    )


class Plan(Data):
    """An order of microbatches for a workload on a number of pipeline stages."""

    version: Literal[1] = VERSION
    system: str
    workload_hash: str
    stages: Int = Field(ge=1, le=MOST_STAGES)
    data_parallel: Int = Field(default=1, ge=1, le=MOST_PROCESSES)
    capacity: Int = Field(ge=1, le=MOST_TOKENS, description="tokens that a microbatch may hold")
    flush: bool = False
    buckets: tuple[Bucket, ...] = Field(
        default=(), exclude_if=lambda buckets: not buckets, description="rising; empty: stages run without graphs"
    )
    microbatches: tuple[Microbatch, ...] = Field(min_length=1)
    statistics: Statistics
    key: str | None = Field(default=None, description="`lorafusion.planning.plan_key`, of a plan of a system")

    @cached_property
    def content_hash(self) -> str:
        return content_hash(self.model_dump(exclude={"statistics", "key"}))

    def to_json(self) -> str:
        return json.dumps(self.model_dump(exclude_defaults=True) | {"version": VERSION}) + "\n"

    @classmethod
    def read(cls, path: str | Path) -> Plan:
        """Read a plan file; `UserError` names the file and the key that is wrong."""
        return validated(cls, read_versioned(path, VERSION, "plan"), path)

    def slots(self) -> list[tuple[Microbatch, ...]]:
        """The microbatches of each slot, one for each data-parallel replica."""
        width = self.data_parallel
        return [self.microbatches[i : i + width] for i in range(0, len(self.microbatches), width)]

    def stepping(self) -> list[list[int]]:
        """The adapters that step after each slot."""
        return [[adapter for microbatch in slot for adapter in microbatch.step_after] for slot in self.slots()]


def make_plan(
    system: str,
    workload: Workload,
    microbatches: list[Microbatch],
    *,
    stages: int,
    capacity: int,
    data_parallel: int = 1,
    flush: bool = False,
    buckets: tuple[Bucket, ...] = (),
) -> Plan:
    """A checked plan with its statistics. Raises `PlanError` where the order is not exact."""
    plan = Plan(
        system=system,
        workload_hash=workload.content_hash,
        stages=stages,
        data_parallel=data_parallel,
        capacity=capacity,
        flush=flush,
        buckets=buckets,
        microbatches=tuple(microbatches),
        statistics=statistics_of(microbatches, capacity),
    )
    check(plan, workload)
    return plan


def statistics_of(microbatches: Sequence[Microbatch], capacity: int) -> Statistics:
    """The statistics that a plan with these microbatches must state."""
    tokens = sum(microbatch.tokens for microbatch in microbatches)
    return Statistics(
        tokens=tokens,
        microbatches=len(microbatches),
        noops=sum(microbatch.noop for microbatch in microbatches),
        lower_bound=-(-tokens // capacity),
        fill=tokens / (capacity * len(microbatches)),
    )


def check(plan: Plan, workload: Workload, source: str | Path = "plan") -> None:
    """Raise `PlanError` with the first rule that a plan breaks, and the number of breaches."""
    breaches = violations(plan, workload)
    if breaches:
        more = f" (and {len(breaches) - 1} more)" if len(breaches) > 1 else ""
        raise PlanError(f"{source}: {breaches[0]}{more}")


def violations(plan: Plan, workload: Workload) -> list[str]:
    """Every breach of the rules, one line each; empty for a plan that trains its workload exactly."""
    if plan.workload_hash != workload.content_hash:
        return [f"made for workload {plan.workload_hash}, but this one is {workload.content_hash}"]
    if len(plan.microbatches) % plan.data_parallel:
        return [f"{len(plan.microbatches)} microbatches do not fill slots of {plan.data_parallel} replicas"]
    if plan.statistics != statistics_of(plan.microbatches, plan.capacity):
        return ["its statistics are not those of its microbatches"]
    breaches = _microbatch_violations(plan, workload) or _bucket_violations(plan, workload)
    return breaches or _order_violations(plan, workload)


def _microbatch_violations(plan: Plan, workload: Workload) -> list[str]:
    """What is wrong within a microbatch: references, token counts, capacity, the form of a no-op."""
    breaches = []
    for index, microbatch in enumerate(plan.microbatches):
        where = f"microbatch {index}"
        if microbatch.noop and (microbatch.segments or microbatch.step_after):
            breaches.append(f"{where}: a no-op holds no samples and steps no optimizer")
        if not microbatch.noop and not microbatch.segments:
            breaches.append(f"{where}: holds no samples and is not marked as a no-op")
        if microbatch.length > plan.capacity:
            breaches.append(f"{where}: {microbatch.length} tokens exceed the capacity of {plan.capacity}")
        adapters = [segment.adapter for segment in microbatch.segments]
        if len(set(adapters)) < len(adapters):
            breaches.append(f"{where}: two segments of one adapter")
        for adapter in (*adapters, *microbatch.step_after):
            if not 0 <= adapter < len(workload.jobs):
                breaches.append(f"{where}: adapter {adapter}, but the workload has {len(workload.jobs)}")
                return breaches
        for segment in microbatch.segments:
            problems = _segment_violations(segment, workload, microbatch.row_tokens)
            breaches += [f"{where}: {problem}" for problem in problems]
    return breaches


def _segment_violations(segment: Segment, workload: Workload, row_tokens: int | None) -> list[str]:
    job = workload.jobs[segment.adapter]
    stream = range(job.first_position, job.stream_length)
    outside = [position for position in segment.samples if position not in stream]
    if outside:
        return [f"sample {outside[0]} of {job.name!r}, whose stream has {stream.start} to {stream.stop - 1}"]
    lengths = job.lengths_at(segment.samples)
    if sum(lengths) != segment.tokens:
        return [f"{job.name!r} declares {segment.tokens} tokens, its samples have {sum(lengths)}"]
    if row_tokens is not None and max(lengths) > row_tokens:
        return [f"a sample of {job.name!r} has {max(lengths)} tokens, its row {row_tokens}"]
    return []


def bounds_of(microbatch: Microbatch, workload: Workload) -> Bucket:
    """The least bucket of its tokens for a microbatch that is no no-op."""
    lengths = [
        microbatch.row_tokens or tokens
        for segment in microbatch.segments
        for tokens in workload.jobs[segment.adapter].lengths_at(segment.samples)
    ] + [microbatch.padding] * (microbatch.padding > 0)
    return Bucket(tokens=microbatch.length, samples=len(lengths), segments=len(microbatch.segments),
                  longest=max(lengths))  # fmt: skip


def _bucket_violations(plan: Plan, workload: Workload) -> list[str]:
    """What is wrong with the buckets: their order, microbatches in another than the smallest that holds them, and
    bounds that are broken."""
    sizes = [bucket.tokens for bucket in plan.buckets]
    if sizes != sorted(set(sizes)):
        return [f"buckets of {sizes} tokens, expected rising ones"]
    breaches, buckets = [], dict(zip(sizes, plan.buckets, strict=True))
    for index, microbatch in enumerate(plan.microbatches):
        held = microbatch.sample_tokens
        expected = None if microbatch.noop else next((size for size in sizes if size >= held), None)
        if microbatch.bucket != expected:
            breaches.append(f"microbatch {index}: {held} tokens, bucket {microbatch.bucket}, expected {expected}")
        elif expected is not None:
            most = dict(buckets[expected])
            breaches += [
                f"microbatch {index}: {name} {value}, its bucket of {expected} tokens has {most[name]} at most"
                for name, value in bounds_of(microbatch, workload)
                if value > most[name]
            ]
        elif sizes and not microbatch.noop:
            breaches.append(f"microbatch {index}: {held} tokens, the largest bucket has {sizes[-1]}")
    return breaches


def _order_violations(plan: Plan, workload: Workload) -> list[str]:
    """What is wrong between microbatches: samples missing or repeated, steps, the dependency rule."""
    parts: list[list[tuple[int, Segment]]] = [[] for _ in workload.jobs]
    steps: list[list[int]] = [[] for _ in workload.jobs]
    for slot, replicas in enumerate(plan.slots()):
        for microbatch in replicas:
            for segment in microbatch.segments:
                parts[segment.adapter].append((slot, segment))
            for adapter in microbatch.step_after:
                steps[adapter].append(slot)
    return [breach for each in zip(workload.jobs, parts, steps, strict=True) for breach in _job_violations(plan, *each)]


def _job_violations(plan: Plan, job: Job, parts: list[tuple[int, Segment]], steps: list[int]) -> list[str]:
    """The same of a job. parts: its segments, each with its slot, in order; steps: slots after which it steps."""
    breaches, seen = [], set[int]()
    first, last = dict[int, int](), dict[int, int]()  # slot of each global batch
    for slot, segment in parts:
        for position in segment.samples:
            if position in seen:
                breaches.append(f"slot {slot}: sample {position} of {job.name!r} comes twice")
            seen.add(position)
        begin, end = job.batch_of(min(segment.samples)), job.batch_of(max(segment.samples))
        for batch in range(begin, end + 1):
            first.setdefault(batch, slot)
            last[batch] = slot
    samples = job.stream_length - job.first_position
    missing = samples - len(seen)
    if missing:
        return [*breaches, f"{missing} of the {samples} samples of {job.name!r} are not in the plan"]
    ends = [last[batch] for batch in range(job.start, len(job.batches))]
    if steps != ends:
        breaches.append(f"{job.name!r} steps after slots {steps}, its global batches end at {ends}")
    # A flushing pipeline is empty after each step, so the next slot sees it; a stream needs S slots.
    distance = 1 if plan.flush else plan.stages
    for batch, end in enumerate(ends[:-1], job.start):
        begin = first[batch + 1]
        if begin - end < distance:
            breaches.append(
                f"batch {batch + 1} of {job.name!r} enters in slot {begin}, {begin - end} after the end of "
                f"batch {batch}; {plan.stages} stages need {distance}"
            )
    return breaches
