"""The ground that all data of the project stands on: the error of a user's mistake, and the bases of checked data.

A mistake is one line that names the file, the key, what was found and what was expected. `Data` is what programs write
and read as JSON; `Config` is what people write as YAML. Both know no unknown key, no number that is not finite and no
word for a number.
"""

import math
import re
import types
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

Model = TypeVar("Model", bound=BaseModel)


LONGEST_LINE = 300  # characters, of all that is said
LONGEST = LONGEST_LINE - len("error: ")  # of a mistake, which is printed after that word
FOUND = 80  # characters of a value that was found
MOST_MISTAKES = 20  # that are told of one file


class UserError(ValueError):
    """Mistakes in the input, each a line of at most `LONGEST` characters. The command line prints them and exits with
    status 2."""

    def __init__(self, *mistakes: str) -> None:
        self.mistakes = [shortened(printable(mistake), LONGEST) for mistake in mistakes]
        super().__init__(*self.mistakes)

    def __str__(self) -> str:
        more = len(self.mistakes) - MOST_MISTAKES
        return "\n".join(self.mistakes[:MOST_MISTAKES] + ([f"and {more} more mistakes"] if more > 0 else []))


class Mistakes:
    """Gathers the mistakes of several parts of a file, so that all of them are told at once."""

    def __init__(self) -> None:
        self._lines: list[str] = []

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """Takes the mistakes of a part; what is read after it goes on."""
        try:
            yield
        except UserError as error:
            self._lines += error.mistakes

    def require_none(self) -> None:
        if self._lines:
            raise UserError(*self._lines)


def printable(text: str) -> str:
    """A text as one line that a terminal shows as it is."""
    line = " ".join(text.split())
    return line if line.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)


def shortened(text: str, most: int) -> str:
    """A text without its middle, if it has more than so many characters: what it is about stands at the beginning, and
    what to do at the end."""
    if len(text) <= most:
        return text
    tail = most // 2
    return f"{text[: most - tail - 5]} ... {text[-tail:]}"


def shown(value: object) -> str:
    """A value that was found, in a few words."""
    if isinstance(value, dict | BaseModel):
        return "a mapping"
    return "a list" if isinstance(value, list | tuple) else shortened(repr(value), FOUND)


def validated(model: type[Model], data: object, source: str | Path) -> Model:
    """`data` as an instance of `model`; mistakes become a `UserError` naming `source` and the keys."""
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise UserError(*(f"{source}: {mistake}" for mistake in mistakes(error, model))) from None


def mistakes(error: ValidationError, model: type[BaseModel]) -> list[str]:
    """What is wrong with data for a model, a line a key. Unknown keys come first: a key that seems to be missing may be
    misspelt."""
    lines: dict[str, list[str]] = {}
    every = error.errors(include_url=False)
    for mistake in sorted(every, key=lambda mistake: mistake["type"] != UNKNOWN):
        place = mistake["loc"]
        if mistake["type"] == "too_short" and any(other["loc"][:-1][: len(place)] == place for other in every):
            continue  # pydantic counts only the items that are right
        key, names = _place(model, place, mistake["type"] == UNKNOWN)
        lines.setdefault(key, []).append(_message(mistake, names))
    return [f"{key}: {'; or '.join(dict.fromkeys(messages))}" for key, messages in lines.items()]


def _message(mistake: Any, names: set[str]) -> str:
    """names: the keys that may stand where the mistake is."""
    kind, value, message = mistake["type"], mistake["input"], mistake["msg"].removeprefix("Value error, ")
    if kind == UNKNOWN:
        return unknown_key(mistake["loc"][-1], value, names)
    if kind == "model_type":
        return f"expected a mapping (found {shown(value)})"
    whole = kind in ("missing", "value_error") and isinstance(value, dict | list | tuple | BaseModel)
    return message[0].lower() + message[1:] + ("" if whole else f" (found {shown(value)})")


def unknown_key(key: object, value: object, names: Iterable[str], others: Iterable[str] = ()) -> str:
    """What is wrong with a key that is none of those that may stand there. others: that may too, but are not listed."""
    close = get_close_matches(str(key), [*names, *others], 1)
    hint = f"did you mean {close[0]}?" if close else f"known: {', '.join(sorted(names))}"
    return f"unknown key (found {shown(value)}); {hint}"


def _place(model: type[BaseModel], location: tuple[int | str, ...], unknown: bool) -> tuple[str, set[str]]:
    """A place in data as people write it, without the kinds that pydantic tried there; and the keys that may stand
    there. unknown: the last part of it is none of them."""
    kinds, parts, names = {model}, [], set()
    for depth, part in enumerate(location, 1):
        models = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)]
        fields = {name: field.annotation for kind in models for name, field in kind.model_fields.items()}
        kind_names = {kind for kind in kinds if getattr(kind, "__name__", "") == part}
        is_key = part in fields or isinstance(part, int) or (unknown and depth == len(location))
        if not is_key and (kind_names or len(kinds - {types.NoneType}) > 1):
            kinds = kind_names or kinds
            continue
        parts.append(str(part))
        names = set(fields)
        items = [get_args(kind)[1:] if get_origin(kind) is dict else get_args(kind) for kind in kinds]
        inner = {item for arguments in items for item in arguments if item is not Ellipsis}
        kinds = _kinds(fields[part]) if part in fields else set().union(*map(_kinds, inner))
    return ".".join(parts) or "(top level)", names


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
MOST_PROCESSES = 4096
MOST_STAGES = 128  # of a pipeline: each has a layer at least
MOST_LAYERS = 1000
MOST_SEED = 2**31 - 1  # adapter i draws with the seed + i, below 2**32
MOST_EPOCHS = 10_000
MOST_STEPS = 1_000_000_000
MOST_PRIORITY, MOST_WEIGHT = 1000, 1e6  # of a job
MOST_STREAM = 10_000_000  # samples of all epochs: a plan of them takes minutes and gigabytes
# Numbers of an optimizer, beyond which no training is one.
MOST_RATE = 100.0
MOST_ALPHA = 1e6
MOST_DECAY = 100.0
MOST_NORM = 1e9
LEAST_SCALE, MOST_SCALE = 1e-2, 1e6  # what sample lengths are divided by

UNKNOWN = "extra_forbidden"  # what pydantic calls a key that a model does not have
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
