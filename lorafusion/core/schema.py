"""The ground that all data of the project stands on: the error of a user's mistake, and the bases of checked data.

A mistake is one line that names the file, the key, what was found and what was expected. `Data` is what programs write
and read as JSON; `Config` is what people write as YAML. Both know no unknown key, no number that is not finite and no
word for a number.
"""

from __future__ import annotations

import math
import re
import types
from pathlib import Path
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

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
    value = first["input"]
    shown = "" if isinstance(value, dict | list | tuple | BaseModel) else f" (found {shortened(repr(value), FOUND)})"
    message = first["msg"].removeprefix("Value error, ")
    more = f"; and {len(mistakes) - 1} more" if len(mistakes) > 1 else ""
    return f"{key}: {message[0].lower()}{message[1:]}{shown}{more}"


def one_of(kind: str, name: str, names: list[str] | set[str], source: str | Path) -> None:
    """Raise unless `name` is among `names`."""
    if name not in names:
        raise UserError(f"{source}: unknown {kind} {name!r}; known: {', '.join(sorted(names))}")


# In JSON a number is a number: neither true nor "1".
Int = Annotated[int, Field(strict=True)]
Float = Annotated[float, Field(strict=True)]

# The most of something that a file may ask for: far beyond any use, and far below what would fill a memory before
# anything is said.
MOST_REPEATS = 1000
MOST_SAMPLES = 1_000_000
MOST_TOKENS = 2**31 - 1
MOST_MINUTES = 43_200  # 30 days
MOST_PROCESSES = 65_536
MOST_SEED = 2**31 - 1  # adapter i draws with the seed + i, below 2**32
MOST_EPOCHS = 10_000
MOST_STEPS = 1_000_000_000
# Numbers of an optimizer, beyond which no training is one.
MOST_RATE = 100.0
MOST_ALPHA = 1e6
MOST_DECAY = 100.0
MOST_NORM = 1e9
LEAST_SCALE, MOST_SCALE = 1e-2, 1e6  # what sample lengths are divided by

EXPONENT = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+")


class Data(BaseModel):
    """Data that does not change, with no key that is not known and no number that is not finite."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Config(Data):
    """Settings as people write them. A misspelt key is an error, not a default."""

    @model_validator(mode="before")
    @classmethod
    def _numbers_are_meant_as_numbers(cls, data: object) -> object:
        if not isinstance(data, dict):
            return data
        annotations = {name: field.annotation for name, field in cls.model_fields.items()}
        return {key: meant(value, annotations[key]) if key in annotations else value for key, value in data.items()}


def meant(value: Any, annotation: Any) -> Any:
    """A value of a YAML file as a number, where only a number can be meant: YAML 1.1 takes `1e-1` for a word. `yes`,
    which it takes for True and Python for 1, becomes a word, which no number is."""
    kinds = _kinds(annotation)
    if isinstance(value, list):
        inner = next((get_args(kind) for kind in kinds if get_origin(kind) in (list, tuple)), ())
        same = len(inner) == 1 or Ellipsis in inner
        each = inner[:1] * len(value) if same else inner
        return [meant(*pair) for pair in zip(value, each, strict=True)] if len(each) == len(value) else value
    if isinstance(value, dict):
        inner = next((get_args(kind) for kind in kinds if get_origin(kind) is dict), ())
        return {key: meant(item, inner[1]) for key, item in value.items()} if inner else value
    if not {int, float} & kinds or str in kinds:
        return value
    if isinstance(value, bool) and bool not in kinds:
        return str(value).lower()
    if isinstance(value, str) and EXPONENT.fullmatch(value):
        number = float(value)
        return int(number) if float not in kinds and math.isfinite(number) and number.is_integer() else number
    return value


def _kinds(annotation: Any) -> set[Any]:
    """The types that a value may have."""
    if get_origin(annotation) is Annotated:
        return _kinds(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        return set().union(*map(_kinds, get_args(annotation)))
    return {annotation}
