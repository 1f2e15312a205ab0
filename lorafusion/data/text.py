"""Samples from text: rows of JSONL files and hub datasets through templates, plain text in blocks, as token ids.

Prompt and completion are tokenised apart, so that the border between what is given and what is learnt is exact. The
prompt has what the tokenizer puts before a text, the completion ends with the end-of-sequence token.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeVar

from lorafusion.data.blocks import HubData, JsonlData, TextData, fill
from lorafusion.errors import UserError
from lorafusion.models.checkpoint import HUB_ERRORS
from lorafusion.scheduler.common import progress

if TYPE_CHECKING:
    from datasets import Dataset

BATCH = 1000  # rows that are tokenised in parallel
LARGE = 10_000  # rows from which on a progress bar is shown
# Characters of plain text that are tokenised at once. Pieces end with a line, where tokens hardly ever reach across.
PIECE = 1 << 18
PIECES = 16
LARGE_TEXT = 100  # pieces from which on a progress bar is shown

Item = TypeVar("Item")


class Row(NamedTuple):
    """The fields of one row, and where it stands for the message of a mistake in it."""

    where: str
    fields: dict[str, object]


class Encoded(NamedTuple):
    """A sample: n token ids, of which those from `first_label` (1 to n - 1) on are learnt."""

    ids: list[int]
    first_label: int


@dataclass
class Counts:
    """What became of the samples of a dataset; the truncated ones are among those that are kept."""

    kept: int = 0
    truncated: int = 0
    too_long: int = 0
    empty: int = 0

    def __str__(self) -> str:
        return (
            f"{self.kept} samples, {self.truncated} of them truncated; dropped {self.too_long} as too long, "
            f"{self.empty} with nothing to learn"
        )


class Encoder:
    """What a tokenizer makes of texts, with its special tokens where a sample wants them."""

    def __init__(self, tokenizer) -> None:
        self.tokenizer = tokenizer
        self.end: int = tokenizer.eos_token_id
        around = self._encode([""], special=True)[0]
        # Some tokenizers close a text too. That would stand between prompt and completion.
        self._closes = around[-1:] == [self.end] and (len(around) > 1 or tokenizer.bos_token_id != self.end)

    def beginnings(self, texts: list[str]) -> list[list[int]]:
        """Token ids of texts that something follows, with what the tokenizer puts before a text."""
        encoded = self._encode(texts, special=True)
        return [ids[:-1] for ids in encoded] if self._closes else encoded

    def middles(self, texts: list[str]) -> list[list[int]]:
        """Token ids of texts without special tokens."""
        return self._encode(texts, special=False)

    def _encode(self, texts: list[str], special: bool) -> list[list[int]]:
        if not texts:
            return []
        # Not verbose: it would warn of texts longer than the model's positions, which are cut later.
        return self.tokenizer(
            texts, add_special_tokens=special, return_attention_mask=False, return_token_type_ids=False, verbose=False
        ).input_ids


def load_encoder(source: str, revision: str | None = None) -> Encoder:
    """The tokenizer in a local folder or a repository of the hub."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(source, revision=revision)
    except (*HUB_ERRORS, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"tokenizer {source!r}: neither in a local folder nor to be had from the hub ({reason})"
        ) from None
    if not tokenizer.is_fast:
        raise UserError(
            f"tokenizer {source!r}: expected a fast one with a tokenizer.json, found {type(tokenizer).__name__}"
        )
    if tokenizer.eos_token_id is None:
        raise UserError(f"tokenizer {source!r}: no eos_token, which has to end every sample")
    return Encoder(tokenizer)


@dataclass(frozen=True)
class SampleRule:
    """What samples are made of rows: how long one may be, what becomes of a longer one, whether prompts are learnt."""

    max_length: int
    too_long: Literal["truncate", "drop", "error"]
    learn_prompt: bool

    def sample(self, row: Row, prompt: list[int], completion: list[int], counts: Counts) -> Encoded | None:
        """The sample of a row, or None where it is dropped."""
        ids = prompt + completion
        if len(ids) > self.max_length:
            if self.too_long == "error":
                raise UserError(f"{row.where}: {len(ids)} tokens, more than max_length {self.max_length}")
            if self.too_long == "drop":
                counts.too_long += 1
                return None
            ids = ids[: self.max_length]
        first_label = 1 if self.learn_prompt else max(1, len(prompt))
        if len(ids) <= first_label:
            counts.empty += 1
            return None
        counts.truncated += len(ids) < len(prompt) + len(completion)
        counts.kept += 1
        return Encoded(ids, first_label)


