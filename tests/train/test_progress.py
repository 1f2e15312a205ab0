"""What wandb is told of a training: its numbers and its jobs, and nothing of the machine or of who works on it."""

from __future__ import annotations

import getpass
import os
import platform
import subprocess
import sys

import pytest

from lorafusion.train.metrics import History, StepMetrics
from lorafusion.train.progress import WandbLog

pytest.importorskip("wandb")


def test_wandb_keeps_what_it_is_given_and_nothing_of_the_machine(make_workload, tmp_path, monkeypatch):
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
