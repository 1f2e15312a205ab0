"""From what processes write while they run to the steps of each job."""

from __future__ import annotations

import json
import math
import os
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorafusion.core.manifest import DamagedError, FileEntry
from lorafusion.core.schema import UserError
from lorafusion.engine.events import EventLog, require, trim
from lorafusion.train.metrics import EventReader, History


@pytest.fixture
def told(make_job, make_workload, tmp_path):
    """A reader of a run of one job with 8, 8 and 6 tokens in its steps; and a function that writes events."""
    workload = make_workload(make_job("a", (5, 3, 6, 2, 6)))
    history = History()

    def write(*events: dict, replica: int = 0, end: str = "\n") -> None:
        with open(tmp_path / f"replica-{replica}.jsonl", "a") as file:
            file.write("\n".join(json.dumps({"adapter": 0} | event) for event in events) + end)

    return EventReader(tmp_path, workload, history), history, write, tmp_path


def loss(slot: int, batch: int, tokens: int, value: float) -> dict:
    return {"slot": slot, "batch": batch, "tokens": tokens, "loss": value}


def step(slot: int, number: int, norm: float = 1.0) -> dict:
    return {"slot": slot, "step": number, "norm": norm, "learning_rate": 0.1}


def test_a_step_is_told_when_all_shares_are_there(told):
    """Of two replicas one may be far ahead."""
    reader, history, write, _ = told
    write(loss(0, 0, 5, 2.0), step(0, 0))
    assert reader.poll() == [("a", 0), ("a", 0)]
    assert history.complete("a") == {}
    write(loss(0, 0, 3, 1.0), step(0, 0), replica=1)
    reader.poll()
    [row] = history.complete("a").values()
    assert (row.loss, row.tokens, row.norm) == (3.0, 8, 1.0)
    assert reader.tokens == [8]


def test_a_line_that_is_half_written_is_read_when_it_is_whole(told):
    reader, history, write, folder = told
    write(loss(0, 0, 8, 2.0), end="\n{")
    assert len(reader.poll()) == 1
    path = folder / "replica-0.jsonl"
    path.write_text(path.read_text() + json.dumps({"adapter": 0} | step(0, 0))[1:] + "\n")
    assert len(reader.poll()) == 1
    assert list(history.complete("a")) == [0]


def test_what_is_run_again_is_dropped_first(told):
    """Other digits, as on a GPU, have other lengths: a reader that had seen the old ones would begin in mid-line."""
    reader, history, write, folder = told
    write(loss(0, 0, 8, 2.0), step(0, 0))
    kept = FileEntry.of(folder / "replica-0.jsonl")
    write(loss(1, 1, 8, 1.123456789), step(1, 1), end='\n{"slot": 2, "ada')
    trim(folder / "replica-0.jsonl", kept.size)
    require(folder, {"replica-0.jsonl": kept})
    reader.poll()
    write(loss(1, 1, 8, 1.12), step(1, 1), step(2, 2))
    reader.poll()
    assert [row.loss for row in history.complete("a").values()] == [2.0, 1.12]


BROKEN = {
    "no JSON": b'{"slot": 0, "adap',
    "no letters": b"\xff\xfe",
    "no event": b'{"slot": 0}',
    "no object": b"[1]",
    "empty": b"",
    "another job's": b'{"adapter": 1, "slot": 0, "batch": 0, "tokens": 8, "loss": 2.0}',
    "another step's": b'{"adapter": 0, "slot": 0, "batch": 9, "tokens": 8, "loss": 2.0}',
    "without a slot": b'{"adapter": 0, "batch": 0, "tokens": 8, "loss": 2.0}',
}


@pytest.mark.parametrize("line", BROKEN.values(), ids=BROKEN.keys())
def test_a_broken_line_is_an_error_that_names_it(told, line):
    """Wherever it is read: at once, or when more has come."""
    reader, _, write, folder = told
    path = folder / "replica-0.jsonl"
    write(loss(0, 0, 8, 2.0), step(0, 0))
    reader.poll()
    path.write_bytes(path.read_bytes() + line + b"\n")
    write(step(1, 1))
    for one in (reader, EventReader(folder, reader.workload, History())):
        with pytest.raises(DamagedError, match=re.escape(f"{path}: line 3 is broken (")) as caught:
            one.poll()
        assert len(str(caught.value)) < 300


@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_any_bit_of_what_was_noted_counts(tmp_path_factory, place, bit):
    folder = tmp_path_factory.mktemp("events")
    log = EventLog(folder / "a.jsonl")
    log.write(step(0, 0))
    kept = {"a.jsonl": log.entry()}
    log.write(step(1, 1))
    require(folder, kept)
    data = bytearray((folder / "a.jsonl").read_bytes())
    data[int(place * kept["a.jsonl"].size)] ^= 1 << bit
    (folder / "a.jsonl").write_bytes(data)
    with pytest.raises(DamagedError, match="a.jsonl: "):
        require(folder, kept)


@pytest.mark.parametrize("left", [None, 0, 10])
def test_a_file_of_events_that_is_gone_or_cut_is_an_error(tmp_path, left):
    path = tmp_path / "a.jsonl"
    log = EventLog(path)
    log.write(step(0, 0))
    kept = {"a.jsonl": log.entry()}
    path.unlink() if left is None else os.truncate(path, left)
    with pytest.raises(DamagedError, match="missing" if left is None else "cut, it has"):
        require(tmp_path, kept)
    with pytest.raises(DamagedError, match="cut, it has"):
        EventLog(path, keep=kept["a.jsonl"].size)


def test_a_log_that_is_gone_on_with_knows_all_of_itself(tmp_path):
    path = tmp_path / "a.jsonl"
    first = EventLog(path)
    first.write(step(0, 0))
    kept = first.entry()
    first.write(step(1, 1))
    second = EventLog(path, kept.size)
    second.write(step(1, 1, norm=2.0))
    assert second.entry() == FileEntry.of(path)
    assert [json.loads(line)["norm"] for line in path.read_text().splitlines()] == [1.0, 2.0]


def test_a_step_without_a_row_is_told(told):
    reader, history, write, _ = told
    write(loss(0, 0, 8, 2.0), step(0, 0), step(1, 1), loss(2, 2, 6, 1.0), step(2, 2))
    reader.poll()
    history.require("a", 1)
    with pytest.raises(UserError, match="a: 1 of 3 steps have no row in its events, the first is 2"):
        history.require("a", 3)


def test_evaluations_of_replicas_are_added(told):
    reader, history, write, _ = told
    write(loss(0, 0, 8, 2.0), step(0, 0), {"slot": 0, "step": 1, "evaluation": 1.5})
    write({"slot": 0, "step": 1, "evaluation": 0.25}, replica=1)
    reader.poll()
    assert history.complete("a")[0].evaluation == 1.75


def test_what_is_no_number_is_null_in_json(told):
    reader, history, write, folder = told
    write(loss(0, 0, 8, math.nan), step(0, 0, math.inf), {"slot": 0, "stopped": 0})
    reader.poll()
    assert history.stopped == {"a": 0}
    history.write(folder / "metrics.jsonl")
    [line] = (folder / "metrics.jsonl").read_text().splitlines()
    row = json.loads(line, parse_constant=pytest.fail)
    assert (row["loss"], row["norm"], row["tokens"]) == (None, None, 8)
