"""Token stores: what is written is read, and a file that is not the job's store says so."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from lorafusion.core.files import FullDiskError
from lorafusion.core.schema import UserError
from lorafusion.core.workload import Sample
from lorafusion.data.packing import BatchBuilder
from lorafusion.data.store import (
    NOTES,
    JobTokens,
    StoreFile,
    StoreNotes,
    StoreWriter,
    TokenStore,
    store_path,
    stored_dataset,
)
from lorafusion.data.text import Encoded

SAMPLES = [Encoded([7, 8, 9], 1), Encoded([1, 2], 1), Encoded([5, 6, 7, 3], 3)]


def store(path, samples=SAMPLES, fingerprint="f", training=None):
    writer = StoreWriter()
    writer.extend(samples)
    writer.write(path, fingerprint=fingerprint, training=training or len(samples), counts=("all",))
    return path


@st.composite
def encoded(draw):
    ids = draw(st.lists(st.integers(0, 2**31 - 1), min_size=2, max_size=9))
    return Encoded(ids, draw(st.integers(1, len(ids) - 1)))


@given(st.lists(encoded(), min_size=1, max_size=9))
def test_what_is_written_is_read(tmp_path_factory, samples):
    path = store(tmp_path_factory.mktemp("store") / "a.safetensors", samples)
    read = StoreFile(path)
    assert [(tokens.ids.tolist(), tokens.first_label) for tokens in map(read.tokens, range(len(read)))] == samples
    assert read.lengths == [len(sample.ids) for sample in samples]
    assert read.tokens(0).ids.dtype == torch.int64
    largest = max(max(ids) for ids, _ in samples)
    expected = StoreNotes(fingerprint="f", training=len(samples), largest_id=largest, counts=("all",))
    assert read.notes.model_copy(update={"content": ""}) == expected
    read.require_content()


@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_any_bit_counts(tmp_path_factory, place, bit):
    path = store(tmp_path_factory.mktemp("store") / "a.safetensors")
    data = bytearray(path.read_bytes())
    data[int(place * len(data))] ^= 1 << bit
    path.write_bytes(data)
    try:
        read = StoreFile(path)
    except UserError:
        return  # seen at once
    if data[int(place * len(data))] ^ 1 << bit != ord(" "):  # the header ends in blanks
        with pytest.raises(UserError, match="a damaged token store, its hash is not its own"):
            read.require_content()


def test_the_same_samples_make_the_same_file(tmp_path):
    assert store(tmp_path / "a").read_bytes() == store(tmp_path / "b").read_bytes()


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = store(tmp_path / "a")
    before = path.read_bytes()

    def full_disk(partial, data):
        partial.write_text("half")
        raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr(Path, "write_bytes", full_disk)
    with pytest.raises(FullDiskError, match="No space left on device"):
        store(path, SAMPLES[:1])
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.fixture
def jobs(tmp_path, make_job):
    """A job of the store and a synthetic one."""
    store(store_path(tmp_path, "a"))
    samples = tuple(Sample(row, len(ids)) for row, (ids, _) in enumerate(SAMPLES))
    stored = make_job("a", dataset=stored_dataset("jsonl:x", "f"), samples=samples[:2], evaluation=samples[2:])
    return stored, make_job("b", dataset="synthetic:xsum")


def test_the_source_is_chosen_by_job(tmp_path, jobs):
    source = JobTokens(tmp_path, 512)
    stored, synthetic = jobs
    assert source.tokens(stored, stored.samples[0]).ids.tolist() == [7, 8, 9]
    assert source.labels(stored, stored.evaluation[0]) == 1
    assert source.labels(synthetic, synthetic.samples[0]) == synthetic.samples[0].tokens - 1
    assert len(source.tokens(synthetic, synthetic.samples[0]).ids) == synthetic.samples[0].tokens


def test_batches_are_built_from_it(tmp_path, jobs, make_workload):
    builder = BatchBuilder(make_workload(*jobs), JobTokens(tmp_path, 512), torch.device("cpu"))
    assert builder.label_tokens(0, 0) == 3
    (batch,) = builder.evaluations(0, capacity=64)
    assert batch.input_ids.tolist() == [[5, 6, 7, 3]]
    assert batch.labels.tolist() == [-100, -100, 3, -100]


def test_other_tokens_than_the_jobs_are_refused(tmp_path, jobs):
    store(store_path(tmp_path, "a"), fingerprint="g")
    with pytest.raises(UserError, match=r"a\.safetensors: holds other tokens \(g\) than job 'a' was planned for"):
        TokenStore(tmp_path).labels(jobs[0], jobs[0].samples[0])


def test_a_row_that_is_not_there_is_named(tmp_path):
    with pytest.raises(UserError, match="no sample 3, the store has 3"):
        StoreFile(store(tmp_path / "a")).tokens(3)


def _rewrite(path, metadata=True, **changes):
    """The store's file with some tensors changed."""
    notes = StoreFile(path).notes.model_dump_json()
    save_file(load_file(path) | changes, path, metadata={NOTES: notes if metadata is True else metadata})


def ints(*values, dtype=torch.int32):
    return torch.tensor(values, dtype=dtype)


DAMAGES = {
    "missing": (lambda path: path.unlink(), "no such token store"),
    "cut off": (lambda path: path.write_bytes(path.read_bytes()[:-4]), "not a whole safetensors file"),
    "empty": (lambda path: path.write_bytes(b""), "not a whole safetensors file"),
    "text": (lambda path: path.write_text("hello"), "not a whole safetensors file"),
    "a checkpoint": (lambda path: save_file({"w": torch.ones(2)}, path), "a safetensors file, but not a token store"),
    "more tensors": (lambda path: _rewrite(path, w=torch.ones(2)), "a safetensors file, but not a token store"),
    "another version": (lambda path: _rewrite(path, metadata='{"version": 1}'), "a token store of another version"),
    "another dtype": (lambda path: _rewrite(path, ids=torch.ones(9)), "a damaged token store"),
    "fewer ids": (lambda path: _rewrite(path, ids=ints(1, 2)), "a damaged token store"),
    "fewer rows": (lambda path: _rewrite(path, first_labels=ints(1, 1)), "a damaged token store"),
    "offsets": (lambda path: _rewrite(path, offsets=ints(0, 5, 3, 9, dtype=torch.int64)), "a damaged token store"),
    "nothing to learn": (lambda path: _rewrite(path, first_labels=ints(1, 1, 4)), "a damaged token store"),
    "all to learn": (lambda path: _rewrite(path, first_labels=ints(0, 1, 1)), "a damaged token store"),
    "no rows": (
        lambda path: _rewrite(path, ids=ints(), offsets=ints(dtype=torch.int64), first_labels=ints()),
        "a damaged token store",
    ),
}


@pytest.mark.parametrize("name", list(DAMAGES))
def test_a_file_that_is_no_store_says_which_and_why(tmp_path, name):
    damage, message = DAMAGES[name]
    path = store(tmp_path / "a.safetensors")
    damage(path)
    with pytest.raises(UserError, match=message) as caught:
        StoreFile(path)
    assert str(caught.value).startswith(f"{path}: ")
