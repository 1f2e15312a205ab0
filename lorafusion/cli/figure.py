"""The commands `lorafusion figure` and `lorafusion page`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lorafusion.cli.common import ChecksFolder, CommandLine, Out, Stem
from lorafusion.core.files import write

page_app = CommandLine(help="Make a page of the report.")


def figure(
    name: Annotated[str, typer.Argument(help="a figure; a name that is none gives the list")],
    files: Annotated[list[Path], typer.Argument(help="what it is drawn from: a measurement table, or other files")],
    out: Stem,
    model: Annotated[str | None, typer.Option(help="the model, for a figure of one model")] = None,
    checks: ChecksFolder = None,
) -> None:
    """Draw a figure from the measurement table, or from profiles, tunings or curves."""
    from lorafusion.lab.report.registry import draw

    draw(name, files, out, model, checks)
    print(f"{out}.png, .pdf, .csv")


@page_app.command("checks")
def page_checks(
    verdicts: Annotated[list[Path], typer.Argument(help="files that `lorafusion check` wrote")], out: Out
) -> None:
    """The checks with their figures."""
    from lorafusion.lab.report.pages import checks_page

    write(out, checks_page(verdicts))
