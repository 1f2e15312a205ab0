"""`lorafusion train`: train the jobs of a file."""

from pathlib import Path
from typing import Annotated

import typer

from lorafusion.cli.common import CommandLine

train_app = CommandLine()


def _print_schema(wanted: bool) -> None:
    if wanted:
        from lorafusion.train.schema import jobs_schema

        print(jobs_schema(), end="")
        raise typer.Exit


@train_app.command("train", example="lorafusion train jobs.yaml")
def train(
    jobs: Annotated[Path, typer.Argument(help="a jobs file (YAML): base model, output folder, adapters, their data")],
    schema: Annotated[
        bool,
        typer.Option("--schema", is_eager=True, callback=_print_schema, help="print a jobs file's JSON schema"),
    ] = False,
) -> None:
    """Train many adapters of one base model together; run again, it goes on where it was interrupted.

    The exit status is 0 when all jobs are trained, 1 when the training failed, and 75 when it was stopped."""
    from lorafusion.train.jobs_file import read_jobs

    file = read_jobs(jobs)  # before the next line imports torch, which takes seconds
    from lorafusion.train.run import train

    raise typer.Exit(train(jobs, file))
