"""What the experiment `costs` measures: configs/costs.yaml, an entry for each suite that has one.

A *bench* is one process: a model, of which it measures some *parts*, one after the other, each a stage of the model or
of one like it with fewer layers.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from lorafusion.core.config import ModelConfig
from lorafusion.core.plan import Plan
from lorafusion.core.schema import MOST_LAYERS, MOST_SAMPLES, MOST_TOKENS, Config
from lorafusion.core.workload import Alpha, Dropout, Rank, Sample, Workload
from lorafusion.lab.experiments.bench import Count, DeviceEntry, Variant, equal_jobs, variants
from lorafusion.lab.experiments.steps_suite import BenchName, Implementation, Stage, StepsBench
from lorafusion.planning import plan_system

BATCHES, MICROBATCHES = 4, 4  # global batches of each adapter, and microbatches a replica of each of these
RANK, DROPOUT = 16, 0.1
WHOLE = "whole"  # of a run of a pipeline
Tokens = Annotated[int, Field(ge=2, le=MOST_TOKENS)]


class Part(Config):
    """A stage of the model, or of one with other layers."""

    stage: tuple[Stage, Stage] = Field(default=(0, 1), description="which stage, from 0, of how many")
    layers: int | None = Field(default=None, ge=1, le=MOST_LAYERS, description="of the whole; by default the model's")

    def shortened(self, config: ModelConfig) -> ModelConfig:
        """The model that this is a stage of."""
        return config.model_copy(update={"num_hidden_layers": self.layers or config.num_hidden_layers})


class CostsGrid(Config):
    """Microbatches to measure: the product of arms and sizes."""

    implementations: list[Implementation] = Field(min_length=1)
    adapters: list[Count] = Field(default=[1], min_length=1, description="of those that take several")
    recompute: bool = Field(default=False, description="compute all layers again in the backward pass")
    sizes: list[tuple[Tokens, Tokens]] = Field(
        min_length=1, description="tokens of a microbatch, in equal shares for its adapters, and of each sample in it"
    )

    @property
    def arms(self) -> list[Variant]:
        return variants(self.implementations, self.adapters)


class CostsBench(Config):
    """Parts of a model, in each of which the microbatches of all grids are measured."""

    model: str = Field(description="a file of configs/models")
    parts: list[Part] = Field(min_length=1)
    grids: list[CostsGrid] = Field(min_length=1)
    rank: Rank = 16
    alpha: Alpha = 32.0
    dropout: Dropout = 0.1

    @property
    def most_tokens(self) -> int:
        return max(tokens for grid in self.grids for tokens, _ in grid.sizes)

    def steps_bench(self, arm: Variant, tokens: int, sample_tokens: int, **more: object) -> StepsBench:
        """Microbatches of a size as the experiment `steps` has them."""
        settings = {"model": self.model, "tokens": tokens, "sample_tokens": sample_tokens, "microbatches": 2,
                    "rank": self.rank, "alpha": self.alpha, "dropout": self.dropout,
                    "implementations": [arm.implementation], "adapters": [max(1, arm.adapters)]}  # fmt: skip
        return StepsBench.model_validate(settings | more)

    @model_validator(mode="after")
    def _possible(self) -> CostsBench:
        for part in self.parts:
            if not part.stage[0] < part.stage[1]:
                raise ValueError(f"stage must be an index and a count above it, found {list(part.stage)}")
        for grid in self.grids:
            for arm in grid.arms:
                for tokens, sample_tokens in grid.sizes:
                    if tokens % (sample_tokens * max(1, arm.adapters)):
                        raise ValueError(f"sizes: {tokens} tokens must be a multiple of {sample_tokens} "
                                         f"x {arm.adapters} adapters")  # fmt: skip
        return self


class SystemBench(Config):
    """A short run of a system, for what no stage alone shows: in one process, in replicas, or in a pipeline."""

    model: str = Field(description="a file of configs/models")
    system: str = Field(description="an entry of configs/systems.yaml")
    stages: Count = Field(default=1, description="of a pipeline, for what messages take")
    replicas: Count = Field(default=1, description="of the model, each in a process, or with a share of it")
    adapters: Count = Field(default=4, description="that are trained")
    tokens: Tokens = Field(description="of a microbatch")
    sample_tokens: Tokens = Field(description="of each sample that is packed in it")

    @property
    def processes(self) -> int:
        return self.stages * self.replicas

    @model_validator(mode="after")
    def _possible(self) -> SystemBench:
        if self.tokens % self.sample_tokens:
            raise ValueError(f"tokens: {self.tokens} must be a multiple of sample_tokens, {self.sample_tokens}")
        return self


class CostsSuite(DeviceEntry):
    """An entry of configs/costs.yaml."""

    rounds: Count = Field(description="turns of each microbatch that are timed")
    benches: dict[BenchName, CostsBench] = {}
    systems: dict[BenchName, SystemBench] = {}
    links: list[Annotated[int, Field(ge=1, le=2**34)]] = Field(
        default=[], max_length=MOST_SAMPLES, description="bytes of messages between two devices that are timed"
    )


def cell_of(name: str, bench: SystemBench) -> str:
    """A bench's name in the table, which says all of it but the model (`bench_of`)."""
    settings = bench.model_dump(exclude={"model"})
    return "/".join([f"bench~{name}", *(f"{key}~{value}" for key, value in settings.items())])


def bench_of(cell: str, model: str) -> SystemBench:
    """The bench of a name in the table."""
    return SystemBench(model=model, **dict(part.split("~", 1) for part in cell.split("/")[1:]))


def workload_and_plan(bench: SystemBench) -> tuple[Workload, Plan]:
    """Samples of one length, packed into microbatches by the system's planner."""
    size = bench.tokens // bench.sample_tokens * MICROBATCHES * bench.replicas
    samples = tuple(Sample(i, bench.sample_tokens) for i in range(size * BATCHES))
    jobs = equal_jobs(bench.adapters, rank=RANK, alpha=2.0 * RANK, dropout=DROPOUT, global_batch_size=size,
                      samples=samples)  # fmt: skip
    workload = Workload(name=bench.system, jobs=jobs)
    plan = plan_system(workload, bench.system, stages=bench.stages, capacity=bench.tokens, data_parallel=bench.replicas)
    return workload, plan