def encode(
    block: JsonlData | HubData | TextData, encoder: Encoder, rule: SampleRule, counts: Counts
) -> Iterator[Encoded]:
    """The samples of a data block, in its order; `counts` tells afterwards what was dropped.

    Raises `UserError` for a file, a row or a dataset that cannot be used, and where no sample remains.
    """
    samples = _blocks(block, encoder, counts) if isinstance(block, TextData) else _rows(block, encoder, rule, counts)
    yield from samples
    if not counts.kept:
        raise UserError(f"{block.dataset}: no sample remains: {counts}")


def _rows(block: JsonlData | HubData, encoder: Encoder, rule: SampleRule, counts: Counts) -> Iterator[Encoded]:
    rows, total = _jsonl_rows(block) if isinstance(block, JsonlData) else _hub_rows(block)
    # The bar is opened where rows are used, so that it is gone before the message of a mistake in one.
    with progress(total >= LARGE) as bar:
        for batch in _batches(bar.track(rows, total=total, description=block.dataset), BATCH):
            prompts = encoder.beginnings([fill(block.prompt, row.fields, row.where) for row in batch])
            completions = encoder.middles([fill(block.completion, row.fields, row.where) for row in batch])
            for row, prompt, completion in zip(batch, prompts, completions, strict=True):
                sample = rule.sample(row, prompt, [*completion, encoder.end], counts)
                if sample:
                    yield sample


def _jsonl_rows(block: JsonlData) -> tuple[Iterator[Row], int]:
    """The rows of all files, and about how many there are."""
    total = 0
    for path in block.jsonl:
        with open(path, "rb") as file:
            total += sum(1 for _ in file)
    return (row for path in block.jsonl for row in _file_rows(path)), total


def _file_rows(path: Path) -> Iterator[Row]:
    empty = True
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                empty = False
                yield Row(f"{path}:{number}", _object(line, f"{path}:{number}"))
    if empty:
        raise UserError(f"{path}: no rows; expected a JSON object a line")


def _object(line: bytes, where: str) -> dict[str, object]:
    try:
        value = json.loads(line)
    except ValueError as error:  # bad JSON or bad UTF-8
        raise UserError(f"{where}: not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise UserError(f"{where}: expected a JSON object, found a {type(value).__name__}")
    return value


def hub_dataset(block: HubData) -> Dataset:
    """The dataset of a block, downloaded if it is not in the cache yet."""
    try:
        import datasets
    except ModuleNotFoundError:
        raise UserError(f"{block.dataset}: needs the `datasets` library: pip install datasets") from None
    try:
        return datasets.load_dataset(block.hub, name=block.subset, split=block.split, revision=block.revision)
    except (*HUB_ERRORS, datasets.exceptions.DatasetsError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{block.dataset}: not to be had from the hub ({reason})") from None


def _hub_rows(block: HubData) -> tuple[Iterator[Row], int]:
    dataset = hub_dataset(block)
    return (Row(f"{block.dataset}: row {number}", fields) for number, fields in enumerate(dataset)), len(dataset)


def _blocks(block: TextData, encoder: Encoder, counts: Counts) -> Iterator[Encoded]:
    """All files end to end, each with the tokens of its beginning and end, cut anew every `block` tokens."""
    ids: list[int] = []
    total = sum(path.stat().st_size for path in block.text) // PIECE
    with progress(total >= LARGE_TEXT) as bar:
        for more in bar.track(_token_runs(block, encoder), total=total, description=block.dataset):
            ids += more
            whole = len(ids) - len(ids) % block.block
            for start in range(0, whole, block.block):
                counts.kept += 1
                yield Encoded(ids[start : start + block.block], 1)
            ids = ids[whole:]
    if len(ids) > 1:
        counts.kept += 1
        yield Encoded(ids, 1)
    elif ids:
        counts.empty += 1


def _token_runs(block: TextData, encoder: Encoder) -> Iterator[list[int]]:
    """The tokens of each piece of text, and of the end of each file."""
    for path in block.text:
        first = True
        for texts in _batches(_text_pieces(path), PIECES):
            if first:
                yield encoder.beginnings(texts[:1])[0]
            yield from encoder.middles(texts[first:])
            first = False
        if first:
            raise UserError(f"{path}: no text in the file")
        yield [encoder.end]


def _text_pieces(path: Path) -> Iterator[str]:
    try:
        with open(path, encoding="utf-8-sig") as file:
            while lines := file.readlines(PIECE):
                yield "".join(lines)
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error})") from None


def _batches(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    remaining = iter(items)
    while batch := list(islice(remaining, size)):
        yield batch
