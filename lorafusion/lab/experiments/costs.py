"""The experiment `costs`: how long the passes of a stage take, as a function of what a microbatch holds; how long
messages take; and what executors do besides.

What is measured becomes a profile, by which plans are made and simulated (`lorafusion.lab.cost_profile`).
"""

from collections.abc import Iterator
from pathlib import Path

from lorafusion.core.config import CONFIGS, names_in, read_model
from lorafusion.core.schema import UserError, one_of
from lorafusion.lab.cluster.request import Resources
from lorafusion.lab.experiments.bench import BenchExperiment
from lorafusion.lab.experiments.costs_suite import CostsBench, CostsSuite, SystemBench
from lorafusion.lab.experiments.experiment import Point

LINKS = "links"  # the bench of the messages between two devices


class Costs(BenchExperiment):
    """A point is a model whose stages are measured, a system, or the links between two devices."""

    name = "costs"
    config = CONFIGS / "costs.yaml"
    entry = CostsSuite
    memory_mb = 32_000

    def subjects(self, entry: CostsSuite, source: str) -> Iterator[tuple[str, CostsBench | SystemBench | None]]:
        for name, bench in entry.benches.items():
            where = f"{source}.benches.{name}"
            one_of("model", bench.model, names_in("models"), where)
            for part in bench.parts:
                layers = part.layers or read_model(bench.model).num_hidden_layers
                if part.stage[1] > layers:
                    raise UserError(f"{where}: {part.stage[1]} stages, but model {bench.model} has only {layers} "
                                    f"layers")  # fmt: skip
            yield name, bench
        for name, run in entry.systems.items():
            one_of("model", run.model, names_in("models"), f"{source}.systems.{name}")
            yield name, run
        if entry.links:
            yield LINKS, None

    def depends_on(self, point: Point) -> list:
        settings = point.settings.model_dump(mode="json", include={"device", "dtype", "rounds", "seed"})
        if point.subject is None:
            return [settings, point.settings.links]
        return [
            settings,
            point.subject.model_dump(mode="json"),
            read_model(point.subject.model).model_dump(mode="json"),
        ]

    def resources(self, point: Point) -> Resources:
        needs = super().resources(point)
        subject = point.subject
        processes = 2 if subject is None else subject.processes if isinstance(subject, SystemBench) else 1
        return needs._replace(cpus=max(needs.cpus, processes), gpus=processes * needs.gpus)

    def columns(self, point: Point) -> dict:
        common = {"cell": f"bench~{point.name}/canary", "dtype": point.settings.dtype, "bench": point.name}
        if point.subject is None:
            return common | {"gpus": 2}
        if isinstance(point.subject, SystemBench):
            return common | {"model": point.subject.model, "gpus": point.subject.processes}
        return common | {"model": point.subject.model, "rank": point.subject.rank, "dropout": point.subject.dropout}

    def measure(self, point: Point, repeat: int, out: Path) -> Iterator[list[dict]]:
        from lorafusion.lab.experiments.cost_systems import system_rows
        from lorafusion.lab.experiments.cost_times import bench_rows, link_rows

        if isinstance(point.subject, SystemBench):
            return system_rows(point)
        return link_rows(point) if point.subject is None else bench_rows(point)
