"""What the training suite measures: configs/training.yaml, an entry for each suite of configs/suites that has one.

A *bench* is one process: a model, or the layers of one stage of it, in all its implementations. An *arm* is one of
them, with its number of adapters; each is a cell.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from lorafusion.core.config import CONFIGS, names_in, read_entries, read_model
from lorafusion.core.plan import Microbatch, Plan, Segment, make_plan
from lorafusion.core.schema import (
    MOST_ALPHA,
    MOST_MINUTES,
    MOST_REPEATS,
    MOST_SAMPLES,
    MOST_SEED,
    MOST_TOKENS,
    Config,
    UserError,
    one_of,
)
from lorafusion.core.workload import ALL_LINEAR, Job, Sample, Workload, content_hash

SUITES = CONFIGS / "training.yaml"
Implementation = Literal["frozen", "peft", "peft-bf16", "fused", "fused-multi"]
Count = Annotated[int, Field(ge=1, le=MOST_SAMPLES)]
Stage = Annotated[int, Field(ge=0, le=10_000)]
BenchName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]


class Arm(BaseModel):
    """An implementation and its number of adapters, none of a frozen model."""

    model_config = ConfigDict(frozen=True)

    implementation: Implementation
    adapters: int

    @property
    def name(self) -> str:
        return f"{self.implementation}, {self.adapters} adapters" if self.adapters > 1 else self.implementation


class Bench(Config):
    """Equal microbatches on a whole model or on one of its stages."""

    model: str = Field(description="a file of configs/models")
    stage: tuple[Stage, Stage] = Field(default=(0, 1), description="which stage, from 0, of how many")
    tokens: int = Field(ge=2, le=MOST_TOKENS, description="of a microbatch, in equal shares for its adapters")
    sample_tokens: int = Field(default=1024, ge=2, le=MOST_TOKENS, description="of each sample that is packed in it")
    microbatches: int = Field(default=4, ge=2, le=MOST_SAMPLES, description="that an implementation trains in its turn")
    checkpointing: float = Field(default=0.0, ge=0, le=1, description="share of the layers that are recomputed")
    rank: int = Field(default=16, ge=1, le=256)
    alpha: float = Field(default=32.0, gt=0, le=MOST_ALPHA)
    dropout: float = Field(default=0.1, ge=0, lt=1)
    implementations: list[Implementation] = Field(min_length=1)
    adapters: list[Annotated[int, Field(ge=1, le=MOST_SAMPLES)]] = Field(
        default=[4], description="adapters of fused-multi"
    )

    @model_validator(mode="after")
    def _possible(self) -> Bench:
        index, count = self.stage
        if not 0 <= index < count:
            raise ValueError(f"stage must be an index and a count above it, found {list(self.stage)}")
        if len(set(self.arms)) != len(self.arms):
            raise ValueError("implementations and adapters must name each arm once")
        for arm in self.arms:
            # The same samples in every arm: the work of attention grows with their lengths.
            if self.tokens % (self.sample_tokens * max(1, arm.adapters)):
                raise ValueError(f"tokens must be a multiple of sample_tokens x {arm.adapters} adapters")
        return self

    @property
    def arms(self) -> list[Arm]:
        out = []
        for name in self.implementations:
            counts = self.adapters if name == "fused-multi" else [0 if name == "frozen" else 1]
            out += [Arm(implementation=name, adapters=count) for count in counts]
        return out


class TrainingSuite(Config):
    """An entry of configs/training.yaml."""

    device: Literal["cpu", "cuda"]
    dtype: Literal["float32", "bfloat16", "float16"]
    repeats: int = Field(default=1, ge=1, le=MOST_REPEATS, description="fresh processes a bench")
    rounds: int = Field(ge=1, le=MOST_SAMPLES, description="in each of them every implementation has a timed turn")
    seed: int = Field(default=1, ge=0, le=MOST_SEED)
    minutes: int = Field(default=10, ge=1, le=MOST_MINUTES, description="time limit of a process")
    benches: dict[BenchName, Bench] = Field(min_length=1)


def read_training_suites() -> dict[str, TrainingSuite]:
    """All entries; `UserError` names the key that is wrong, or a model that is unknown or has too few layers."""
    suites = read_entries(SUITES, TrainingSuite)
    for name, suite in suites.items():
        for bench_name, bench in suite.benches.items():
            where = f"{SUITES}: {name}.benches.{bench_name}"
            one_of("model", bench.model, names_in("models"), where)
            layers = read_model(bench.model).num_hidden_layers
            if bench.stage[1] > layers:
                raise UserError(f"{where}: {bench.stage[1]} stages, but model {bench.model} has only {layers} layers")
    return suites


def read_training_suite(name: str) -> TrainingSuite:
    suites = read_training_suites()
    one_of("training suite", name, set(suites), SUITES)
    return suites[name]


def bench_hash(suite: TrainingSuite, name: str) -> str:
    """Changes with everything in the configuration that the bench's numbers depend on."""
    settings = suite.model_dump(mode="json", include={"device", "dtype", "rounds", "seed"})
    bench = suite.benches[name]
    return content_hash([settings, bench.model_dump(mode="json"), read_model(bench.model).model_dump(mode="json")])


def current_hash(suite: str, name: str) -> str:
    """The hash of a bench of a suite as the file has it now; KeyError for one that it does not have."""
    return bench_hash(read_training_suites()[suite], name)


def workload_and_plan(bench: Bench, arm: Arm) -> tuple[Workload, Plan]:
    """Equal microbatches with a share of each adapter, which is its global batch: all adapters step after each.

    A frozen model has one job too, which says what its microbatches hold, and which nobody trains.
    """
    jobs = max(1, arm.adapters)
    share = bench.tokens // jobs
    size = share // bench.sample_tokens
    samples = tuple(Sample(i, bench.sample_tokens) for i in range(size * bench.microbatches))
    workload = Workload(
        name="training-suite",
        jobs=tuple(
            Job(name=f"adapter-{i}", dataset="random", rank=bench.rank, alpha=bench.alpha, dropout=bench.dropout,
                target_modules=ALL_LINEAR, seed=i, global_batch_size=size, samples=samples)
            for i in range(jobs)
        ),
    )  # fmt: skip
    everyone = tuple(range(jobs))
    microbatches = []
    for k in range(bench.microbatches):
        positions = tuple(range(k * size, (k + 1) * size))
        segments = tuple(Segment(adapter=one, samples=positions, tokens=share) for one in everyone)
        microbatches.append(Microbatch(segments=segments, step_after=everyone))
    return workload, make_plan("training-suite", workload, microbatches, stages=1, capacity=bench.tokens)
