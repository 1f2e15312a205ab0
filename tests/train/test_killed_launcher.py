"""`kill -9` of the command alone, while its workers are in a slow microbatch, and the same command at once."""

from __future__ import annotations

import json
import os
import signal
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from lorafusion.engine import fork_server as product
from lorafusion.launch.lock import LOCK, Process
from lorafusion.train import run as training
from lorafusion.train.run import DONE, train
from tests import forked

SETTINGS = {
    "model": "tiny", "output": "out", "capacity": 128, "save_every": 3, "processes": 2, "device": "cpu",
    "defaults": {"data": {"synthetic": {"samples": 24, "dataset": "xsum", "scale": 32}}, "global_batch_size": 4},
    "jobs": [{"name": name, "rank": 2, "seed": seed, "epochs": 2} for seed, name in enumerate("abc")],
}  # fmt: skip
HELD = 10  # the slot before which the workers are held


def jobs_file(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "jobs.yaml").write_text(yaml.safe_dump(SETTINGS))
    return folder / "jobs.yaml"


def rows(folder: Path) -> list[str]:
    return (folder / "out/metrics.jsonl").read_text().splitlines()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "launch", forked.launch)
        assert train(jobs_file(folder)) == DONE
    return folder


def train_until_killed(path: Path) -> None:
    """Train until all workers are before a slot, and be killed there. Its workers are forked from it."""

    def launch(spec, processes, look, **options):
        kill = forked.once_before(HELD, Path(spec.saving.folder), processes,
                                  lambda: os.kill(os.getpid(), signal.SIGKILL))  # fmt: skip
        return product.launch_any(spec, processes, look=lambda: (look(), kill()), start=forked.Outliving, **options)

    product.FORKSERVER = get_context("fork")  # of this process alone
    training.launch = launch
    train(path)


def test_the_same_command_at_once_loses_no_row(whole, tmp_path, monkeypatch, capfd):
    path = jobs_file(tmp_path)
    launcher = product.FORKSERVER.Process(target=train_until_killed, args=(path,))
    launcher.start()
    launcher.join()
    assert launcher.exitcode == -signal.SIGKILL
    members = [json.loads(line) for line in (tmp_path / "out" / LOCK).read_text().splitlines()]
    workers = [Process(**member["process"]) for member in members if not member["launches"]]
    assert len(workers) == 2
    assert all(worker.lives for worker in workers), "they wait in their microbatch"
    status = json.loads((tmp_path / "out/status.json").read_text())
    assert status["status"] == "running"
    assert not Process(**status["process"]).lives

    def launch(spec, *arguments, **options):
        assert not any(worker.lives for worker in workers), "before anything of the folder is read or run"
        (Path(spec.saving.folder) / f"wait-{HELD}").unlink()
        return forked.launch(spec, *arguments, **options)

    monkeypatch.setattr(training, "launch", launch)
    assert train(path) == DONE
    assert "ended 2 processes that an earlier training left running" in capfd.readouterr().err
    assert len(rows(whole)) == 36
    assert rows(tmp_path) == rows(whole)
    for name in "abc":
        ours, theirs = (
            load_file(folder / f"out/adapters/{name}/adapter_model.safetensors") for folder in (tmp_path, whole)
        )
        assert all(torch.equal(ours[key], value) for key, value in theirs.items())
