"""What a job's Snakemake is told to make, when Slurm begins the job anew."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from lorafusion.core.files import write
from lorafusion.lab import begin as module
from lorafusion.lab.cluster.left_jobs import RECORD, record_run
from lorafusion.lab.dag import Dag, Kind, Step
from lorafusion.lab.submission import without_made

RUN = Kind("run", ("runs/{name}.json",))
BEFORE, AFTER = ["python", "-m", "snakemake", "--target-jobs"], ["--allowed-rules", "run", "--cores", "all"]


@pytest.fixture
def dag(tmp_path) -> Dag:
    """A workflow's, which began a minute after the epoch."""
    record_run(tmp_path, "run-1")
    os.utime(tmp_path / RECORD, (60, 60))
    steps = [Step(RUN, name, tmp_path, "", lambda step, launch: "", lambda: 1) for name in ("a", "b/c", "d")]
    return Dag("toy", "toy", Path(tmp_path), tuple(steps), frozenset(steps), {})


def made(step: Step, seconds: float = 100) -> None:
    write(step.path, "{}")
    step.write_key()
    os.utime(step.key_path, (seconds, seconds))


def call(*names: str) -> list[str]:
    return [*BEFORE, *[f"run:name={name}" for name in names], *AFTER]


def test_what_the_job_has_made_is_not_made_again(dag, capsys):
    made(dag.steps[0])
    assert without_made(call("a", "b/c", "d"), dag) == call("b/c", "d")
    assert capsys.readouterr().out == "runs/a.json: made already, before the job began anew\n"
    made(dag.steps[2])
    assert without_made(call("a", "b/c", "d"), dag) == call("b/c")
    made(dag.steps[1])
    assert without_made(call("a", "b/c", "d"), dag) == []


def test_what_was_there_before_the_workflow_is_made(dag):
    """It may be a run that is to be tried again."""
    made(dag.steps[0], 50)
    assert without_made(call("a"), dag) == call("a")


@pytest.mark.parametrize("damage", ["key", "result"])
def test_what_is_not_whole_is_made(dag, damage):
    step = dag.steps[0]
    made(step)
    if damage == "key":
        step.key_path.write_text("another")
    else:
        step.path.unlink()
    os.utime(step.key_path, (100, 100))
    assert without_made(call("a"), dag) == call("a")


@pytest.mark.parametrize(("words", "program"), [(["python", "-m", "snakemake"], "python"), ([], "true")])
def test_the_process_goes_on_with_fewer_steps(monkeypatch, words, program):
    called = []
    monkeypatch.setattr(module.os, "execvp", lambda *call: called.append(call))
    module.go_on(sys.orig_argv)
    assert called == []
    module.go_on(words)
    assert called == [(program, words or ["true"])]
