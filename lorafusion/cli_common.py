"""What the modules of the command line share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

# Plain text: an error stays one line in a log too.
PLAIN = {"no_args_is_help": True, "add_completion": False, "pretty_exceptions_enable": False, "rich_markup_mode": None}

Out = Annotated[Path, typer.Option("--out", "-o", help="file to write")]
Stem = Annotated[Path, typer.Option("--out", "-o", help="path without suffix; .png, .pdf and .csv are written")]
Log = Annotated[Path | None, typer.Option(help="where this command's output goes, for the record")]
