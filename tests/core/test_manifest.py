"""Any change of a sealed folder is seen."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lorafusion.core.manifest import (
    MANIFEST,
    DamagedError,
    UnfinishedError,
    entries,
    facts_of,
    read_sealed,
    seal,
    verified,
    write_sealed,
)

FACTS = {"slot": 12, "steps": {"a": 3}, "note": "ä"}
NAMES = ("one.bin", "inner/two.bin", MANIFEST)


@pytest.fixture
def sealed(tmp_path):
    folder = tmp_path / "folder"
    (folder / "inner").mkdir(parents=True)
    (folder / "one.bin").write_bytes(bytes(range(40)))
    (folder / "inner/two.bin").write_bytes(b"two")
    seal(folder, entries(folder, ["one.bin", "inner/two.bin"]), FACTS)
    return folder


def test_what_was_sealed_is_read(sealed):
    (sealed / ".hidden").touch()
    assert verified(sealed) == facts_of(sealed) == FACTS


@given(name=st.sampled_from(NAMES), place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
def test_any_bit_counts(sealed, name, place, bit):
    path = sealed / name
    whole = path.read_bytes()
    changed = bytearray(whole)
    changed[int(place * len(whole))] ^= 1 << bit
    path.write_bytes(changed)
    with pytest.raises(DamagedError, match=re.escape(str(path))):
        verified(sealed)
    path.write_bytes(whole)


@given(name=st.sampled_from(NAMES), share=st.floats(0, 1, exclude_max=True))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=20)
def test_any_cut_counts(sealed, name, share):
    path = sealed / name
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(DamagedError, match=re.escape(str(path))):
        verified(sealed)
    path.write_bytes(whole)


def without(folder: Path) -> None:
    (folder / "inner/two.bin").unlink()


def with_another(folder: Path) -> None:
    (folder / "three.bin").touch()


def swapped(folder: Path) -> None:
    (folder / "one.bin").rename(folder / "spare")
    (folder / "inner/two.bin").rename(folder / "one.bin")
    (folder / "spare").rename(folder / "inner/two.bin")


@pytest.mark.parametrize("change", [without, with_another, swapped])
def test_files_that_are_missing_new_or_swapped_count(sealed, change):
    change(sealed)
    with pytest.raises(DamagedError):
        verified(sealed)


def test_a_folder_without_its_manifest_is_not_finished(sealed):
    (sealed / MANIFEST).unlink()
    with pytest.raises(UnfinishedError):
        verified(sealed)


def test_a_file_that_was_never_sealed_is_told_apart(tmp_path):
    (tmp_path / "old.json").write_text(json.dumps({"a": 1}))
    with pytest.raises(DamagedError, match="written by another version, or changed"):
        read_sealed(tmp_path / "old.json")
    write_sealed(tmp_path / "new.json", {"b": [1, 2], "a": None})
    assert read_sealed(tmp_path / "new.json") == {"b": [1, 2], "a": None}
    shutil.copy(tmp_path / "new.json", tmp_path / "copy.json")
    assert read_sealed(tmp_path / "copy.json") == {"b": [1, 2], "a": None}
