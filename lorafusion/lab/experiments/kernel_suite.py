"""What the kernel suite measures: configs/kernels.yaml, an entry for each suite of configs/suites that has one.

A *bench* is one process: all implementations at one shape, timed in turns, so that a drift of the machine's clock is
not taken for a difference between them. Each point of it, an implementation at a number of tokens, is a cell.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from lorafusion.core.config import names_in
from lorafusion.core.schema import Config, one_of
from lorafusion.core.workload import Dropout, Rank
from lorafusion.lab.experiments.bench import Count, DeviceEntry, Variant, variants

TokenCount = Annotated[int, Field(ge=1, le=2**24)]
Features = Annotated[int, Field(ge=1, le=2**24)]
Implementation = Literal["frozen", "peft", "peft-bf16", "peft-compiled", "peft-multi", "fused", "fused-multi"]


class TokenRange(Config):
    """Numbers of tokens, from `first` to `last`."""

    first: TokenCount
    last: TokenCount
    step: TokenCount

    @property
    def values(self) -> list[int]:
        return list(range(self.first, self.last + 1, self.step))


class Block(Config):
    """What linears and layers have in common."""

    tokens: list[TokenCount] | TokenRange
    ranks: list[Rank] = Field(default=[16], min_length=1)
    dropouts: list[Dropout] = Field(default=[0.1], min_length=1)
    implementations: list[Implementation] = Field(min_length=1)
    adapters: list[Count] = Field(default=[4, 16], description="adapters of fused-multi and peft-multi")

    @property
    def token_counts(self) -> list[int]:
        return self.tokens.values if isinstance(self.tokens, TokenRange) else self.tokens

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

    @model_validator(mode="after")
    def _layers(self) -> LayerBlock:
        if "peft-multi" in self.implementations:
            raise ValueError("implementations: peft-multi is one of linears alone")
        return self


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
    adapters: Count = 4


class KernelSuite(DeviceEntry):
    """An entry of configs/kernels.yaml."""

    replays: Count = Field(description="timed executions of each point in a process")
    verify: Verification
    linears: list[LinearBlock] = []
    layers: list[LayerBlock] = []
    traffic: Traffic | None = None

    @model_validator(mode="after")
    def _liger_has_a_gpu(self) -> KernelSuite:
        if self.device == "cpu" and any(block.liger for block in self.layers):
            raise ValueError("layers with `liger: true` need `device: cuda`: Liger's kernels run on GPUs only")
        return self


class KernelBench(BaseModel):
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

    @property
    def features(self) -> dict[str, int]:
        """The sizes of a linear, as columns of the measurement table."""
        return dict(zip(("in_features", "out_features"), self.shape, strict=True)) if self.shape else {}

    def cases(self, tokens: int) -> list[KernelCase]:
        """What is measured at a number of tokens."""
        every = variants(self.block.implementations, self.block.adapters)
        return [KernelCase(**variant.model_dump(), tokens=tokens) for variant in every]


class KernelCase(Variant):
    """An implementation at a number of tokens."""

    tokens: int

    def cell(self, bench: KernelBench) -> str:
        """The case's identity in the measurement table."""
        return f"{bench.name}/tokens~{self.tokens}/implementation~{self.implementation}/adapters~{self.adapters}"


def benches(suite: KernelSuite, source: str) -> Iterator[KernelBench]:
    """The suite's processes; raises `UserError` for an unknown model."""
    for block in suite.linears:
        for shape, rank, dropout in product(block.shapes, block.ranks, block.dropouts):
            subject = f"linear~{shape[0]}x{shape[1]}"
            yield KernelBench(subject=subject, rank=rank, dropout=dropout, block=block, shape=shape)
    for block in suite.layers:
        for model, rank, dropout in product(block.models, block.ranks, block.dropouts):
            one_of("model", model, names_in("models"), source)
            yield KernelBench(subject=f"layer~{model}", rank=rank, dropout=dropout, block=block, model=model)


def traffic_benches(suite: KernelSuite) -> list[KernelBench]:
    """What the memory counters are read for, by shape: apart from the times' benches, so that no numbers are mixed."""
    traffic = suite.traffic
    return [
        KernelBench(subject=f"traffic~{shape[0]}x{shape[1]}", rank=16, dropout=0.1, shape=shape,
                    block=LinearBlock(shapes=[shape], tokens=[traffic.tokens], adapters=[traffic.adapters],
                                      implementations=traffic.implementations))
        for shape in traffic.shapes
    ]  # fmt: skip
