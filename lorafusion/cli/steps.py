"""The commands of `lorafusion training`."""

from __future__ import annotations

from typing import Annotated

import typer

from lorafusion.cli.common import CommandLine, Log, Out

training_app = CommandLine(help="Measure whole training steps in every implementation; suites: configs/steps.yaml.")
Suite = Annotated[str, typer.Option(help="an entry of configs/steps.yaml")]


@training_app.command("benches")
def training_benches(suite: Annotated[str, typer.Argument(help="an entry of configs/steps.yaml")]) -> None:
    """List the benches of a training suite: each is one process."""
    from lorafusion.lab.experiments import EXPERIMENTS

    print(*EXPERIMENTS["steps"].entry_of(suite).benches, sep="\n")


@training_app.command("measure")
def training_measure(
    suite: Suite,
    bench: Annotated[str, typer.Option(help="a bench of the suite")],
    out: Out,
    repeat: Annotated[int, typer.Option(min=1, help="which fresh process this is")] = 1,
    log: Log = None,
) -> None:
    """Train some steps of one bench in all its implementations and write its result file; on a GPU also OUT with
    .profile.csv in place of .json: what the time goes into."""
    from lorafusion.lab.experiments import EXPERIMENTS

    EXPERIMENTS["steps"].entry_of(suite)
    point = EXPERIMENTS["steps"].point(suite, bench)
    print(f"{out}: {EXPERIMENTS['steps'].run(point, repeat, out, log)}")
