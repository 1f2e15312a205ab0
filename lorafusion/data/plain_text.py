"""Plain text as samples of equal length: all files end to end, cut every so many tokens.

A file is tokenised in windows of some lines, each with the end of the one before it. Two windows are joined in the
middle of what they share, at a token that both have: so the tokens are those of the whole file, without the borders of
windows in them and without the blank that some tokenizers put before a text.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple, TypeVar

from lorafusion.data.blocks import TextData
from lorafusion.data.encoder import Encoder, Specials, Tokenised, begins_with, ends_with
from lorafusion.errors import UserError
from lorafusion.scheduler.common import progress

PIECE = 1 << 18  # characters of a window, about
SHARED = 1 << 10  # characters of the window before that a window has too
WINDOWS = 16  # that are tokenised in parallel
LARGE = 100  # windows from which on a progress bar is shown

Item = TypeVar("Item")


class Window(NamedTuple):
    """A part of a file that begins at the character `start`; from `shared` on the next window has it too."""

    start: int
    text: str
    shared: int


class Token(NamedTuple):
    """A token and the characters of the file that it stands for."""

    id: int
    start: int
    stop: int


def token_runs(block: TextData, encoder: Encoder, specials: Specials) -> Iterator[list[int]]:
    """The tokens of all files of a block, one run after another, each file between its special tokens."""
    runs = (run for path in block.text for run in _file_runs(path, encoder, specials))
    total = sum(path.stat().st_size for path in block.text) // PIECE
    with progress(total >= LARGE) as bar:
        yield from bar.track(runs, total=total, description=block.dataset)


def batches(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    remaining = iter(items)
    while batch := list(islice(remaining, size)):
        yield batch


def _file_runs(path: Path, encoder: Encoder, specials: Specials) -> Iterator[list[int]]:
    held: list[Token] = []  # of the window before: what this one has too, and may know better
    closed = begun = False
    for some in batches(_windows(path), WINDOWS):
        for window, tokens in zip(some, encoder.tokenised([window.text for window in some]), strict=True):
            if not begun and not begins_with(specials, tokens.ids):
                yield specials.before
            begun, closed = True, ends_with(specials, window.text, tokens)
            # While a window begins with the file, nothing of the one before was told yet.
            joined = _joined(held if window.start else [], window, _placed(tokens, window.start), encoder)
            held = [token for token in joined if token.start >= window.shared]
            yield [token.id for token in joined if token.start < window.shared]
    if not begun:
        raise UserError(f"{path}: no text in the file")
    yield [token.id for token in held]
    if not closed:
        yield specials.after


def _joined(held: list[Token], window: Window, tokens: list[Token], encoder: Encoder) -> list[Token]:
    """The tokens from the first held one on: those held up to the middle of what is shared, then the window's own."""
    if not held:
        return tokens
    places = {token: index for index, token in reversed(list(enumerate(held)))}
    for index, token in enumerate(tokens):
        if token.start >= window.start + SHARED // 2 and token in places:
            return held[: places[token]] + tokens[index:]
    # A word of more characters than are shared: it is cut where the window before ended.
    stop = held[-1].stop
    (rest,) = encoder.tokenised([window.text[stop - window.start :]])
    return held + _placed(rest, stop)


def _placed(tokens: Tokenised, start: int) -> list[Token]:
    return [Token(id, start + first, start + last) for id, (first, last) in zip(*tokens, strict=True)]


def _windows(path: Path) -> Iterator[Window]:
    start, shared = 0, ""
    for piece in _pieces(path):
        text = shared + piece
        following = text[-SHARED:]
        yield Window(start, text, start + len(text) - len(following))
        start += len(text) - len(following)
        shared = following


def _pieces(path: Path) -> Iterator[str]:
    """Some lines at a time, line ends as they are."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            while lines := file.readlines(PIECE):
                yield "".join(lines)
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error})") from None
