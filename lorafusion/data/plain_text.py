"""Plain text as samples of equal length: all files end to end, cut every so many tokens.

A file is tokenised in windows of some lines, each with the end of the one before it. Two windows are joined in the
middle of what they share, at a token that both have: so the tokens are those of the whole file, without the borders of
windows in them and without the blank that some tokenizers put before a text.
"""

from bisect import bisect_left
from collections.abc import Iterable, Iterator
from itertools import islice
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple, TypeVar

from lorafusion.core.progress import progress
from lorafusion.core.schema import UserError
from lorafusion.data.blocks import TextData
from lorafusion.data.encoder import Encoder, Specials, Tokenised, begins_with, ends_with

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
    blank = True
    for some in batches(_windows(path), WINDOWS):
        for window, tokens in zip(some, encoder.tokenised([window.text for window in some]), strict=True):
            if not begun and not begins_with(specials, tokens.ids):
                yield specials.before
            begun, closed = True, ends_with(specials, window.text, tokens)
            blank = blank and window.text.isspace()
            # While a window begins with the file, nothing of the one before was told yet.
            kept, first = _joint(held, window, tokens) if window.start and held else (0, 0)
            if first is None:
                # A word of more characters than are shared: it is cut where the window before ended.
                window = Window(held[-1].stop, window.text[held[-1].stop - window.start :], window.shared)
                (tokens,) = encoder.tokenised([window.text])
                kept, first = len(held), 0
            last = _first_from(tokens, window.shared - window.start)
            yield [token.id for token in held[:kept] if token.start < window.shared]
            yield tokens.ids[first:last]
            late = [token for token in held[:kept] if token.start >= window.shared]
            held = late + _placed(tokens, max(first, last), window.start)
    if blank:
        raise UserError(f"{path}: no text in the file")
    yield [token.id for token in held]
    if not closed:
        yield specials.after


def _joint(held: list[Token], window: Window, tokens: Tokenised) -> tuple[int, int | None]:
    """Where the tokens of a window follow those of the one before: how many of these are right, and the first of the
    window's own; None where no token after the middle of what is shared is in both."""
    places = {token: index for index, token in reversed(list(enumerate(held)))}
    for index in range(_first_from(tokens, SHARED // 2), _first_from(tokens, SHARED)):
        start, stop = tokens.offsets[index]
        place = places.get(Token(tokens.ids[index], window.start + start, window.start + stop))
        if place is not None:
            return place, index
    return len(held), None


def _first_from(tokens: Tokenised, character: int) -> int:
    """The index of the first token that begins at a character of its window, or after it."""
    return bisect_left(tokens.offsets, character, key=itemgetter(0))


def _placed(tokens: Tokenised, first: int, start: int) -> list[Token]:
    """The tokens from `first` on, by their characters in the file."""
    pairs = zip(tokens.ids[first:], tokens.offsets[first:], strict=True)
    return [Token(id, start + begin, start + end) for id, (begin, end) in pairs]


def _windows(path: Path) -> Iterator[Window]:
    start, shared = 0, ""
    for piece in _pieces(path):
        text = shared + piece
        following = text[-SHARED:]
        yield Window(start, text, start + len(text) - len(following))
        start += len(text) - len(following)
        shared = following


def _pieces(path: Path) -> Iterator[str]:
    """Some lines at a time, or a part of a long one; line ends as they are."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            while piece := file.read(PIECE) + file.readline(PIECE):
                yield piece
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error})") from None
