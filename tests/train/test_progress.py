"""What people are told of a training, and wandb: numbers and jobs, nothing of the machine or of who works on it."""

from __future__ import annotations

import getpass
import logging
import os
import platform
import re
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from lorafusion.planning import plan_workload
from lorafusion.train.metrics import History, StepMetrics
from lorafusion.train.progress import Display, WandbLog


def test_a_line_says_when_each_job_is_expected_to_end(make_job, make_workload, monkeypatch, caplog):
    """By what the plan has before its last step, at the speed of all: a job that waits has none of its own."""
    workload = make_workload(make_job("short", (4,) * 2), make_job("long", (4,) * 18))
    plan = plan_workload(workload, stages=1, capacity=8, aim="completion")
    reader, clock = SimpleNamespace(tokens=[0, 0], history=History({})), [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    with caplog.at_level(logging.INFO), Display(workload, plan, reader) as display:
        clock[0], reader.tokens = 100.0, [4, 0]
        display.update()
        clock[0], reader.tokens = 200.0, [8, 8]
    first, last = caplog.messages
    assert first == "5%, 0 tok/s: short step 0/1, 0:01:40 left; long step 0/9, 0:31:40 left"
    assert last == "20%, 0 tok/s: short step 0/1; long step 0/9, 0:13:20 left"


def test_it_is_told_once_when_the_first_step_is_made(make_job, make_workload, caplog):
    workload = make_workload(make_job("short", (4,) * 2))
    history = History({"short": {0: StepMetrics(4, loss=2.5, tokens=4), 1: StepMetrics(0, tokens=8, norm=1.0)}})
    reader = SimpleNamespace(tokens=[0], history=history)
    plan = plan_workload(workload, stages=1, capacity=8)
    with caplog.at_level(logging.INFO), Display(workload, plan, reader) as display:
        for changed in ([("short", 0), ("short", 5)], [("short", 1)], [("short", 1)]):
            display.note(changed)
    [message] = caplog.messages
    assert re.fullmatch(r"the first step was made \d+ s after the command began", message)


def test_wandb_keeps_what_it_is_given_and_nothing_of_the_machine(make_workload, tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    folder = tmp_path / "secret-folder" / "out"
    folder.mkdir(parents=True)
    for command in ("init -q", "remote add origin https://user:secret-token@example.org/x.git"):
        subprocess.run(["git", *command.split()], cwd=folder.parent, check=True)
    monkeypatch.chdir(folder.parent)
    monkeypatch.setattr(sys, "argv", ["lorafusion", "train", "secret-jobs.yaml"])
    monkeypatch.setenv("WANDB_NOTES", "secret-notes")
    monkeypatch.setenv("OF_MINE", "secret-variable")
    log = WandbLog("offline", "a-project", "a-name", folder, make_workload())
    log.log("a", 0, History({"a": {0: StepMetrics(0, loss=2.5, tokens=8, norm=1.0, learning_rate=0.25)}}))
    log.finish()
    assert os.environ["WANDB_NOTES"] == "secret-notes"

    [run] = (folder / "wandb").glob("offline-run-*")
    sent = b"".join(path.read_bytes() for path in run.rglob("*") if path.is_file() and path.parent.name != "logs")
    for given in (b"a-project", b"a-name", b"a/loss", b"learning_rate"):
        assert given in sent
    for private in ("secret-", str(tmp_path), sys.executable, platform.node(), getpass.getuser()):
        assert len(private) < 5 or private.encode() not in sent, private  # a short one is there by chance
    assert {path.name for path in folder.iterdir()} == {"wandb"}
