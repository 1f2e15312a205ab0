"""Errors that are the user's to mend: one line that names the file, the key, what was found and what was expected."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

Model = TypeVar("Model", bound=BaseModel)


LONGEST = 300  # characters of a message
FOUND = 80  # characters of a value that was found


class UserError(ValueError):
    """A mistake in the input. The command line prints it as one line, of at most `LONGEST` characters, and exits with
    status 2."""

    def __init__(self, message: str = "") -> None:
        super().__init__(shortened(" ".join(message.split()), LONGEST))


def shortened(text: str, most: int) -> str:
    """A text without its middle, if it has more than so many characters: what it is about stands at the beginning, and
    what to do at the end."""
    if len(text) <= most:
        return text
    tail = most // 2
    return f"{text[: most - tail - 5]} ... {text[-tail:]}"


def validated(model: type[Model], data: object, source: str | Path) -> Model:
    """`data` as an instance of `model`; a mistake becomes a `UserError` naming `source` and the key."""
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise UserError(f"{source}: {describe(error)}") from None


def describe(error: ValidationError) -> str:
    """The first mistake of a pydantic error in one line, and how many more there are."""
    mistakes = error.errors(include_url=False)
    first = mistakes[0]
    key = ".".join(str(part) for part in first["loc"]) or "(top level)"
    found = first["input"]
    shown = "" if isinstance(found, dict | list | tuple | BaseModel) else f" (found {shortened(repr(found), FOUND)})"
    message = first["msg"].removeprefix("Value error, ")
    more = f"; and {len(mistakes) - 1} more" if len(mistakes) > 1 else ""
    return f"{key}: {message[0].lower()}{message[1:]}{shown}{more}"


def one_of(kind: str, name: str, known: list[str] | set[str], source: str | Path) -> None:
    """Raise unless `name` is among `known`."""
    if name not in known:
        raise UserError(f"{source}: unknown {kind} {name!r}; known: {', '.join(sorted(known))}")
