"""What the experiment `grid` measures: configs/grid.yaml, an entry for each suite that has one."""

from collections.abc import Iterator
from itertools import product
from typing import Annotated

from pydantic import Field

from lorafusion.core.config import read_model
from lorafusion.core.schema import Config
from lorafusion.core.workload import Dropout, Rank
from lorafusion.lab.experiments.bench import Count, DeviceEntry
from lorafusion.lab.experiments.kernel_suite import KernelBench, LinearBlock, TokenCount


class GridBlock(Config):
    """All combinations of these, of each linear of a model; linears of equal sizes once."""

    tokens: list[TokenCount] = Field(min_length=1)
    ranks: list[Rank] = Field(default=[16], min_length=1)
    dropouts: list[Dropout] = Field(default=[0.1], min_length=1)
    adapters: list[Count] = Field(default=[1], min_length=1, description="of a call, with equal shares of the tokens")

    def benches(self, model: str) -> Iterator[KernelBench]:
        shapes = dict.fromkeys(read_model(model).linears.values())
        for shape, rank, dropout in product(shapes, self.ranks, self.dropouts):
            block = LinearBlock(shapes=[shape], tokens=self.tokens, adapters=self.adapters,
                                implementations=["frozen", "peft-multi", "fused-multi"])  # fmt: skip
            subject = f"grid~{model}/linear~{shape[0]}x{shape[1]}"
            yield KernelBench(subject=subject, rank=rank, dropout=dropout, block=block, shape=shape)


class GridSuite(DeviceEntry):
    """An entry of configs/grid.yaml."""

    models: dict[str, Annotated[list[GridBlock], Field(min_length=1)]] = Field(min_length=1)
