"""What a tokenizer makes of texts, with the special tokens that a sample begins and ends with, each of them once."""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple

from lorafusion.core.hub import read_settings, require_no_links
from lorafusion.core.schema import UserError

# What transformers reads as if nothing could be wrong with it.
FILES = ("tokenizer_config.json", "tokenizer.json", "special_tokens_map.json", "added_tokens.json")
PROBE = "a"  # a text to see what the tokenizer puts around it
LONG = 1 << 16  # characters of a text that is tokenised as a whole, whatever is used of it
MARGIN = 1 << 10  # characters before a cut, in which tokens may be others than without it


class Tokenised(NamedTuple):
    """n token ids of a text without special tokens of our own, and where in the text each begins and ends."""

    ids: list[int]
    offsets: list[tuple[int, int]]


class Specials(NamedTuple):
    """Token ids that go before and after a text."""

    before: list[int]
    after: list[int]


class Encoder:
    """A fast tokenizer of the transformers library."""

    def __init__(self, tokenizer, source: str) -> None:
        self.tokenizer, self.source = tokenizer, source
        bare, dressed = (self._encode([PROBE], special).input_ids[0] for special in (False, True))
        start = next((i for i in range(len(dressed)) if dressed[i : i + len(bare)] == bare), None)
        if start is None:
            raise UserError(f"tokenizer {source!r}: its special tokens change those of a text, expected them around it")
        self._own = Specials(dressed[:start], dressed[start + len(bare) :])  # what the tokenizer itself would add

    def tokenised(self, texts: Sequence[str]) -> list[Tokenised]:
        """What the tokenizer makes of each text. Special tokens that are written out in it are those tokens."""
        if not texts:
            return []
        encoded = self._encode(list(texts), special=False)
        return [Tokenised(*pair) for pair in zip(encoded.input_ids, encoded.offset_mapping, strict=True)]

    def beginnings(self, texts: Sequence[str], most: int) -> list[Tokenised]:
        """As `tokenised`; but of a long text that has more than `most` tokens perhaps only the first of them, at least
        one more than that. A row of megabytes takes no more time and memory than what is used of it."""
        size = max(LONG, 8 * most)
        return [
            self._beginning(text, size, tokens, most) if len(text) > size else tokens
            for text, tokens in zip(texts, self.tokenised([text[:size] for text in texts]), strict=True)
        ]

    def _beginning(self, text: str, size: int, tokens: Tokenised, most: int) -> Tokenised:
        """tokens: of the first `size` characters."""
        while size < len(text):
            sure = bisect_right(tokens.offsets, size - MARGIN, key=itemgetter(1))
            if sure > most:
                return Tokenised(tokens.ids[:sure], tokens.offsets[:sure])
            size *= 4
            (tokens,) = self.tokenised([text[:size]])
        return tokens

    def specials(self, add_bos: bool | None, add_eos: bool) -> Specials:
        """What goes around a text. add_bos: None for what the tokenizer itself puts before a text. Raises `UserError`
        for a token that the tokenizer has not."""
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        if add_bos and bos is None and not self._own.before:
            raise UserError(f"tokenizer {self.source!r}: no bos_token to begin a sample with, as add_bos asks for")
        if add_eos and eos is None:
            raise UserError(f"tokenizer {self.source!r}: no eos_token to end a sample with; or set add_eos to false")
        before = [] if add_bos is False else self._own.before or ([bos] if add_bos else [])
        closes = self._own.after[-1:] == [eos]
        return Specials(before, [*self._own.after, *([] if closes else [eos])] if add_eos else [])

    def _encode(self, texts: list[str], special: bool):
        with _reading(self.source):
            # Not verbose: it would warn of texts longer than the model's positions, which are cut later.
            return self.tokenizer(
                texts, add_special_tokens=special, return_attention_mask=False, return_token_type_ids=False,
                return_offsets_mapping=True, verbose=False,
            )  # fmt: skip


@contextmanager
def _reading(source: str) -> Iterator[None]:
    """Within it the library reads or uses the files of a tokenizer."""
    try:
        yield
    except Exception as error:  # the border of a library: of damaged files it raises anything, Exception itself too
        fault = "its files are damaged or unknown to transformers" if Path(source).is_dir() else "the hub gave none"
        raise UserError(f"tokenizer {source!r}: {fault} ({' '.join(str(error).split())[:200]})") from None


def begins_with(specials: Specials, ids: Sequence[int]) -> bool:
    """Does a text begin with its special token already, as one that a chat template made?"""
    return bool(specials.before) and list(ids[:1]) == specials.before[:1]


def ends_with(specials: Specials, text: str, tokens: Tokenised) -> bool:
    """Does a text end with its special token already, blanks after it aside?"""
    for token, (start, stop) in zip(reversed(tokens.ids), reversed(tokens.offsets), strict=True):
        if text[start:stop].strip():
            return specials.after[-1:] == [token]
    return False


def load_encoder(source: str, revision: str | None = None) -> Encoder:
    """The tokenizer in a local folder or a repository of the hub."""
    from transformers import AutoTokenizer

    require_no_links(source)
    for name in FILES:
        read_settings(source, name, revision)
    with _reading(source):
        tokenizer = AutoTokenizer.from_pretrained(source, revision=revision, trust_remote_code=False)
    if not tokenizer.is_fast:
        raise UserError(
            f"tokenizer {source!r}: expected a fast one with a tokenizer.json, found {type(tokenizer).__name__}"
        )
    return Encoder(tokenizer, source)
