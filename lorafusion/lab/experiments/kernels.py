"""The experiment `kernels`: LoRA linears and decoder layers in every implementation, timed, and their DRAM traffic."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from lorafusion.core.config import CONFIGS, read_model
from lorafusion.lab.cluster.request import Resources
from lorafusion.lab.experiments.bench import BenchExperiment
from lorafusion.lab.experiments.experiment import MARGIN, Point
from lorafusion.lab.experiments.kernel_suite import KernelBench, KernelSuite, benches, traffic_benches

TRAFFIC = "traffic"  # the point whose subject is a list of benches


class Kernels(BenchExperiment):
    """A point is a bench: all implementations at one shape. The point `traffic` reads the GPU's memory counters."""

    name = "kernels"
    checks = ("kernels",)
    config = CONFIGS / "kernels.yaml"
    entry = KernelSuite

    def subjects(self, entry: KernelSuite, source: str) -> Iterator[tuple[str, KernelBench]]:
        return ((bench.name, bench) for bench in benches(entry, source))

    def points(self, suite: str) -> list[Point]:
        points = super().points(suite)
        if points and points[0].settings.traffic:
            traffic = traffic_benches(points[0].settings)
            points.append(replace(points[0], name=TRAFFIC, repeats=1, subject=traffic))
        return points

    def depends_on(self, point: Point) -> list:
        entry, bench = point.settings, point.subject
        settings = entry.model_dump(mode="json", include={"device", "dtype", "replays", "seed"})
        if point.name == TRAFFIC:
            return [settings, entry.traffic.model_dump(mode="json")]
        block = bench.block.model_dump(mode="json", exclude={"shapes", "models", "ranks", "dropouts"})
        return [bench.name, settings, block, read_model(bench.model).model_dump(mode="json") if bench.model else None]

    def resources(self, point: Point) -> Resources:
        if point.name != TRAFFIC:
            return super().resources(point)
        # Five minutes for each program under ncu, at most.
        return Resources(MARGIN + 5 * len(point.subject), 32_000, gpus=int(point.settings.device == "cuda"))

    def columns(self, point: Point) -> dict:
        if point.name == TRAFFIC:
            bench, cell = point.subject[0], {"cell": TRAFFIC}
        else:
            bench = point.subject
            cell = {"cell": f"{bench.name}/canary", "model": bench.model, **bench.features}
        return cell | {"rank": bench.rank, "dropout": bench.dropout, "dtype": point.settings.dtype}

    def measure(self, point: Point, repeat: int, out: Path) -> Iterator[list[dict]]:
        if point.name == TRAFFIC:
            from lorafusion.lab.experiments.traffic import traffic_rows

            yield traffic_rows(point)
        else:
            from lorafusion.lab.experiments.kernel_times import bench_rows

            yield bench_rows(point, repeat)
