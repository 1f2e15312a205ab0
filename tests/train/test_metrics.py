"""From what processes write while they run to the steps of each job."""

from __future__ import annotations

import json
import math

import pytest

from lorafusion.runtime.training import trim_events
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
    write(loss(0, 0, 8, 2.0), step(0, 0), loss(1, 1, 8, 1.123456789), step(1, 1), end='\n{"slot": 2, "ada')
    trim_events(folder / "replica-0.jsonl", 1)
    reader.poll()
    write(loss(1, 1, 8, 1.12), step(1, 1), step(2, 2))
    reader.poll()
    assert [row.loss for row in history.complete("a").values()] == [2.0, 1.12]


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
