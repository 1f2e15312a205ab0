"""YAML and JSON are read strictly, and a mistake is one short line."""

from __future__ import annotations

import json
import os
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorafusion.core.files import parse_json, read_json, read_yaml
from lorafusion.core.schema import LONGEST, UserError, shortened


@pytest.fixture
def yaml_file(tmp_path):
    def write(text: str):
        path = tmp_path / "file.yaml"
        path.write_text(text)
        return path

    return write


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3\n", "line 3: key 'a' comes twice"),
        ("x:\n  - {seed: 1, seed: 2}\n", "line 2: key 'seed' comes twice"),
        ("{1: a, true: b}", "line 1: key True comes twice"),
        ("base: &base {a: 1}\nx: {<<: *base, b: 1, b: 2}\n", "line 2: key 'b' comes twice"),
        ("a: [1, 2\n", "not valid YAML"),
        ("a: &a [*a]\n", "line 1: an alias stands for what it is a part of"),
        ("a: !!python/name:os.system\n", "line 1: not valid YAML: expected a plain value, found the tag"),
        ("- 1\n", "expected a mapping, found a list"),
        ("", "expected a mapping, found None"),
        ("a: 2024-13-45\n", "not valid YAML"),
        ("a: \x00\n", "not valid YAML"),
        ("a: !!bool x\n", "line 1: not valid YAML: expected a plain value, found the tag"),
        ("a: 1\nb: 0x" + "f" * 5000, "line 2: not valid YAML: an integer of 5002 digits, expected 4300"),
        ("a: " + "[" * 100_000, "line 1: not valid YAML: nested too deeply, expected 100 levels at most"),
        ("- " * 100_000, "line 1: not valid YAML: nested too deeply, expected 100 levels at most"),
        ("a: " + "{a: " * 10_000, "line 1: not valid YAML: nested too deeply, expected 100 levels at most"),
        ("a: [" + "x," * 200_001 + "]", "line 1: 200001 values, aliases written out; expected 200000 at most"),
    ],
)
def test_a_yaml_file_that_says_two_things_or_nothing_is_refused(yaml_file, text, message):
    with pytest.raises(UserError) as caught:
        read_yaml(yaml_file(text))
    assert f"file.yaml: {message}" in str(caught.value)


def test_what_a_mapping_takes_over_may_be_said_anew(yaml_file):
    text = "base: &base {a: 1, b: 1}\nx: {<<: *base, b: 2}\ny: [*base, *base]\n"
    data = read_yaml(yaml_file(text))
    assert data["x"] == {"a": 1, "b": 2}
    assert data["y"] == [{"a": 1, "b": 1}] * 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a: 1".encode("utf-16"), "expected a YAML file in UTF-8, found other bytes at 0 (UTF-16 by its beginning)"),
        (b"a: \xe9", "expected a YAML file in UTF-8, found other bytes at 3"),
        (b"#" * (2**22 + 1), "4194305 bytes, expected a YAML file of 4194304 at most"),
    ],
)
def test_a_file_that_is_no_text_or_too_long_is_refused(tmp_path, content, message):
    (tmp_path / "file.yaml").write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_yaml(tmp_path / "file.yaml")
    assert str(caught.value) == f"{tmp_path / 'file.yaml'}: {message}"


@pytest.mark.parametrize("read", [read_yaml, lambda path: read_json(path, "plan")])
def test_nothing_but_a_file_is_waited_for(tmp_path, read):
    os.mkfifo(tmp_path / "pipe")
    for path, kind in ((tmp_path / "pipe", "a device or a pipe"), (tmp_path, "a folder"), ("/dev/zero", "a device")):
        with pytest.raises(UserError, match=f"expected a .* file, found {kind}"):
            read(path)


def test_the_mark_of_utf_8_is_no_part_of_a_text(tmp_path):
    (tmp_path / "file").write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert read_yaml(tmp_path / "file") == read_json(tmp_path / "file", "plan") == {"a": 1}


@pytest.mark.parametrize("levels", [6, 60])
def test_aliases_that_blow_up_are_refused_at_once(yaml_file, levels):
    lines = ["l0: &l0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"l{i}: &l{i} [{', '.join([f'*l{i - 1}'] * 9)}]" for i in range(1, levels)]
    begin = time.monotonic()
    with pytest.raises(UserError, match="[0-9]+ values, aliases written out; expected 200000 at most"):
        read_yaml(yaml_file("\n".join(lines)))
    assert time.monotonic() - begin < 5


def test_a_long_file_without_aliases_is_read(yaml_file):
    rows = 35_000
    assert len(read_yaml(yaml_file("a:\n" + "- [1, 2]\n" * rows))["a"]) == rows


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1, "a": 2}', "key 'a' comes twice in an object"),
        ('{"x": [{"b": 1, "c": 2, "b": 1}]}', "key 'b' comes twice in an object"),
        ('{"a": NaN}', "NaN is no number of JSON"),
        ('{"a": -Infinity}', "-Infinity is no number of JSON"),
        ('{"a": 1e999}', "expected a finite number, found 1e999"),
        ('{"a": 1', "Expecting"),
        ('{"a": ["\\ud83d"]}', "found '\\ud83d', half of a character (a lone surrogate); expected text"),
        ("[" * 100_000, "nested too deeply"),
        ('{"a": ' + "1" * 5000 + "}", "not a plan file"),
        (b"\xff\xfe\x00", "expected a plan file in UTF-8, found other bytes at 0 (UTF-16"),
        ("[1]", "expected a JSON object with a plan, found a list"),
    ],
)
def test_a_json_file_that_says_two_things_or_no_number_is_refused(tmp_path, text, message):
    path = tmp_path / "file.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError) as caught:
        read_json(path, "plan")
    assert str(caught.value).startswith(f"{path}: ")
    assert message in str(caught.value)
    assert len(str(caught.value)) <= LONGEST


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@given(PLAIN)
def test_what_is_json_is_read_as_json(value):
    assert parse_json(json.dumps(value), "x") == value


@given(st.text(), st.integers(20, 60))
def test_a_message_is_shortened_in_its_middle(text, most):
    short = shortened(text, most)
    assert len(short) <= most or short == text
    assert (short == text) == (len(text) <= most)
    assert short[:2] == text[:2]
    assert text.endswith(short[-most // 5 :])


def test_pairs_of_surrogates_are_characters(tmp_path):
    (tmp_path / "file").write_text('{"a": "\\ud83d\\ude00 \\\\ud83d"}')
    assert read_json(tmp_path / "file", "plan") == {"a": "\U0001f600 \\ud83d"}


def test_an_error_is_one_line_whatever_it_found():
    text = str(UserError("jobs.yaml: data: expected a mapping,\n found " + "x" * 10**6 + "; see the guide"))
    assert len(text) == LONGEST
    assert text.startswith("jobs.yaml: data: expected a mapping, found xxx")
    assert text.endswith("xx; see the guide")
