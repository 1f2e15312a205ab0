"""The jobs to train: adapters of one frozen base model, their hyper-parameters and their ordered samples.

A workload is data. It says how long each sample is, not what it holds: tokens are fetched when a run needs
them, so that planning needs neither torch nor a dataset.

Words: a job's *stream* is its samples in training order, epoch after epoch; a *position* is a sample's place in
that stream; a *global batch* is the run of positions between two optimizer steps. A global batch never crosses
the end of an epoch, so the last one of an epoch may be short.

What a job owns is counted from the beginning of its own stream, whatever it is trained with and however often it was
interrupted: dropout masks and the learning rate are functions of that place.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator
from functools import cached_property
from itertools import accumulate, islice
from pathlib import Path
from typing import Annotated, Final, Literal, NamedTuple, Self

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from lorafusion.core.files import read_json
from lorafusion.core.schema import (
    MOST_ALPHA,
    MOST_DECAY,
    MOST_EPOCHS,
    MOST_NORM,
    MOST_PRIORITY,
    MOST_RATE,
    MOST_SAMPLES,
    MOST_STEPS,
    MOST_STREAM,
    MOST_TOKENS,
    MOST_WEIGHT,
    Data,
    Float,
    Int,
    UserError,
    validated,
)

VERSION: Final = 1
ALL_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# One linear with one adapter in the place of three, as Megatron-LM has it and as LoRAFusion's authors merge them. A
# jobs file does not know it: checkpoints have the three.
MERGED, MERGED_PARTS = "qkv_proj", ("q_proj", "k_proj", "v_proj")
# The keys that a job begins with in a file; the others follow as the fields do. Files stay the same byte for byte.
FIRST_KEYS = ("name", "dataset", "rank", "alpha", "dropout", "rslora", "target_modules", "learning_rate",
              "weight_decay", "seed", "global_batch_size", "epochs", "steps", "start")  # fmt: skip
# Keys of when a job is trained, not of what. A file has them only where they are not as usual, so that workloads from
# before there were such keys have the same hash.
ORDER_KEYS = ("priority", "weight")


class Sample(NamedTuple):
    """One training sample: its identity in the dataset and its length in tokens (at least 2: one to predict)."""

    id: Annotated[Int, Field(ge=0)]
    tokens: Annotated[Int, Field(ge=2, le=MOST_TOKENS)]


class _Frozen(Data):
    """Data of which a changed copy does not inherit what was computed from the original."""

    def model_copy(self, **options):
        copied = super().model_copy(**options)
        for name, value in vars(type(self)).items():
            if isinstance(value, cached_property):
                copied.__dict__.pop(name, None)
        return copied


# What a hyper-parameter may be, wherever a file has it.
Rank = Annotated[Int, Field(ge=1, le=256)]
Alpha = Annotated[Float, Field(gt=0, le=MOST_ALPHA)]
Dropout = Annotated[Float, Field(ge=0, lt=1)]
LearningRate = Annotated[Float, Field(gt=0, le=MOST_RATE)]
BatchSize = Annotated[Int, Field(ge=1, le=MOST_SAMPLES, description="samples of one optimizer step")]
Schedule = Annotated[
    Literal["constant", "linear", "cosine"],
    Field(description="the learning rate after the warm-up: as it is, or down to zero"),
]
GradientNorm = Annotated[
    Float | None, Field(gt=0, le=MOST_NORM, description="norm that an adapter's gradient is clipped to")
]
# Not a hyper-parameter, but the same in a workload and in a jobs file.
JobName = Annotated[
    str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$", description="the adapter's name; PEFT forbids dots")
]
Priority = Annotated[
    Int, Field(ge=-MOST_PRIORITY, le=MOST_PRIORITY, description="jobs of a higher one are planned ahead of the others")
]
Weight = Annotated[
    Float, Field(gt=0, le=MOST_WEIGHT, description="what the job's end counts for in the mean that a plan makes low")
]
Prompt = Annotated[
    Float,
    Field(ge=0, lt=1, description="share of a sample's tokens that nothing is learnt from, where tokens are synthetic"),
]
EvaluationSteps = Annotated[Int | None, Field(ge=1, le=MOST_STEPS, description="steps between two evaluations")]


class AdapterParameters(Data):
    """The hyper-parameters of a job that a file of configs/workloads has too."""

    rank: Rank
    alpha: Alpha
    dropout: Dropout = 0.0
    rslora: bool = Field(default=False, description="scale by alpha/sqrt(rank) instead of alpha/rank")
    target_modules: tuple[str, ...] = Field(default=ALL_LINEAR, min_length=1)
    learning_rate: LearningRate = 1e-4

    @model_validator(mode="after")
    def _names_a_linear_once(self) -> Self:
        part = next((name for name in MERGED_PARTS if name in self.target_modules), None)
        if MERGED in self.target_modules and part:
            raise ValueError(f"target_modules: {MERGED} is {', '.join(MERGED_PARTS)} as one linear, found {part} too")
        return self


class Hyperparameters(AdapterParameters):
    """The hyper-parameters of a job. The defaults are a workload's; a jobs file has some others, and says why."""

    weight_decay: Float = Field(default=0.0, ge=0, le=MOST_DECAY)
    seed: Int = Field(
        default=0, ge=0, lt=2**32, description="draws the initial weights, the dropout masks and a shuffled order"
    )
    global_batch_size: BatchSize
    steps: Int | None = Field(
        default=None, ge=1, le=MOST_STEPS, description="optimizer steps; with epochs too, what ends first counts"
    )
    schedule: Schedule = "constant"
    warmup_steps: Int = Field(
        default=0, ge=0, le=MOST_STEPS, description="steps in which the learning rate rises from zero"
    )
    max_grad_norm: GradientNorm = None


