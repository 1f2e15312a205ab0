"""The experiment `kernels`: LoRA linears and decoder layers, and the traffic of their memory."""

from __future__ import annotations

from pathlib import Path

from lorafusion.lab.experiments.experiment import MARGIN, NO_INPUTS, Experiment, Inputs, Point, Resources, suite_name
from lorafusion.lab.experiments.kernel_suite import bench_hash, benches, read_kernel_suites, traffic_hash


class Kernels(Experiment):
    """LoRA linears and decoder layers in every implementation; the point `traffic` reads the memory counters."""

    name = "kernels"
    folder = "kernels"
    checks = ("kernels",)

    def points(self, suite: str) -> list[Point]:
        name = suite_name(suite)
        entry = read_kernel_suites().get(name)
        if entry is None:
            return []
        points = [Point(name, name, key, entry.repeats, entry, bench) for key, bench in benches(entry).items()]
        return points + ([Point(name, name, "traffic", 1, entry, None)] if entry.traffic else [])

    def key(self, point: Point) -> str:
        return bench_hash(point.settings, point.subject) if point.subject else traffic_hash(point.settings)

    def resources(self, point: Point) -> Resources:
        entry = point.settings
        gpus = int(entry.device == "cuda")
        if point.subject:
            return Resources(minutes=entry.minutes + MARGIN, memory_mb=16000, gpus=gpus)
        # Five minutes for each program under ncu, at most.
        return Resources(minutes=MARGIN + 5 * len(entry.traffic.shapes), memory_mb=32000, gpus=gpus)

    def run(self, point: Point, repeat: int, out: Path, log: Path | None, inputs: Inputs = NO_INPUTS) -> str:
        if point.subject:
            from lorafusion.lab.experiments.kernel_times import run_bench

            return run_bench(point.source, point.name, repeat, out, log)
        from lorafusion.lab.experiments.traffic import run_traffic

        return run_traffic(point.source, out, log)
