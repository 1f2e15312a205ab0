"""What the kernel suite measures: configs/kernels.yaml, an entry for each suite of configs/suites that has one.

A *bench* is one process: all implementations at one shape, timed in turns, so that a drift of the machine's clock is
not taken for a difference between them. Each point of it, an implementation at a number of tokens, is a cell.
"""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from lorafusion.core.config import CONFIGS, names_in, read_entries, read_model
from lorafusion.core.schema import MOST_MINUTES, MOST_REPEATS, MOST_SAMPLES, MOST_SEED, Config, UserError, one_of
from lorafusion.core.workload import content_hash

KERNELS = CONFIGS / "kernels.yaml"
TokenCount = Annotated[int, Field(ge=1, le=2**24)]
Rank = Annotated[int, Field(ge=1, le=256)]
Dropout = Annotated[float, Field(ge=0, lt=1)]
Features = Annotated[int, Field(ge=1, le=2**24)]
Implementation = Literal["frozen", "peft", "peft-bf16", "peft-compiled", "fused", "fused-multi"]


class Tokens(Config):
    """Numbers of tokens, from `first` to `last`."""

    first: TokenCount
    last: TokenCount
    step: TokenCount

    @property
    def values(self) -> list[int]:
        return list(range(self.first, self.last + 1, self.step))


class Block(Config):
    """What linears and layers have in common."""

    tokens: list[TokenCount] | Tokens
    ranks: list[Rank] = Field(default=[16], min_length=1)
    dropouts: list[Dropout] = Field(default=[0.1], min_length=1)
    implementations: list[Implementation] = Field(min_length=1)
    adapters: list[Annotated[int, Field(ge=1, le=MOST_SAMPLES)]] = Field(
        default=[4, 16], description="adapters of fused-multi"
    )

    @property
    def token_counts(self) -> list[int]:
        return self.tokens.values if isinstance(self.tokens, Tokens) else self.tokens

    @model_validator(mode="after")
    def _possible(self) -> Block:
        if self.implementations[0] != "frozen":
            raise ValueError("implementations must begin with frozen, which the others are compared with")
        if not self.token_counts:
            raise ValueError("tokens must be one or more numbers")
        return self


class LinearBlock(Block):
    """Single linears, by (in, out)."""

    shapes: list[tuple[Features, Features]] = Field(min_length=1)


class LayerBlock(Block):
    """Decoder layers of models of configs/models, all seven linears with adapters; samples packed to the tokens."""

    models: list[str] = Field(min_length=1)
    sample_tokens: TokenCount = Field(default=512, description="tokens of each packed sample, the last one shorter")
    liger: bool = Field(default=False, description="Liger's RMSNorm and SwiGLU in every implementation; needs a GPU")


class Verification(Config):
    """What is compared with float64 before anything is drawn."""

    shapes: list[tuple[Features, Features]] = Field(min_length=1)
    tokens: list[TokenCount] = Field(min_length=1)
    ranks: list[Rank] = Field(default=[16], min_length=1)


class Traffic(Config):
    """What the memory counters are read for."""

    shapes: list[tuple[Features, Features]] = Field(min_length=1)
    tokens: TokenCount
    implementations: list[Implementation] = Field(min_length=1)
    adapters: int = Field(default=4, ge=1, le=MOST_SAMPLES)


class KernelSuite(Config):
    """An entry of configs/kernels.yaml."""

    device: Literal["cpu", "cuda"]
    dtype: Literal["float32", "bfloat16", "float16"]
    repeats: int = Field(ge=1, le=MOST_REPEATS, description="fresh processes a bench")
    replays: int = Field(ge=1, le=MOST_SAMPLES, description="timed executions of each point in a process")
    seed: int = Field(default=1, ge=0, le=MOST_SEED)
    minutes: int = Field(default=10, ge=1, le=MOST_MINUTES, description="time limit of a process")
    verify: Verification
    linears: list[LinearBlock] = []
    layers: list[LayerBlock] = []
    traffic: Traffic | None = None

    @model_validator(mode="after")
    def _liger_has_a_gpu(self) -> KernelSuite:
        if self.device == "cpu" and any(block.liger for block in self.layers):
            raise ValueError("layers with `liger: true` need `device: cuda`: Liger's kernels run on GPUs only")
        return self


