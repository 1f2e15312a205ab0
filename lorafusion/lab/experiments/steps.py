"""The experiment `steps`: whole training steps on one device."""

from __future__ import annotations

from pathlib import Path

from lorafusion.lab.experiments.experiment import MARGIN, NO_INPUTS, Experiment, Inputs, Point, Resources, suite_name
from lorafusion.lab.experiments.steps_suite import bench_hash, read_training_suites


class Steps(Experiment):
    """Whole training steps on one device, in every implementation."""

    name = "steps"
    folder = "training"
    checks = ("kernels",)

    def points(self, suite: str) -> list[Point]:
        name = suite_name(suite)
        entry = read_training_suites().get(name)
        return [Point(name, name, *(bench, entry.repeats, entry, bench)) for bench in entry.benches] if entry else []

    def key(self, point: Point) -> str:
        return bench_hash(point.settings, point.name)

    def resources(self, point: Point) -> Resources:
        entry = point.settings
        return Resources(minutes=entry.minutes + MARGIN, memory_mb=16000, gpus=int(entry.device == "cuda"))

    def more_outputs(self, point: Point) -> tuple[str, ...]:
        return (".profile.csv", ".profile.csv.sha256") if point.settings.device == "cuda" else ()

    def run(self, point: Point, repeat: int, out: Path, log: Path | None, inputs: Inputs = NO_INPUTS) -> str:
        from lorafusion.lab.experiments.trainers import run_bench

        profile = out.with_suffix(".profile.csv") if self.more_outputs(point) else None
        return run_bench(point.source, point.name, repeat, out, log, profile)
