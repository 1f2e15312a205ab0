"""What the modules of the command line share."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from lorafusion.core.config import CONFIGS
from lorafusion.core.files import require_outputs
from lorafusion.core.schema import UserError
from lorafusion.core.seals import SUFFIX

# Plain text: an error stays one line in a log too.
PLAIN = {"no_args_is_help": True, "add_completion": False, "pretty_exceptions_enable": False, "rich_markup_mode": None}


@dataclass(frozen=True)
class Written:
    """Marks the parameter of a command that names what it writes. files: the files that a value of it stands for."""

    files: Callable[[Path], list[Path]] = lambda path: [path]


class CommandLine(typer.Typer):
    """A group of commands, none of which is begun where something would be lost by it: no output of a command is a
    device, a folder, or a file that it reads."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**PLAIN | options)

    def command(self, name: str | None = None, example: str | None = None, **options: Any) -> Callable:
        """As `typer.Typer.command`. example: a call that works, the last line of the command's help."""
        register = super().command(name, epilog=example and f"Example: {example}", **options)

        def add(function: Callable) -> Callable:
            register(_careful(function))
            return function

        return add


def _careful(function: Callable) -> Callable:
    """A command that looks at its outputs first. What it reads are all other parameters that name a file, and the
    configuration."""
    hints = get_type_hints(function, include_extras=True)
    marks = {
        name: mark
        for name, hint in hints.items()
        for mark in getattr(hint, "__metadata__", ())
        if isinstance(mark, Written)
    }

    @wraps(function)
    def command(**values: Any) -> Any:
        outputs = [file for name, mark in marks.items() for value in _paths(values[name]) for file in mark.files(value)]
        inputs = [path for name in values.keys() - marks.keys() for path in _paths(values[name])]
        configuration = [path for path in CONFIGS.rglob("*") if path.is_file()]
        require_outputs(outputs, [*inputs, *configuration])
        try:
            return function(**values)
        except OSError as error:  # a disk that is full, a folder that nothing can be made in
            if error.filename is None:
                raise
            raise UserError(
                f"{error.filename}: {error.strerror}; expected a file that can be read or written"
            ) from error

    return command


def _paths(value: object) -> Iterable[Path]:
    """Paths of a parameter's value, a name that may be one included."""
    if isinstance(value, str | Path):
        yield Path(value)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _paths(item)


def figure_files(stem: Path) -> list[Path]:
    if stem.name in ("", ".."):
        raise UserError(f"{stem}: expected a path without suffix, whose last part is a name, found a folder")
    return [stem.with_name(f"{stem.name}.{suffix}") for suffix in ("png", "pdf", "csv", f"csv{SUFFIX}")]


Out = Annotated[Path, typer.Option("--out", "-o", help="file to write"), Written()]
ChecksFolder = Annotated[
    Path | None, typer.Option("--checks", help="folder of the verdicts; by default `checks` beside the table")
]
