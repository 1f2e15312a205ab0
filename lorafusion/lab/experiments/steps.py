"""The experiment `steps`: whole training steps on one device, in every implementation."""

from collections.abc import Iterator
from pathlib import Path

from lorafusion.core.config import CONFIGS, names_in, read_model
from lorafusion.core.schema import UserError, one_of
from lorafusion.lab.experiments.bench import BenchExperiment
from lorafusion.lab.experiments.experiment import Point
from lorafusion.lab.experiments.steps_suite import StepsBench, StepsSuite

PROFILE = ".profile.csv"


class Steps(BenchExperiment):
    """A point is a model, or the layers of one stage of it. On a GPU a run also writes what its time goes into."""

    name = "steps"
    checks = ("kernels",)
    config = CONFIGS / "steps.yaml"
    entry = StepsSuite

    def subjects(self, entry: StepsSuite, source: str) -> Iterator[tuple[str, StepsBench]]:
        for name, bench in entry.benches.items():
            where = f"{source}.benches.{name}"
            one_of("model", bench.model, names_in("models"), where)
            layers = read_model(bench.model).num_hidden_layers
            if bench.stage[1] > layers:
                raise UserError(f"{where}: {bench.stage[1]} stages, but model {bench.model} has only {layers} layers")
            yield name, bench

    def depends_on(self, point: Point) -> list:
        settings = point.settings.model_dump(mode="json", include={"device", "dtype", "rounds", "seed"})
        bench = point.subject
        return [settings, bench.model_dump(mode="json"), read_model(bench.model).model_dump(mode="json")]

    def more_outputs(self, point: Point) -> tuple[str, ...]:
        return (PROFILE, f"{PROFILE}.sha256") if point.settings.device == "cuda" else ()

    def columns(self, point: Point) -> dict:
        bench = point.subject
        return {
            "cell": f"bench~{point.name}/canary", "model": bench.model, "rank": bench.rank, "dropout": bench.dropout,
            "dtype": point.settings.dtype, "stages": bench.stage[1], "capacity": bench.tokens, "bench": point.name,
        }  # fmt: skip

    def measure(self, point: Point, repeat: int, out: Path) -> Iterator[list[dict]]:
        from lorafusion.lab.experiments.step_times import bench_rows

        return bench_rows(point, repeat, out.with_suffix(PROFILE))
