"""Text to samples: an exact border between prompt and completion, and every mistake named by file, line and field."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import pytest

from lorafusion.core.schema import UserError
from lorafusion.data import plain_text, text
from lorafusion.data.blocks import HubData, JsonlData, TextData, data_block, fill
from lorafusion.data.encoder import load_encoder
from lorafusion.data.text import Encoded, SampleCounts, SampleRule, encode
from tests.tiny_tokenizer import BOS, EOS, save_tokenizer

UNUSABLE = "tokenizer '.*': its files are damaged or unknown to transformers"
RULE = SampleRule(max_length=1000, too_long="truncate", learn_prompt=False)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return load_encoder(str(save_tokenizer(tmp_path_factory.mktemp("tokenizer"))))


def jsonl(folder, *rows, **templates):
    """A block on a file with these rows, each an object or the text of a line."""
    path = folder / "rows.jsonl"
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows))
    return JsonlData(**({"prompt": "{q}", "completion": "{a}"} | templates), jsonl=path)


def encoded(block, encoder, rule=RULE):
    counts = SampleCounts()
    return list(encode(block, encoder, rule, counts)), counts


def ids(encoder, characters):
    return encoder.tokenised([characters])[0].ids


def test_a_sample_is_a_prompt_with_its_completion(tmp_path, encoder):
    block = jsonl(tmp_path, {"q": "ab", "a": "xyz"}, prompt="<{q}>", completion=" {a}")
    samples, counts = encoded(block, encoder)
    assert samples == [Encoded([BOS, *ids(encoder, "<ab>"), *ids(encoder, " xyz"), EOS], 5)]
    assert counts == SampleCounts(kept=1)


def test_a_sample_without_a_prompt_is_learnt_from_its_second_token_on(tmp_path, encoder):
    samples, _ = encoded(jsonl(tmp_path, {"a": "xy"}, prompt=""), encoder)
    assert samples == [Encoded([BOS, *ids(encoder, "xy"), EOS], 1)]


def test_the_prompt_is_learnt_where_asked_for(tmp_path, encoder):
    rule = SampleRule(1000, "truncate", learn_prompt=True)
    (sample,), _ = encoded(jsonl(tmp_path, {"q": "abc", "a": "x"}), encoder, rule)
    assert sample.first_label == 1


@pytest.mark.parametrize(
    ("around", "bos", "before"),
    [
        ("$A", "<s>", []),
        ("<s> $A", "<s>", [BOS]),
        ("<s> $A </s>", "<s>", [BOS]),
        ("$A </s>", "<s>", []),
        # One token for the beginning and the end, as in GPT-2's family.
        ("</s> $A", "</s>", [EOS]),
        ("</s> $A </s>", "</s>", [EOS]),
    ],
)
def test_no_end_stands_between_prompt_and_completion(tmp_path, around, bos, before):
    encoder = load_encoder(str(save_tokenizer(tmp_path / "tokenizer", around, bos)))
    samples, _ = encoded(jsonl(tmp_path, {"q": "ab", "a": "x"}), encoder)
    assert samples[0].ids == [*before, *ids(encoder, "ab"), *ids(encoder, "x"), EOS]
    assert samples[0].first_label == len(before) + 2


def test_rows_are_in_the_order_of_the_file_whatever_the_batch(tmp_path, encoder, monkeypatch):
    monkeypatch.setattr(text, "BATCH", 3)
    block = jsonl(tmp_path, *({"q": "q" * i, "a": str(i)} for i in range(10)), "")
    samples, counts = encoded(block, encoder)
    assert [sample.first_label for sample in samples] == [1 + i for i in range(10)]
    assert counts.kept == 10


LONG = {"q": "12345", "a": "678"}  # 10 tokens, of which the last 4 are learnt


@pytest.mark.parametrize(
    ("rule", "length", "expected"),
    [
        ("truncate", 10, SampleCounts(kept=2)),
        ("truncate", 9, SampleCounts(kept=2, truncated=1)),
        ("truncate", 7, SampleCounts(kept=2, truncated=1)),
        ("truncate", 6, SampleCounts(kept=1, empty=1)),
        ("drop", 9, SampleCounts(kept=1, too_long=1)),
        ("error", 10, SampleCounts(kept=2)),
    ],
)
def test_what_is_too_long_is_cut_or_dropped_and_counted(tmp_path, encoder, rule, length, expected):
    block = jsonl(tmp_path, LONG, {"q": "", "a": "x"})
    samples, counts = encoded(block, encoder, SampleRule(length, rule, False))
    assert counts == expected
    assert len(samples) == expected.kept
    assert all(1 <= sample.first_label < len(sample.ids) <= length for sample in samples)


def test_fields_that_are_no_strings_are_put_in_as_json():
    people = [{"role": "cook", "name": "Ann"}, {"role": "waiter"}]
    assert fill("{x}", {"x": people}, "here") == '[{"role": "cook", "name": "Ann"}, {"role": "waiter"}]'
    assert fill("{x}", {"x": []}, "here") == "[]"
    row = {"n": 3, "x": [True, None, {"é": 'a"b'}], "a.b": 0.10}
    assert fill("{n}, {x}, {{n}}, {a.b}", row, "here") == '3, [true, null, {"é": "a\\"b"}], {n}, 0.1'


BAD_ROWS = {
    "a missing field": ([{"q": "x"}], r"rows\.jsonl:1: no field 'a'; found q$"),
    "a null": ([{"q": "x", "a": "y"}, {"q": None, "a": "z"}], r"rows\.jsonl:2: field 'q' is null"),
    "not a number": (
        [{"q": "x", "a": "y"}, '{"q": "x", "a": NaN}'],
        r"rows\.jsonl:2: not JSON: NaN is no number of JSON",
    ),
    "infinity": (['{"q": "x", "a": -Infinity}'], r"rows\.jsonl:1: not JSON: -Infinity is no number of JSON"),
    "a number too large": (
        ['{"q": "x", "a": [1e999]}'],
        r"rows\.jsonl:1: not JSON: expected a finite number, found 1e999",
    ),
    "half a character": (
        [{"q": "cut \ud83d", "a": "y"}],
        r"rows\.jsonl:1: field 'q' has '\\ud83d', half of a character",
    ),
    "half a key": ([{"q": "x", "a": {"\ud83d": 1}}], r"rows\.jsonl:1: field 'a' has '\\ud83d', half of a character"),
    "depth": (['{"q": "x", "a": ' + 100_000 * "["], r"rows\.jsonl:1: not JSON: it is nested too deeply"),
    "messages": (
        [{"q": "x", "a": [{"role": "user", "content": "y"}]}],
        r"rows\.jsonl:1: field 'a' is a list of chat messages, expected text; render it with .*apply_chat_template",
    ),
    "turns": ([{"q": [{"from": "human", "value": "y"}], "a": "x"}], r"field 'q' is a list of chat messages"),
    "a call of a tool": (
        [{"q": "x", "a": [{"role": "user", "content": "y"}, {"role": "assistant", "tool_calls": []}]}],
        r"field 'a' is a list of chat messages",
    ),
    "bad JSON": ([{"q": "x", "a": "y"}, "", "{"], r"rows\.jsonl:3: not JSON: Expecting"),
    "no object": (["[1]"], r"rows\.jsonl:1: expected a JSON object, found a list"),
    "nothing": ([], r"rows\.jsonl: no rows; expected a JSON object a line"),
    "blank lines": (["", " "], r"rows\.jsonl: no rows"),
}


@pytest.mark.parametrize("name", list(BAD_ROWS))
def test_a_bad_row_is_named_by_file_and_line(tmp_path, encoder, name):
    rows, message = BAD_ROWS[name]
    with pytest.raises(UserError, match=message):
        encoded(jsonl(tmp_path, *rows), encoder)


def test_a_file_that_is_not_utf8_is_named(tmp_path, encoder):
    path = tmp_path / "latin"
    path.write_bytes(b'{"a": "\xe9"}\n')
    with pytest.raises(UserError, match="latin:1: not JSON: .*codec can't decode"):
        encoded(JsonlData(jsonl=path, completion="{a}"), encoder)
    with pytest.raises(UserError, match=r"latin: not UTF-8 text \("):
        encoded(TextData(text=path), encoder)


def test_a_sample_that_must_not_be_too_long_is_named(tmp_path, encoder):
    with pytest.raises(UserError, match=r"rows\.jsonl:1: at least 10 tokens, more than max_length 9"):
        encoded(jsonl(tmp_path, LONG), encoder, SampleRule(9, "error", False))


def test_a_dataset_of_which_nothing_remains_says_why(tmp_path, encoder):
    message = "jsonl:rows.jsonl: no sample remains: 0 samples, 0 of them truncated; dropped 2 as too long"
    with pytest.raises(UserError, match=message):
        encoded(jsonl(tmp_path, LONG, LONG), encoder, SampleRule(4, "drop", False))


BAD_TEMPLATES = {
    "an open brace": ({"completion": "{a"}, "data: completion: expected '}' before end of string (found '{a')"),
    "a closing brace": ({"prompt": "}"}, "data: prompt: single '}' encountered in format string (found '}')"),
    "no name": ({"completion": "{}"}, "data: completion: a field without a name (found '{}')"),
    "a format": ({"completion": "{a:>3}"}, "data: completion: field 'a' has more than a name"),
    "no field": ({"prompt": "x", "completion": "y"}, "data: completion: no {field} in it nor in the prompt"),
    "a blank": ({"prompt": "{q}", "completion": " "}, "data: completion: blank, so that there is nothing to learn"),
    "no completion": ({"completion": None}, "completion: input should be a valid string"),
    "another key": ({"answer": "{a}"}, "answer: unknown key"),
    "two kinds": ({"hub": "x/y"}, "expected a mapping with one of the keys jsonl, hub, text, synthetic, found"),
    "a missing file": ({"jsonl": "none.jsonl"}, ".jsonl: no such file"),
    "no files": ({"jsonl": []}, "jsonl: value should have at least 1 item"),
}


@pytest.mark.parametrize("name", list(BAD_TEMPLATES))
def test_a_bad_block_is_named_by_its_key(tmp_path, name):
    change, message = BAD_TEMPLATES[name]
    jsonl(tmp_path, LONG)
    with pytest.raises(UserError) as caught:
        data_block({"jsonl": "rows.jsonl", "completion": "{a}"} | change, "jobs.yaml: jobs.x.data", tmp_path)
    assert str(caught.value).startswith("jobs.yaml: jobs.x.data")
    assert message in str(caught.value)


@pytest.mark.parametrize("piece", [1, 7, 1 << 18])
def test_plain_text_is_cut_into_blocks_with_nothing_lost(tmp_path, encoder, monkeypatch, piece):
    monkeypatch.setattr(plain_text, "PIECE", piece)
    monkeypatch.setattr(plain_text, "WINDOWS", 2)
    texts = ["one\ntwo\n\nthree", "four\n" * 4]
    paths = [tmp_path / "a.txt", tmp_path / "b.txt"]
    for path, content in zip(paths, texts, strict=True):
        path.write_text(content)
    samples, counts = encoded(TextData(text=paths, block=8), encoder)
    whole = [token for content in texts for token in (BOS, *ids(encoder, content), EOS)]
    assert [token for sample in samples for token in sample.ids] == whole
    assert [len(sample.ids) for sample in samples[:-1]] == [8] * (len(samples) - 1)
    assert {sample.first_label for sample in samples} == {1}
    assert counts == SampleCounts(kept=len(samples))


def test_a_last_block_of_one_token_is_dropped(tmp_path, encoder):
    path = tmp_path / "a.txt"
    path.write_text("1234567")
    samples, counts = encoded(TextData(text=path, block=4), encoder)
    assert [len(sample.ids) for sample in samples] == [4, 4]
    assert counts == SampleCounts(kept=2, empty=1)


def test_a_file_without_text_is_named(tmp_path, encoder):
    path = tmp_path / "a.txt"
    path.touch()
    with pytest.raises(UserError, match=r"a\.txt: no text in the file"):
        encoded(TextData(text=path), encoder)


HUB = HubData(hub="owner/questions", subset="hard", split="test", revision="v1", prompt="{q}", completion="{a}")


class DatasetsError(Exception):
    pass


def hub(monkeypatch, answer):
    """A `datasets` library whose loader gives an answer, or raises it; returns what the loader is called with."""
    calls = []

    def load_dataset(*arguments, **options):
        calls.append((arguments, options))
        if isinstance(answer, Exception):
            raise answer
        return answer

    library = SimpleNamespace(load_dataset=load_dataset, exceptions=SimpleNamespace(DatasetsError=DatasetsError))
    monkeypatch.setitem(sys.modules, "datasets", library)
    return calls


def test_rows_of_the_hub(monkeypatch, encoder):
    calls = hub(monkeypatch, [{"q": "a", "a": "b"}, {"q": "", "a": "c"}])
    samples, _ = encoded(HUB, encoder)
    assert [sample.first_label for sample in samples] == [2, 1]
    assert calls == [(("owner/questions",), {"name": "hard", "split": "test", "revision": "v1"})]


@pytest.mark.parametrize("error", [DatasetsError("no\nsuch"), ValueError("no such"), ConnectionError("no such")])
def test_a_dataset_that_the_hub_has_not_is_one_line(monkeypatch, encoder, error):
    hub(monkeypatch, error)
    with pytest.raises(UserError, match=r"^hub:owner/questions/hard/test: not to be had from the hub \(no such\)$"):
        encoded(HUB, encoder)


def test_a_bad_row_of_the_hub_is_named(monkeypatch, encoder):
    hub(monkeypatch, [{"q": "x", "a": "y"}, {"q": "x"}])
    with pytest.raises(UserError, match="hub:owner/questions/hard/test: row 1: no field 'a'; found q"):
        encoded(HUB, encoder)


def test_without_the_datasets_library_it_says_how_to_get_it(monkeypatch, encoder):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match="needs the package datasets: pip install 'lorafusion.hub.'"):
        encoded(HUB, encoder)


@pytest.mark.parametrize(("name", "changes"), [
    *(("tokenizer.json", {key: {}}) for key in ("model", "added_tokens", "post_processor", "truncation")),
    ("tokenizer.json", {"version": 17}),
    ("tokenizer.json", {"model": 17}),
    ("tokenizer.json", {"added_tokens": 17}),
    ("tokenizer.json", {"decoder": []}),
    ("tokenizer.json", {"model": {"type": "WordLevel", "vocab": {"b": 0}, "unk_token": "?"}, "post_processor": None}),
    ("tokenizer_config.json", {"tokenizer_class": ["x"]}),
    ("tokenizer_config.json", {"bos_token": 17}),
    ("tokenizer_config.json", {"model_max_length": "x"}),
    ("tokenizer_config.json", None),
    ("tokenizer.json", None),
    ("special_tokens_map.json", None),
])  # fmt: skip
def test_a_tokenizer_that_cannot_be_used_is_one_line(tmp_path, name, changes):
    """What the libraries raise of such files was a traceback. None: a list in place of the object."""
    path = save_tokenizer(tmp_path) / name
    path.write_text(json.dumps([] if changes is None else json.loads(path.read_text()) | changes))
    with pytest.raises(UserError, match=rf"^({UNUSABLE}|{path}: expected)[^\n]*$"):
        load_encoder(str(tmp_path))


def test_a_folder_without_a_tokenizer_is_one_line(tmp_path):
    with pytest.raises(UserError, match=f"^{UNUSABLE}"):
        load_encoder(str(tmp_path))


def test_rows_that_a_tokenizer_has_no_tokens_for_are_one_line(tmp_path):
    path = save_tokenizer(tmp_path / "tokenizer") / "tokenizer.json"
    model = {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "?"}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model": model, "post_processor": None}))
    encoder = load_encoder(str(tmp_path / "tokenizer"))
    with pytest.raises(UserError, match=rf"{UNUSABLE} \(WordLevel error"):
        encoded(jsonl(tmp_path, {"q": "b", "a": "c"}), encoder)


def test_a_tokenizer_needs_an_end(tmp_path):
    encoder = load_encoder(str(save_tokenizer(tmp_path / "tokenizer", eos=None)))
    block = jsonl(tmp_path, {"q": "ab", "a": "x"})
    with pytest.raises(UserError, match="no eos_token to end a sample with; or set add_eos to false"):
        encoded(block, encoder)
    samples, _ = encoded(block, encoder, SampleRule(1000, "truncate", False, add_eos=False))
    assert samples == [Encoded([BOS, *ids(encoder, "abx")], 3)]
