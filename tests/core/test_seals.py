"""A seal tells a table that is whole from one that was cut or edited."""

from __future__ import annotations

import subprocess

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorafusion.core.schema import UserError
from lorafusion.core.seals import require_seal, seal, seal_path

TEXT = 'a,b\n1,"x\ny"\n2,3.5\n'


@pytest.fixture
def sealed(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text(TEXT)
    seal(path)
    return path


def test_a_whole_table_passes_with_its_rows_and_remark(sealed):
    assert require_seal(sealed)[0::2] == (2, "")
    seal(sealed, "1 run is missing")
    assert require_seal(sealed)[0::2] == (2, "1 run is missing")


def test_coreutils_can_compare_a_seal_too(sealed):
    command = ["sha256sum", "--check", "--strict", seal_path(sealed).name]
    assert subprocess.run(command, cwd=sealed.parent, capture_output=True).returncode == 0
    sealed.write_text(TEXT.replace("3.5", "3.6"))
    assert subprocess.run(command, cwd=sealed.parent, capture_output=True).returncode == 1


@given(end=st.integers(0, len(TEXT) - 1))
def test_a_table_that_was_cut_anywhere_is_refused(tmp_path_factory, end):
    path = tmp_path_factory.mktemp("cut") / "t.csv"
    path.write_text(TEXT)
    seal(path)
    path.write_text(TEXT[:end])
    with pytest.raises(UserError, match=r"t\.csv: cut or edited since it was written: expected 2 rows"):
        require_seal(path)


@given(place=st.integers(0, len(TEXT) - 1), bit=st.integers(0, 7))
def test_a_table_with_a_flipped_bit_is_refused(tmp_path_factory, place, bit):
    path = tmp_path_factory.mktemp("flipped") / "t.csv"
    path.write_text(TEXT)
    seal(path)
    content = bytearray(TEXT.encode())
    content[place] ^= 1 << bit
    path.write_bytes(content)
    with pytest.raises(UserError, match="cut or edited"):
        require_seal(path)


def test_a_table_without_its_own_seal_is_refused(sealed):
    other = sealed.with_name("u.csv")
    other.write_text(TEXT)
    with pytest.raises(UserError, match=r"u\.csv: expected its seal u\.csv\.sha256 beside it"):
        require_seal(other)
    seal_path(other).write_text(seal_path(sealed).read_text())
    with pytest.raises(UserError, match=r"u\.csv\.sha256: expected .* the name u\.csv, found another text"):
        require_seal(other)