class Job(Hyperparameters, _Frozen):
    """One adapter to train, as its owner asked for it."""

    name: JobName
    dataset: str = Field(min_length=1, description="where the samples come from")
    epochs: Int = Field(default=1, ge=1, le=MOST_EPOCHS)
    start: Int = Field(
        default=0, ge=0, le=MOST_STEPS, description="global batches that are trained already; the others remain"
    )
    samples: tuple[Sample, ...] = Field(min_length=1)
    evaluation: tuple[Sample, ...] = Field(default=(), description="samples that the loss is measured on")
    evaluate_every: EvaluationSteps = None
    # As with `ORDER_KEYS`, files from before have the same hash.
    prompt: Prompt = Field(default=0.0, exclude_if=lambda share: not share)
    priority: Priority = 0
    weight: Weight = 1.0

    @model_serializer(mode="wrap")
    def _in_the_order_of_a_file(self, dump: SerializerFunctionWrapHandler) -> dict[str, object]:
        usual = {key for key in ORDER_KEYS if getattr(self, key) == type(self).model_fields[key].default}
        data = {key: value for key, value in dump(self).items() if key not in usual}
        return {key: data[key] for key in FIRST_KEYS if key in data} | data

    @model_validator(mode="after")
    def _has_something_to_do(self) -> Job:
        stream = self.epochs * len(self.samples)
        if min(stream, (self.steps or stream) * self.global_batch_size) > MOST_STREAM:
            raise ValueError(f"epochs: {stream} samples of all of them, expected {MOST_STREAM} at most")
        if self.start >= len(self.batches):
            raise ValueError(f"start: {self.start} of {len(self.batches)} global batches are trained, nothing remains")
        if self.evaluate_every and not self.evaluation:
            raise ValueError("evaluate_every: set, but there are no evaluation samples")
        return self

    @property
    def scaling(self) -> float:
        """The factor c of the LoRA term: alpha/rank, or alpha/sqrt(rank) for rank-stabilised LoRA."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    @property
    def stream_length(self) -> int:
        """Samples in the stream, all epochs, or up to the last step."""
        return self.batches[-1].stop

    @property
    def first_position(self) -> int:
        """Where the stream goes on: the first sample that is not trained yet."""
        return self.batches[self.start].start

    @property
    def tokens(self) -> int:
        """Real tokens that remain to be trained."""
        return self.stream_offset(self.stream_length) - self.stream_offset(self.first_position)

    def first_label(self, sample: Sample) -> int:
        """The first token of a synthetic sample that is learnt: none of its prompt, but the last one in any case."""
        return min(max(1, int(self.prompt * sample.tokens)), sample.tokens - 1)

    @property
    def most_labels(self) -> float:
        """The largest share of a sample's tokens that are learnt; 1 where there are no prompts."""
        if not self.prompt:
            return 1.0
        return max(1 - self.first_label(sample) / sample.tokens for sample in (*self.samples, *self.evaluation))

    def batch_tokens(self, batch: int) -> int:
        """Tokens of one of the global batches."""
        positions = self.batches[batch]
        return self.stream_offset(positions.stop) - self.stream_offset(positions.start)

    def sample_at(self, position: int) -> Sample:
        """The sample at a position of the stream."""
        return self.samples[position % len(self.samples)]

    def lengths_at(self, positions: Iterable[int]) -> list[int]:
        """Tokens of the samples at positions of the stream."""
        samples, count = self.samples, len(self.samples)
        return [samples[position % count].tokens for position in positions]

    @cached_property
    def token_offsets(self) -> tuple[int, ...]:
        """Tokens of one epoch before each sample; the last entry is the epoch's total."""
        return (0, *accumulate(sample.tokens for sample in self.samples))

    def stream_offset(self, position: int) -> int:
        """Tokens of the stream before the sample at `position`; where its dropout masks begin."""
        epoch, index = divmod(position, len(self.samples))
        return epoch * self.token_offsets[-1] + self.token_offsets[index]

    @cached_property
    def batches(self) -> tuple[range, ...]:
        """The positions of each global batch, in order, those trained already included."""
        return tuple(islice(self._batches_of(range(self.epochs)), self.steps))

    @cached_property
    def batches_of_an_epoch(self) -> tuple[range, ...]:
        """The positions of each global batch of the first epoch, also of those that are beyond the last step: what is
        decided by them is decided alike for the whole job and for its beginning."""
        return tuple(self._batches_of(range(1)))

    def _batches_of(self, epochs: range) -> Iterator[range]:
        size = len(self.samples)
        for epoch in epochs:
            for start in range(epoch * size, (epoch + 1) * size, self.global_batch_size):
                yield range(start, min(start + self.global_batch_size, (epoch + 1) * size))

    def batch_of(self, position: int) -> int:
        """The index of the global batch that holds a position."""
        epoch, index = divmod(position, len(self.samples))
        return epoch * math.ceil(len(self.samples) / self.global_batch_size) + index // self.global_batch_size

    def learning_rate_at(self, step: int) -> float:
        """The learning rate of an optimizer step, counted from 0: a linear rise over the warm-up, then the schedule.

        As transformers' schedules of these names, one cosine being half a wave."""
        if step < self.warmup_steps:
            return self.learning_rate * step / self.warmup_steps
        if self.schedule == "constant":
            return self.learning_rate
        done = (step - self.warmup_steps) / max(1, len(self.batches) - self.warmup_steps)
        share = 1 - done if self.schedule == "linear" else (1 + math.cos(math.pi * done)) / 2
        return self.learning_rate * share


