"""What is trained is what the tokenizer makes of prompt and completion as one text: transformers says what that is."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorafusion.core.schema import UserError
from lorafusion.data import plain_text
from lorafusion.data.blocks import JsonlData, TextData
from lorafusion.data.encoder import Encoder, load_encoder
from lorafusion.data.text import SampleCounts, SampleRule, encode
from tests.tiny_tokenizer import CORPUS, save_trained

LEARNT = SampleRule(1000, "error", learn_prompt=False)
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1) | st.sampled_from(CORPUS)


@pytest.fixture(scope="module")
def encoders(tmp_path_factory) -> dict[str, Encoder]:
    folder = tmp_path_factory.mktemp("tokenizers")
    return {kind: load_encoder(str(save_trained(folder / kind, kind))) for kind in ("bytes", "blanks")}


def samples(folder, encoder, *rows, rule=LEARNT, **templates):
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    block = JsonlData(**({"prompt": "{q}", "completion": "{a}"} | templates), jsonl=path)
    counts = SampleCounts()
    return list(encode(block, encoder, rule, counts)), counts


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("rows")


@given(prompt=TEXTS | st.just(""), completion=TEXTS, kind=st.sampled_from(["bytes", "blanks"]))
@settings(max_examples=150)
def test_tokens_are_those_of_the_joined_text(encoders, folder, prompt, completion, kind):
    encoder = encoders[kind]
    if not completion.strip():
        return  # dropped: the test after the next
    ((ids, first),), _ = samples(folder, encoder, {"q": prompt, "a": completion})
    joined = encoder.tokenizer(prompt + completion, return_offsets_mapping=True)
    assert ids == joined.input_ids + [encoder.tokenizer.eos_token_id]
    if kind == "bytes":
        assert encoder.tokenizer.decode(ids[1:-1], clean_up_tokenization_spaces=False) == prompt + completion
    offsets = joined.offset_mapping[1:]
    assert all(stop <= len(prompt) for _, stop in offsets[: first - 1])
    assert all(stop > len(prompt) for _, stop in offsets[first - 1 :] if prompt)


@pytest.mark.parametrize(("prompt", "completion"), [("f(", "seven)"), ("A: ", "mills"), ('{"k":', "1}"), ("", "1}")])
def test_no_blank_is_learnt_that_is_not_in_the_data(encoders, folder, prompt, completion):
    ((ids, first),), _ = samples(folder, encoders["blanks"], {"q": prompt, "a": completion})
    decode = encoders["blanks"].tokenizer.decode
    assert decode(ids[first:-1]).endswith(completion)
    assert decode(ids[1:-1]) == prompt + completion
    if prompt == "f(":
        assert decode(ids[first:-1]) == completion


def test_a_token_that_spans_the_border_is_learnt(encoders, folder):
    encoder = encoders["bytes"]
    whole = encoder.tokenised([" seven"])[0].ids
    ((ids, first),), _ = samples(folder, encoder, {"q": "x s", "a": "even"})
    assert (ids[1:-1], first) == ([*encoder.tokenised(["x"])[0].ids, *whole], 2)


def test_empty_blank_and_null_completions_are_dropped_and_counted(encoders, folder):
    rows = [
        {"q": "1", "a": ""},
        {"q": "2", "a": " \n"},
        {"q": "3", "a": None},
        {"q": "4", "a": True},
        {"q": "5", "a": 0},
    ]
    kept, counts = samples(folder, encoders["bytes"], *rows)
    texts = [encoders["bytes"].tokenizer.decode(ids[first:-1]) for ids, first in kept]
    assert (texts, counts.blank, counts.kept) == (["true", "0"], 3, 2)
    assert "dropped 0 as too long, 3 with an empty or null completion" in str(counts)
    _, counts = samples(folder, encoders["bytes"], *rows, completion="Answer: {a}{q}\n")
    assert counts.blank == 1
    with pytest.raises(UserError, match="no sample remains: 0 samples.* 1 with an empty or null completion"):
        samples(folder, encoders["bytes"], rows[0])


CHAT = [{"role": "user", "content": "how many cats?"}, {"role": "assistant", "content": "four"}]


@pytest.mark.parametrize("around", ["<s> $A", "<s> $A </s>", "$A"])
@pytest.mark.parametrize("kind", ["bytes", "blanks"])
def test_what_a_chat_template_rendered_has_its_special_tokens_once(tmp_path, kind, around):
    encoder = load_encoder(str(save_trained(tmp_path / "tokenizer", kind, around)))
    render = encoder.tokenizer.apply_chat_template
    prompt = render(CHAT[:1], tokenize=False, add_generation_prompt=True)
    whole = render(CHAT, tokenize=False)
    row = {"q": prompt, "a": whole.removeprefix(prompt)}
    assert row["a"] == "four</s>\n"
    ((ids, first),), _ = samples(tmp_path, encoder, row)
    assert ids == render(CHAT, return_dict=False)
    assert encoder.tokenizer.decode(ids[first:]) == row["a"]


@pytest.mark.parametrize(
    ("add_bos", "add_eos", "around", "expected"),
    [
        (None, True, "<s> $A", "<s>ab</s>"),
        (None, True, "$A", "ab</s>"),
        (True, True, "$A", "<s>ab</s>"),
        (False, True, "<s> $A", "ab</s>"),
        (None, False, "<s> $A </s>", "<s>ab"),
        (False, False, "<s> $A </s>", "ab"),
        (None, True, "$A </s>", "ab</s>"),
    ],
)
def test_each_special_token_has_a_key(tmp_path, add_bos, add_eos, around, expected):
    encoder = load_encoder(str(save_trained(tmp_path / "tokenizer", "bytes", around)))
    rule = SampleRule(100, "error", False, add_bos, add_eos)
    (sample,), _ = samples(tmp_path, encoder, {"q": "a", "a": "b"}, rule=rule)
    assert encoder.tokenizer.decode(sample.ids) == expected
    (tmp_path / "a.txt").write_text("ab")
    (sample,) = encode(TextData(text=tmp_path / "a.txt"), encoder, rule, SampleCounts())
    assert encoder.tokenizer.decode(sample.ids) == expected
    (tmp_path / "a.txt").write_text(f"{expected}\n")
    (sample,) = encode(TextData(text=tmp_path / "a.txt"), encoder, rule, SampleCounts())
    assert encoder.tokenizer.decode(sample.ids) == f"{expected}\n"


def test_a_special_token_that_the_tokenizer_has_not_is_an_error(tmp_path, encoders):
    encoder = encoders["bytes"]
    for name, rule in (("bos_token", (True, False)), ("eos_token", (None, True))):
        bare = load_encoder(str(save_trained(tmp_path / name, "bytes", "$A")))
        setattr(bare.tokenizer, name, None)
        with pytest.raises(UserError, match=rf"^tokenizer '.*{name}': no {name} to"):
            bare.specials(*rule)
    assert encoder.specials(False, False) == ([], [])


WORDS = st.lists(
    st.sampled_from([*" ".join(CORPUS[:3]).split(" "), "\n", "\n\n", "\n\n\n", "\r\n", " ", "=" * 9]),
    min_size=60, max_size=200,
)  # fmt: skip


@given(words=WORDS, kind=st.sampled_from(["bytes", "blanks"]), piece=st.sampled_from([1, 40, 500]))
@settings(max_examples=40)
def test_a_long_text_is_tokenised_as_a_whole(encoders, folder, words, kind, piece):
    """Also where it is read in parts: no border of them shows."""
    content = " ".join([*words, "end"])
    (folder / "a.txt").write_bytes(content.encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plain_text, "PIECE", piece)
        patch.setattr(plain_text, "SHARED", 96)
        encoder, counts = encoders[kind], SampleCounts()
        cut = list(encode(TextData(text=folder / "a.txt", block=16), encoder, LEARNT, counts))
    ids = [token for sample in cut for token in sample.ids]
    expected = encoder.tokenizer(content).input_ids + [encoder.tokenizer.eos_token_id]
    assert ids == expected[: len(expected) - counts.empty]


def test_a_word_longer_than_what_parts_share_loses_no_character(encoders, folder, monkeypatch):
    monkeypatch.setattr(plain_text, "PIECE", 10)
    monkeypatch.setattr(plain_text, "SHARED", 8)
    content = "=" * 50 + "\n" + "seven" * 30 + "\n" + "=-" * 40
    (folder / "a.txt").write_text(content)
    for encoder in encoders.values():
        (sample,) = encode(TextData(text=folder / "a.txt", block=1000), encoder, LEARNT, SampleCounts())
        assert encoder.tokenizer.decode(sample.ids[1:-1]).replace(" ", "") == content
