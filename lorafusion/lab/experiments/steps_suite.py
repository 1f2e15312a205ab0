"""What the experiment `steps` measures: configs/steps.yaml, an entry for each suite of configs/suites that has one.

A *bench* is one process: a model, or the layers of one stage of it, in all its implementations. An *arm* is one of
them, with its number of adapters; each is a cell.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from lorafusion.core.plan import Microbatch, Plan, Segment, make_plan
from lorafusion.core.schema import MOST_SAMPLES, MOST_TOKENS, Config
from lorafusion.core.workload import Alpha, Dropout, Rank, Sample, Workload
from lorafusion.lab.experiments.bench import Count, DeviceEntry, Variant, equal_jobs, variants

Implementation = Literal["frozen", "peft", "peft-bf16", "fused", "fused-multi", "looped"]
Stage = Annotated[int, Field(ge=0, le=10_000)]
BenchName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]


class StepsBench(Config):
    """Equal microbatches on a whole model or on one of its stages."""

    model: str = Field(description="a file of configs/models")
    stage: tuple[Stage, Stage] = Field(default=(0, 1), description="which stage, from 0, of how many")
    tokens: int = Field(ge=2, le=MOST_TOKENS, description="of a microbatch, in equal shares for its adapters")
    sample_tokens: int = Field(default=1024, ge=2, le=MOST_TOKENS, description="of each sample that is packed in it")
    microbatches: int = Field(default=4, ge=2, le=MOST_SAMPLES, description="that an implementation trains in its turn")
    checkpointing: float = Field(default=0.0, ge=0, le=1, description="share of the layers that are recomputed")
    rank: Rank = 16
    alpha: Alpha = 32.0
    dropout: Dropout = 0.1
    implementations: list[Implementation] = Field(min_length=1)
    adapters: list[Count] = Field(default=[4], description="adapters of fused-multi and looped")

    @model_validator(mode="after")
    def _possible(self) -> StepsBench:
        index, count = self.stage
        if not 0 <= index < count:
            raise ValueError(f"stage must be an index and a count above it, found {list(self.stage)}")
        arms = self.arms
        if len(set(arms)) != len(arms):
            raise ValueError("implementations and adapters must name each arm once")
        for arm in arms:
            # The same samples in every arm: the work of attention grows with their lengths.
            if self.tokens % (self.sample_tokens * max(1, arm.adapters)):
                raise ValueError(f"tokens must be a multiple of sample_tokens x {arm.adapters} adapters")
        return self

    @property
    def arms(self) -> list[Variant]:
        return variants(self.implementations, self.adapters)


class StepsSuite(DeviceEntry):
    """An entry of configs/steps.yaml."""

    rounds: int = Field(ge=1, le=MOST_SAMPLES, description="in each of them every implementation has a timed turn")
    benches: dict[BenchName, StepsBench] = Field(min_length=1)


def workload_and_plan(bench: StepsBench, arm: Variant) -> tuple[Workload, Plan]:
    """Equal microbatches with a share of each adapter, which is its global batch: all adapters step after each.

    A frozen model has one job too, which says what its microbatches hold, and which nobody trains.
    """
    jobs = max(1, arm.adapters)
    share = bench.tokens // jobs
    size = share // bench.sample_tokens
    samples = tuple(Sample(i, bench.sample_tokens) for i in range(size * bench.microbatches))
    every_job = equal_jobs(jobs, rank=bench.rank, alpha=bench.alpha, dropout=bench.dropout, global_batch_size=size,
                           samples=samples)  # fmt: skip
    workload = Workload(name="steps", jobs=every_job)
    everyone = tuple(range(jobs))
    microbatches = []
    for k in range(bench.microbatches):
        positions = tuple(range(k * size, (k + 1) * size))
        segments = tuple(Segment(adapter=adapter, samples=positions, tokens=share) for adapter in everyone)
        microbatches.append(Microbatch(segments=segments, step_after=everyone))
    return workload, make_plan("steps", workload, microbatches, stages=1, capacity=bench.tokens)
