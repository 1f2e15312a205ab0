"""What a job may be trained or evaluated on: the data blocks of a jobs file, and the templates in them.

The pydantic models are the schema. A block's kind is told by the one key that only it has: `jsonl`, `hub`, `text` or
`synthetic`.
"""

import json
from collections.abc import Iterator, Mapping
from functools import lru_cache, partial
from pathlib import Path
from string import Formatter
from typing import Annotated, NamedTuple

from pydantic import BeforeValidator, Field, ValidationInfo, field_validator

from lorafusion.core.files import named_path, parse_json
from lorafusion.core.schema import (
    LEAST_SCALE,
    MOST_SAMPLES,
    MOST_SCALE,
    MOST_TOKENS,
    Config,
    Mistakes,
    UserError,
    shown,
    validated,
)
from lorafusion.data.lengths import MIXED, read_table

SYNTHETIC = "synthetic:"  # how the name of a dataset begins whose tokens are made up when they are needed
SPEAKER_AND_TEXT = (("role", "content"), ("from", "value"))  # keys of a message of a chat, in both common forms
MOST_LINE = 1 << 26  # bytes of a row
Files = Annotated[
    tuple[Path, ...],
    BeforeValidator(
        lambda value: [value] if isinstance(value, str | Path) else value,
        json_schema_input_type=str | list[str],
    ),
    Field(min_length=1, description="one file, or a list of files"),
]


class Row(NamedTuple):
    """The fields of a row, and where it stands for the message of a mistake in it."""

    where: str
    fields: dict[str, object]


class TemplatedRows(Config):
    """Rows with named fields, of which templates make the two parts of a sample."""

    prompt: str = Field(default="", description="template with {fields}; what comes before the text to learn")
    completion: str = Field(description="template with {fields}; what is learnt, the end of the text included")

    @field_validator("prompt", "completion")
    @classmethod
    def _is_sound(cls, value: str, info: ValidationInfo) -> str:
        fields = {field for text in (value, info.data.get("prompt", "")) for _, field in pieces(text)}
        if info.field_name == "completion" and fields <= {None}:
            raise ValueError("no {field} in it nor in the prompt, so that all samples would be the same")
        if info.field_name == "completion" and not value.strip():
            raise ValueError("blank, so that there is nothing to learn")
        return value


class JsonlData(TemplatedRows):
    """Files with one JSON object a line."""

    jsonl: Files

    @property
    def dataset(self) -> str:
        return f"jsonl:{_names(self.jsonl)}"


class HubData(TemplatedRows):
    """A dataset of the Hugging Face hub, read by the `datasets` library."""

    hub: str = Field(min_length=1, description="repository on the hub")
    subset: str | None = None
    split: str = "train"
    revision: str | None = Field(default=None, description="commit or tag on the hub")

    @property
    def dataset(self) -> str:
        return "hub:" + "/".join(part for part in (self.hub, self.subset, self.split) if part)


class TextData(Config):
    """Plain text, cut into samples of equal length; all of it is learnt."""

    text: Files
    block: int = Field(
        default=2048, ge=2, le=MOST_TOKENS, description="tokens of a sample; the last one of all may be shorter"
    )

    @property
    def dataset(self) -> str:
        return f"text:{_names(self.text)}"


class SyntheticSamples(Config):
    """How many samples of which lengths are made up."""

    samples: int = Field(default=100, ge=1, le=MOST_SAMPLES)
    dataset: str = Field(default="xsum", description="whose sample lengths: a row of workloads/lengths.csv, or mixed")
    scale: float = Field(default=1.0, ge=LEAST_SCALE, le=MOST_SCALE, description="divides the lengths")

    @field_validator("dataset")
    @classmethod
    def _is_known(cls, value: str) -> str:
        datasets = {*read_table(), MIXED}
        if value not in datasets:
            raise ValueError(f"unknown dataset; known: {', '.join(sorted(datasets))}")
        return value


class SyntheticData(Config):
    """A toy language (`SyntheticTokens`): to try a run without a dataset or a tokenizer."""

    synthetic: SyntheticSamples

    @property
    def dataset(self) -> str:
        return f"{SYNTHETIC}{self.synthetic.dataset}"


Data = JsonlData | HubData | TextData | SyntheticData
KINDS: dict[str, type[Data]] = {"jsonl": JsonlData, "hub": HubData, "text": TextData, "synthetic": SyntheticData}


