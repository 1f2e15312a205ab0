"""The commands of `lorafusion training`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lorafusion.cli.common import CommandLine, Log, Out, Written

training_app = CommandLine(help="Measure whole training steps in every implementation; suites: configs/training.yaml.")
Suite = Annotated[str, typer.Option(help="an entry of configs/training.yaml")]


@training_app.command("benches")
def training_benches(suite: Annotated[str, typer.Argument(help="an entry of configs/training.yaml")]) -> None:
    """List the benches of a training suite: each is one process."""
    from lorafusion.lab.experiments.steps_suite import read_training_suite

    for name in read_training_suite(suite).benches:
        print(name)


@training_app.command("measure")
def training_measure(
    suite: Suite,
    bench: Annotated[str, typer.Option(help="a bench of the suite")],
    out: Out,
    repeat: Annotated[int, typer.Option(min=1, help="which fresh process this is")] = 1,
    profile: Annotated[Path | None, typer.Option(help="a CSV to write of where a GPU's time goes"), Written()] = None,
    log: Log = None,
) -> None:
    """Train some steps of one bench in all its implementations and write its result file."""
    from lorafusion.lab.experiments.trainers import run_bench

    print(f"{out}: {run_bench(suite, bench, repeat, out, log, profile)}")
