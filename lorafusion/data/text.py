"""Samples from text: rows of JSONL files and hub datasets through templates, plain text in blocks, as token ids.

A row is what the tokenizer makes of its prompt and its completion as one text, so that a model meets the tokens that it
will meet when it is used. What is learnt begins with the first token that reaches into the completion: a token that
spans the border belongs to it. No special token stands twice, where a chat template has written them out already.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Literal, NamedTuple

from lorafusion.core.hub import HUB_ERRORS
from lorafusion.core.plugins import import_extra
from lorafusion.core.progress import progress
from lorafusion.core.schema import UserError
from lorafusion.data.blocks import HubData, JsonlData, Row, TextData, file_rows, fill, is_blank
from lorafusion.data.encoder import Encoder, Specials, begins_with, ends_with
from lorafusion.data.plain_text import token_runs

if TYPE_CHECKING:
    from datasets import Dataset

BATCH, BATCH_CHARACTERS = 1000, 1 << 24  # rows that are tokenised in parallel, and when fewer are enough
PART = 1 << 20  # bytes that are read at once to count lines
LARGE = 10_000  # rows from which on a progress bar is shown


class Text(NamedTuple):
    """A row's prompt and completion as one text, and where in it the completion begins."""

    where: str
    whole: str
    border: int


class Encoded(NamedTuple):
    """A sample: n token ids, of which those from `first_label` (1 to n - 1) on are learnt."""

    ids: list[int]
    first_label: int


@dataclass
class SampleCounts:
    """What became of the samples of a dataset; the truncated ones are among those that are kept."""

    kept: int = 0
    truncated: int = 0
    too_long: int = 0
    blank: int = 0
    empty: int = 0

    def __str__(self) -> str:
        return (
            f"{self.kept} samples, {self.truncated} of them truncated; dropped {self.too_long} as too long, "
            f"{self.blank} with an empty or null completion, {self.empty} with nothing left to learn"
        )


@dataclass(frozen=True)
class SampleRule:
    """What samples are made of rows: how long one may be, what becomes of a longer one, whether prompts are learnt,
    which special tokens are added (add_bos None: what the tokenizer puts before a text)."""

    max_length: int
    too_long: Literal["truncate", "drop", "error"]
    learn_prompt: bool
    add_bos: bool | None = None
    add_eos: bool = True

    def sample(self, where: str, whole: Encoded, counts: SampleCounts) -> Encoded | None:
        """The sample of a row, or None where it is dropped. whole: its tokens, or more of them than a sample may have;
        where: it stands."""
        ids = whole.ids
        if len(ids) > self.max_length:
            if self.too_long == "error":
                raise UserError(f"{where}: at least {len(ids)} tokens, more than max_length {self.max_length}")
            if self.too_long == "drop":
                counts.too_long += 1
                return None
            ids = ids[: self.max_length]
        first_label = 1 if self.learn_prompt else max(1, whole.first_label)
        if len(ids) <= first_label:
            counts.empty += 1
            return None
        counts.truncated += len(ids) < len(whole.ids)
        counts.kept += 1
        return Encoded(ids, first_label)


def encode(
    block: JsonlData | HubData | TextData, encoder: Encoder, rule: SampleRule, counts: SampleCounts
) -> Iterator[Encoded]:
    """The samples of a data block, in its order; `counts` tells afterwards what was dropped.

    Raises `UserError` for a file, a row or a dataset that cannot be used, and where no sample remains.
    """
    specials = encoder.specials(rule.add_bos, rule.add_eos)
    if isinstance(block, TextData):
        yield from _blocks(block, encoder, specials, counts)
    else:
        yield from _rows(block, encoder, specials, rule, counts)
    if not counts.kept:
        raise UserError(f"{block.dataset}: no sample remains: {counts}")


def _rows(
    block: JsonlData | HubData, encoder: Encoder, specials: Specials, rule: SampleRule, counts: SampleCounts
) -> Iterator[Encoded]:
    rows, total = _jsonl_rows(block) if isinstance(block, JsonlData) else _hub_rows(block)
    # The bar is opened where rows are used, so that it is gone before the message of a mistake in one.
    with progress(total >= LARGE) as bar:
        texts = _texts(block, bar.track(rows, total=total, description=block.dataset), counts)
        for batch in _batches(texts):
            for text, whole in zip(batch, _joined(batch, encoder, specials, rule.max_length), strict=True):
                sample = rule.sample(text.where, whole, counts)
                if sample:
                    yield sample


def _texts(block: JsonlData | HubData, rows: Iterable[Row], counts: SampleCounts) -> Iterator[Text]:
    """What the templates make of rows, but for those with nothing to learn."""
    for where, fields in rows:
        if is_blank(block.completion, fields):
            counts.blank += 1
            continue
        prompt, completion = (fill(template, fields, where) for template in (block.prompt, block.completion))
        yield Text(where, prompt + completion, len(prompt))


def _batches(texts: Iterable[Text]) -> Iterator[list[Text]]:
    batch: list[Text] = []
    characters = 0
    for text in texts:
        batch.append(text)
        characters += len(text.whole)
        if len(batch) == BATCH or characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    yield batch


def _joined(texts: list[Text], encoder: Encoder, specials: Specials, most: int) -> Iterator[Encoded]:
    """Prompts with their completions, special tokens included; of a long one perhaps only more than `most` tokens."""
    for text, tokens in zip(texts, encoder.beginnings([text.whole for text in texts], most), strict=True):
        before = [] if begins_with(specials, tokens.ids) else specials.before
        after = [] if ends_with(specials, text.whole, tokens) else specials.after
        # Without a prompt all is learnt, also the token of a blank that is put before a text and has no characters.
        given = sum(stop <= text.border for _, stop in tokens.offsets) if text.border else 0
        yield Encoded([*before, *tokens.ids, *after], len(before) + given)


def _jsonl_rows(block: JsonlData) -> tuple[Iterator[Row], int]:
    """The rows of all files, and about how many there are."""
    total = 0
    for path in block.jsonl:
        with open(path, "rb") as file:
            total += sum(part.count(b"\n") for part in iter(partial(file.read, PART), b""))
    return (row for path in block.jsonl for row in file_rows(path)), total


def hub_dataset(block: HubData) -> Dataset:
    """The dataset of a block, downloaded if it is not in the cache yet."""
    datasets = import_extra("datasets", "hub", block.dataset)
    try:
        return datasets.load_dataset(block.hub, name=block.subset, split=block.split, revision=block.revision)
    except (*HUB_ERRORS, datasets.exceptions.DatasetsError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{block.dataset}: not to be had from the hub ({reason})") from None


def _hub_rows(block: HubData) -> tuple[Iterator[Row], int]:
    dataset = hub_dataset(block)
    return (Row(f"{block.dataset}: row {number}", fields) for number, fields in enumerate(dataset)), len(dataset)


def _blocks(block: TextData, encoder: Encoder, specials: Specials, counts: SampleCounts) -> Iterator[Encoded]:
    """All files end to end, cut anew every `block` tokens."""
    ids: list[int] = []
    for more in token_runs(block, encoder, specials):
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
