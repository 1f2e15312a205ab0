"""Damaged tables: a line that names the file, whatever the library said that parses it."""

from __future__ import annotations

import pandas as pd
import pytest

from lorafusion.core.schema import UserError
from lorafusion.lab.table.reading import read_frame, require_numbers

DAMAGED = {
    "empty.csv": b"",
    "open.csv": b'a,b\n"1,2\n',
    "nul.csv": b"a,b\n1,\0\n",
    "wide.csv": b"a,b\n1,2,3\n",
    "twice.csv": b"a,a\n1,2\n",
    "utf16.csv": "a,b\n1,2\n".encode("utf-16"),
    "empty.parquet": b"",
    "text.parquet": b"a,b\n1,2\n",
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_table_is_named(name, tmp_path):
    path = tmp_path / name
    path.write_bytes(DAMAGED[name])
    with pytest.raises(UserError, match=name):
        read_frame(path)


def test_only_an_empty_field_is_empty(tmp_path):
    path = tmp_path / "x.csv"
    path.write_text("a,b\nnan,\n")
    table = read_frame(path)
    assert table["a"][0] == "nan"
    assert table["b"].isna()[0]


@pytest.mark.parametrize("value", ["word", float("nan"), float("inf"), None])
def test_a_column_of_numbers_has_nothing_else(value):
    require_numbers(pd.DataFrame({"a": [1, 2.5, "3"]}), ["a"], "x.csv")
    with pytest.raises(UserError, match=r"x\.csv: a: expected a number"):
        require_numbers(pd.DataFrame({"a": [1, value]}), ["a"], "x.csv")
