"""Killed or out of space between any two changes of its folder, a training ends as if nothing had been: no row and no
file is lost, none is there twice. What the processes of the run did is played back here; that they bear being killed is
in tests/engine/test_checkpoint.py."""

from __future__ import annotations

import json
import shutil
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lorafusion.core.manifest import verified
from lorafusion.core.schema import UserError
from lorafusion.core.workload import Workload
from lorafusion.engine.checkpoint import adapter_state, opened
from lorafusion.launch.outcome import Outcome
from lorafusion.train import export as exporting
from lorafusion.train import run as training
from lorafusion.train.folder import read_progress, write_progress
from lorafusion.train.run import DONE, FAILED, train
from tests.faults import Killed, fault_at, full_disk
from tests.train.playback import JOBS, files, jobs_file, status


def test_what_is_played_back_is_the_training(recorded, played, tmp_path):
    with fault_at(10**9) as changes:
        assert train(jobs_file(tmp_path)) == DONE
    assert files(tmp_path) == files(recorded)
    assert len(changes) > 40, "these are the moments of the tests below"


@pytest.mark.parametrize("part", range(4))
def test_killed_at_any_moment_it_goes_on_to_the_same_end(recorded, played, tmp_path, part):
    """And the attempt that goes on is killed too, somewhere else."""
    moment, killed = part + 1, True
    while killed:
        folder = tmp_path / str(moment)
        for at in (moment, moment // 2 + 1):
            try:
                with fault_at(at):
                    killed = train(jobs_file(folder)) != DONE
            except Killed:
                killed = True
        assert train(folder / "jobs.yaml") == DONE, moment
        assert files(folder) == files(recorded), moment
        assert status(folder)["status"] == "ok"
        left = [str(path.relative_to(folder)) for path in folder.rglob(".*") if path.name != ".lock"]
        assert left == [], moment
        moment += 4


@pytest.mark.parametrize("part", range(4))
def test_a_full_disk_loses_nothing(recorded, played, tmp_path, capsys, part):
    moment = part + 1
    while True:
        folder = tmp_path / str(moment)
        with fault_at(moment, full_disk()) as tried:
            try:
                code, said = train(jobs_file(folder)), capsys.readouterr().err
            except UserError as error:
                code, said = 2, str(error)
        if len(tried) < moment:
            break
        assert code in (2, FAILED)
        assert "No space left on device" in said.splitlines()[-1]
        assert train(folder / "jobs.yaml") == DONE, moment
        assert files(folder) == files(recorded), moment
        moment += 4


@pytest.fixture(scope="module")
def stopped(recorded, tmp_path_factory):
    """The training as it was when it was asked to stop at its second checkpoint, before a third job was added."""
    folder = tmp_path_factory.mktemp("stopped")
    slots = sorted((recorded / "out/runs/000/checkpoints").glob("slot-*"))[:2]
    shutil.copytree(recorded / "out", folder / "out")
    checkpoints = folder / "out/runs/000/checkpoints"
    for path in set(checkpoints.glob("slot-*")) - {checkpoints / slot.name for slot in slots}:
        shutil.rmtree(path)
    progress = read_progress(folder / "out")
    runs = {"000": progress.runs["000"].model_copy(update={"events": None})}
    write_progress(folder / "out", progress.model_copy(update={"jobs": {}, "exported": {}, "runs": runs}))
    shutil.rmtree(folder / "out/state")
    shutil.rmtree(folder / "out/adapters")
    return folder


@pytest.mark.parametrize("part", range(2))
def test_killed_at_any_moment_of_a_change_of_jobs_nothing_is_lost(stopped, tmp_path, monkeypatch, part):
    """Each job that was begun goes on from the last checkpoint in the new plan, with the rows of its steps."""
    begun = []
    monkeypatch.setattr(training, "launch", lambda spec, *_, **__: begun.append(spec) or Outcome("crash", "so far"))
    monkeypatch.setattr(exporting, "_draw", lambda job, steps, path: path.touch())
    last = opened(max((stopped / "out/runs/000/checkpoints").glob("slot-*")))
    done_before = last.steps["long"]
    assert last.steps["short"] == 2
    assert 0 < done_before < 6
    moment, done = part + 1, False
    while not done:
        folder = tmp_path / str(moment)
        shutil.copytree(stopped, folder)
        path = jobs_file(folder, jobs=[*JOBS, {"name": "late", "seed": 3}])
        begun.clear()
        with fault_at(moment), suppress(Killed):
            done = train(path) == FAILED
        assert train(path) == FAILED  # by the launch above, which does nothing
        workload = Workload.read(begun[-1].workload)
        assert {job.name: job.start for job in workload.jobs} == {"long": done_before, "late": 0}, moment
        assert verified(Path(begun[-1].initial)) == {"steps": {"long": done_before}}
        state = load_file(Path(begun[-1].initial) / "long.safetensors")
        expected = adapter_state(last, "long")
        assert state.keys() == expected.keys()
        assert all(torch.equal(state[name], value) for name, value in expected.items())
        rows = [json.loads(line) for line in (folder / "out/metrics.jsonl").read_text().splitlines()]
        expected = {("short", 1), ("short", 2), *(("long", step + 1) for step in range(done_before))}
        assert {(row["job"], row["step"]) for row in rows} == expected, moment
        assert (folder / "out/adapters/short/adapter_model.safetensors").exists()
        moment += 2
