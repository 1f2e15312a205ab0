"""Rows of megabytes: only what is used of them is tokenised, and it is as if all of it were."""

from __future__ import annotations

import json
import random

import pytest

from lorafusion.core.schema import UserError
from lorafusion.data import blocks, text
from lorafusion.data import encoder as encoding
from lorafusion.data.blocks import JsonlData
from lorafusion.data.encoder import LONG, Encoder, load_encoder
from lorafusion.data.text import SampleCounts, SampleRule, encode
from tests.tiny_tokenizer import CORPUS, save_trained

DRAW = random.Random(0)
TEXTS = {
    "prose": " ".join(DRAW.choices(" ".join(CORPUS[:3]).split(), k=4000)),
    "code": "".join(DRAW.choices(["    ", "\n", "\t", "f(x)", " = ", "[1, 2]", "\n\n\n"], k=8000)),
    "no blanks": "".join(DRAW.choices("abcdefghijklmnopqrstuvwxyz", k=20_000)),
    "base64": "".join(DRAW.choices("ABCDEFabcdef0123456789+/=", k=20_000)),
    "one letter": "a" * 20_000,
    "two letters": "ri" * 10_000,
    "blanks": " " * 20_000,
    "line ends": "\n" * 20_000,
    "signs of several bytes": "".join(DRAW.choices("日本語🙂éï", k=20_000)),
    "special tokens": "".join(DRAW.choices(["<s>", "</s>", "cats", " "], k=6000)),
}


@pytest.fixture(scope="module", params=["bytes", "blanks"])
def encoder(tmp_path_factory, request):
    return load_encoder(str(save_trained(tmp_path_factory.mktemp(request.param), request.param)))


@pytest.fixture
def characters(monkeypatch):
    """How many are tokenised from here on, a call an entry."""
    calls = []
    whole = Encoder._encode

    def counting(self, texts, special):
        calls.append(sum(map(len, texts)))
        return whole(self, texts, special)

    monkeypatch.setattr(Encoder, "_encode", counting)
    return calls


@pytest.mark.parametrize("most", [1, 40, 300, 10_000_000])
@pytest.mark.parametrize("kind", TEXTS)
def test_the_beginning_of_a_text_has_the_tokens_of_the_whole(encoder, monkeypatch, kind, most):
    monkeypatch.setattr(encoding, "LONG", 2048)
    (whole,) = encoder.tokenised([TEXTS[kind]])
    for content in (TEXTS[kind], TEXTS[kind] + "."):
        (tokens,) = encoder.beginnings([content], most)
        assert tokens.ids[: most + 1] == whole.ids[: most + 1] or most >= len(whole.ids)
        assert tokens.offsets[: most + 1] == whole.offsets[: most + 1] or most >= len(whole.ids)


@pytest.mark.parametrize("too_long", ["truncate", "drop"])
@pytest.mark.parametrize("kind", TEXTS)
def test_samples_are_the_same_however_much_is_tokenised_at_once(encoder, monkeypatch, tmp_path, kind, too_long):
    rows = [{"q": q, "a": a} for q, a in ((TEXTS[kind], "x"), ("cats? ", TEXTS[kind]), ("cats? ", "four"))]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    block = JsonlData(jsonl=path, prompt="{q}", completion="{a}")
    results = []
    for long, characters in ((LONG, text.BATCH_CHARACTERS), (2048, 10)):
        monkeypatch.setattr(encoding, "LONG", long)
        monkeypatch.setattr(text, "BATCH_CHARACTERS", characters)
        counts = SampleCounts()
        results.append((list(encode(block, encoder, SampleRule(100, too_long, False), counts)), counts))
    assert results[0] == results[1]


def test_a_row_of_megabytes_is_tokenised_as_far_as_it_is_used(encoder, characters):
    (tokens,) = encoder.beginnings([TEXTS["prose"] * 150], 4096)
    assert len(tokens.ids) > 4096
    assert characters == [LONG]


def test_blanks_that_are_few_tokens_are_tokenised_further(encoder, characters, monkeypatch):
    monkeypatch.setattr(encoding, "LONG", 2048)
    encoder.beginnings([" " * 100_000], 2000)
    assert sum(characters) < 2 * 100_000


def test_a_row_that_must_not_be_too_long_is_named(encoder, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"a": TEXTS["prose"] * 150}) + "\n")
    with pytest.raises(UserError, match=r"rows\.jsonl:1: at least \d+ tokens, more than max_length 100$"):
        list(encode(JsonlData(jsonl=path, completion="{a}"), encoder, SampleRule(100, "error", False), SampleCounts()))


def test_a_line_has_an_end(encoder, tmp_path, monkeypatch):
    monkeypatch.setattr(blocks, "MOST_LINE", 100)
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"a": "x"}) + "\n" + json.dumps({"a": 93 * "x"}) + "\n")
    with pytest.raises(UserError, match=r"rows\.jsonl:2: expected a row of at most 100 bytes, found more$"):
        list(encode(JsonlData(jsonl=path, completion="{a}"), encoder, SampleRule(100, "drop", False), SampleCounts()))
    path.write_text(json.dumps({"a": 90 * "x"}))
    assert list(
        encode(JsonlData(jsonl=path, completion="{a}"), encoder, SampleRule(100, "drop", False), SampleCounts())
    )
