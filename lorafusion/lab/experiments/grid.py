"""The experiment `grid`: fused linears beside PEFT's, as a user calls them and as graphs, over a grid of sizes."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from lorafusion.core.config import CONFIGS, names_in, read_model
from lorafusion.core.schema import UserError, one_of
from lorafusion.lab.experiments.bench import BenchExperiment
from lorafusion.lab.experiments.experiment import Point
from lorafusion.lab.experiments.grid_suite import GridSuite
from lorafusion.lab.experiments.kernel_suite import KernelBench


class Grid(BenchExperiment):
    """A point is the linears of a model."""

    name = "grid"
    checks = ("kernels",)
    config = CONFIGS / "grid.yaml"
    entry = GridSuite
    memory_mb = 32_000

    def subjects(self, entry: GridSuite, source: str) -> Iterator[tuple[str, list[KernelBench]]]:
        for model, blocks in entry.models.items():
            one_of("model", model, names_in("models"), source)
            benches = [bench for block in blocks for bench in block.benches(model)]
            cells = [case.cell(bench) for bench in benches for tokens in bench.block.token_counts
                     for case in bench.cases(tokens)]  # fmt: skip
            twice = [cell for cell, count in Counter(cells).items() if count > 1]
            if twice:
                raise UserError(f"{source}.models.{model}: {twice[0]} is in the grid twice")
            yield model, benches

    def depends_on(self, point: Point) -> list:
        settings = point.settings.model_dump(mode="json", include={"device", "dtype", "seed"})
        blocks = [block.model_dump(mode="json") for block in point.settings.models[point.name]]
        return [settings, blocks, read_model(point.name).model_dump(mode="json")]

    def columns(self, point: Point) -> dict:
        return {"cell": f"grid~{point.name}/canary", "model": point.name, "dtype": point.settings.dtype}

    def measure(self, point: Point, repeat: int, out: Path) -> Iterator[list[dict]]:
        from lorafusion.lab.experiments.grid_times import grid_rows

        return grid_rows(point, repeat)