class Workload(_Frozen):
    """Jobs that are trained together, in a fixed order; plans name a job by its index here."""

    version: Literal[1] = VERSION
    name: str = Field(min_length=1)
    jobs: tuple[Job, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _names_are_unique(self) -> Workload:
        names = [job.name for job in self.jobs]
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            raise ValueError(f"two jobs are named {repeated[0]!r}; adapters need distinct names")
        return self

    @model_validator(mode="after")
    def _agree_on_the_linears(self) -> Workload:
        apart = {part for job in self.jobs for part in MERGED_PARTS if part in job.target_modules}
        merged = [job.name for job in self.jobs if MERGED in job.target_modules]
        if apart and merged:
            raise ValueError(f"job {merged[0]!r} has {MERGED}, another one {sorted(apart)[0]}; a model has either")
        return self

    @property
    def merges_qkv(self) -> bool:
        """Is q, k and v one linear of the model?"""
        return any(MERGED in job.target_modules for job in self.jobs)

    @property
    def tokens(self) -> int:
        """Real tokens of all jobs that remain to be trained."""
        return sum(job.tokens for job in self.jobs)

    @cached_property
    def content_hash(self) -> str:
        """Sixteen hexadecimal digits that change with anything in the workload."""
        lists = "samples", "evaluation"  # as they are: copies of a million samples take a second and 0.1 GiB
        data = self.model_dump(exclude={"jobs": {"__all__": set(lists)}})
        jobs = [each | {name: getattr(job, name) for name in lists}
                for each, job in zip(data["jobs"], self.jobs, strict=True)]  # fmt: skip
        return content_hash(data | {"jobs": jobs})

    def to_json(self) -> str:
        return json.dumps(self.model_dump(), separators=(",", ":")) + "\n"

    @classmethod
    def read(cls, path: str | Path) -> Workload:
        """Read a workload file; `UserError` names the file and the key that is wrong."""
        return validated(cls, read_versioned(path, VERSION, "workload"), path)


def content_hash(data: object) -> str:
    """A short hash of JSON data, independent of key order and whitespace."""
    canonical = json.dumps(data, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def read_versioned(path: str | Path, version: int, kind: str) -> dict:
    """The JSON object in a file, once its version is known to be one that this program reads."""
    data = read_json(path, kind)
    written = data.get("version")
    if type(written) is not int or written != version:
        raise UserError(f"{path}: {kind} of version {written!r}, expected version {version}; make it again")
    return data