def data_block(value: object, source: str, folder: Path) -> Data:
    """The block that a mapping describes, its files found from `folder`; `UserError` names `source` and the key."""
    expected = f"expected a mapping with one of the keys {', '.join(KINDS)}"
    if not isinstance(value, dict):
        raise UserError(f"{source}: {expected}, found {shown(value)}")
    kinds = [kind for kind in KINDS if kind in value]
    if len(kinds) != 1:
        raise UserError(f"{source}: {expected}, found {', '.join(map(str, value)) or 'none'}")
    kind = kinds[0]
    block = validated(KINDS[kind], value, source)
    if kind not in ("jsonl", "text"):
        return block
    files = tuple(named_path(folder, path, f"{source}.{kind}") for path in getattr(block, kind))
    mistakes = Mistakes()
    for path in files:
        with mistakes.gathered():
            if not path.is_file():
                problem = "expected a file, found something else at" if path.exists() else "no such file"
                raise UserError(f"{source}.{kind}: {problem} {path}")
            if isinstance(block, JsonlData):
                _require_fields(block, path, source)
    mistakes.require_none()
    return block.model_copy(update={kind: files})


def _require_fields(block: JsonlData, path: Path, source: str) -> None:
    """Raise `UserError` where the templates cannot be filled from the first row of a file: a mistake in the block, that
    is told before anything is loaded."""
    try:
        where, fields = next(file_rows(path))
        if not is_blank(block.completion, fields):
            for template in (block.prompt, block.completion):
                fill(template, fields, where)
    except OSError as error:
        raise UserError(f"{source}: {path}: cannot be read ({error.strerror})") from None
    except UserError as error:
        raise UserError(*(f"{source}: {mistake}" for mistake in error.mistakes)) from None


def file_rows(path: Path) -> Iterator[Row]:
    """The rows of a JSONL file, blank lines left out. Raises `UserError` for a line that is none, and for no rows."""
    empty = True
    with open(path, "rb") as file:
        for number, line in enumerate(iter(partial(file.readline, MOST_LINE + 1), b""), 1):
            where = f"{path}:{number}"
            if len(line) > MOST_LINE:
                raise UserError(f"{where}: expected a row of at most {MOST_LINE} bytes, found more")
            if line.strip():
                empty = False
                fields = parse_json(line, where)
                if not isinstance(fields, dict):
                    raise UserError(f"{where}: expected a JSON object, found a {type(fields).__name__}")
                yield Row(where, fields)
    if empty:
        raise UserError(f"{path}: no rows; expected a JSON object a line")


@lru_cache
def pieces(template: str) -> tuple[tuple[str, str | None], ...]:
    """A template as (text, name of the field after it, if there is one); `{{` and `}}` stand for braces.

    Raises `ValueError` where braces do not match, a name is missing, or there is more than a name between them.
    """
    parts = []
    for text, field, format_spec, conversion in Formatter().parse(template):
        if field == "":
            raise ValueError("a field without a name")
        if format_spec or conversion:
            raise ValueError(f"field {field!r} has more than a name")
        parts.append((text, field))
    return tuple(parts)


def fill(template: str, row: Mapping[str, object], where: str) -> str:
    """A template with a row's fields: text as it is, everything else as JSON has it. `UserError` names `where` and the
    field that cannot be put in."""
    out = []
    for text, field in pieces(template):
        out.append(text)
        if field is None:
            continue
        if field not in row:
            raise UserError(f"{where}: no field {field!r}; found {', '.join(row) or 'none'}")
        if row[field] is None:
            raise UserError(f"{where}: field {field!r} is null; expected a value to put into the template")
        out.append(_as_text(row[field], f"{where}: field {field!r}"))
    return "".join(out)


def is_blank(template: str, row: Mapping[str, object]) -> bool:
    """Is there nothing in a row for the fields of a template: a null, or only empty or blank text?"""
    fields = [field for _, field in pieces(template) if field is not None]
    if any(field not in row for field in fields):
        return False  # a mistake, which `fill` tells
    values = [row[field] for field in fields]
    return bool(fields) and (
        any(value is None for value in values) or all(isinstance(value, str) and not value.strip() for value in values)
    )


def _as_text(value: object, where: str) -> str:
    """A field's value as it is put into a template."""
    if _is_conversation(value):
        raise UserError(
            f"{where} is a list of chat messages, expected text; render it with the tokenizer's chat template "
            "(`apply_chat_template`) and give prompt and answer as fields of their own"
        )
    try:
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, allow_nan=False)
        text.encode()
    except UnicodeEncodeError as error:
        half = ascii(error.object[error.start])
        raise UserError(f"{where} has {half}, half of a character (a lone surrogate); expected whole ones") from None
    except (TypeError, ValueError, RecursionError) as error:
        raise UserError(f"{where} is neither text nor JSON ({error})") from None
    return text


def _is_conversation(value: object) -> bool:
    """Is a value a list of chat messages? One that calls a tool may have no text."""
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        return False
    return any(
        all(speaker in item for item in value) and any(text in item for item in value)
        for speaker, text in SPEAKER_AND_TEXT
    )


def _names(paths: tuple[Path, ...]) -> str:
    return ",".join(path.name for path in paths)