class Bench(BaseModel):
    """One process of the suite: a linear or a layer in one setting, over all its numbers of tokens."""

    model_config = ConfigDict(frozen=True)

    subject: str
    rank: int
    dropout: float
    block: LinearBlock | LayerBlock
    shape: tuple[int, int] | None = None
    model: str | None = None

    @property
    def name(self) -> str:
        """The bench's identity, in file names too."""
        return f"{self.subject}/rank~{self.rank}/dropout~{self.dropout:g}"

    def points(self, tokens: int) -> list[Point]:
        """What is measured at a number of tokens."""
        out = []
        for name in self.block.implementations:
            counts = self.block.adapters if name == "fused-multi" else [0 if name == "frozen" else 1]
            out += [Point(implementation=name, adapters=count, tokens=tokens) for count in counts]
        return out


class Point(BaseModel):
    """An implementation at a number of tokens."""

    model_config = ConfigDict(frozen=True)

    implementation: Implementation
    adapters: int
    tokens: int

    def cell(self, bench: Bench) -> str:
        """The point's identity in the measurement table."""
        return f"{bench.name}/tokens~{self.tokens}/implementation~{self.implementation}/adapters~{self.adapters}"


def read_kernel_suites(path: str | Path = KERNELS) -> dict[str, KernelSuite]:
    """All entries; raises `UserError` naming file and key."""
    suites = read_entries(path, KernelSuite)
    for name, suite in suites.items():
        benches(suite, f"{path}: {name}")
    return suites


def read_kernel_suite(name: str, path: str | Path = KERNELS) -> KernelSuite:
    suites = read_kernel_suites(path)
    one_of("kernel suite", name, set(suites), path)
    return suites[name]


def benches(suite: KernelSuite, source: str | Path = KERNELS) -> dict[str, Bench]:
    """The suite's processes by name; raises `UserError` for an unknown model or a bench that is there twice."""
    made: list[Bench] = []
    for block in suite.linears:
        for shape, rank, dropout in product(block.shapes, block.ranks, block.dropouts):
            subject = f"linear~{shape[0]}x{shape[1]}"
            made.append(Bench(subject=subject, rank=rank, dropout=dropout, block=block, shape=shape))
    for block in suite.layers:
        for model, rank, dropout in product(block.models, block.ranks, block.dropouts):
            one_of("model", model, names_in("models"), source)
            made.append(Bench(subject=f"layer~{model}", rank=rank, dropout=dropout, block=block, model=model))
    out: dict[str, Bench] = {}
    for bench in made:
        if bench.name in out:
            raise UserError(f"{source}: bench {bench.name} is in the suite twice")
        out[bench.name] = bench
    return out


def bench_hash(suite: KernelSuite, bench: Bench) -> str:
    """Changes with everything in the configuration that the bench's numbers depend on."""
    settings = suite.model_dump(mode="json", include={"device", "dtype", "replays", "seed"})
    block = bench.block.model_dump(mode="json", exclude={"shapes", "models", "ranks", "dropouts"})
    model = read_model(bench.model).model_dump(mode="json") if bench.model else None
    return content_hash([bench.name, settings, block, model])


def traffic_hash(suite: KernelSuite) -> str:
    """As `bench_hash`, for the memory counters."""
    settings = suite.model_dump(mode="json", include={"device", "dtype", "replays", "seed"})
    return content_hash([settings, suite.traffic.model_dump(mode="json")])


def current_hash(suite: str, name: str) -> str:
    """The hash of a bench of a suite as the file has it now; KeyError for one that it does not have."""
    read = read_kernel_suites()[suite]
    return bench_hash(read, benches(read)[name])
