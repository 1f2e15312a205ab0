"""The Slurm jobs of a killed driver end before the next one makes anything; nobody else's do."""

from __future__ import annotations

import json
import shutil

import pytest

from lorafusion.core.schema import UserError
from lorafusion.lab.cluster import left_jobs
from lorafusion.lab.cluster.left_jobs import RECORD, end_left_jobs, record_run
from lorafusion.lab.driver import driving

RUNNING = "2|RUNNING|node1|None|check_lossless"
WAITING = "8|PENDING||Resources|run a"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Of results, whose last driver was killed."""
    monkeypatch.setattr(left_jobs, "LOOK_SECONDS", 0.01)
    folder = tmp_path / "results"
    folder.mkdir()
    record_run(folder, "run-1")
    return folder


def test_the_next_driver_ends_them_first_and_says_which(slurm, folder, capsys):
    slurm.queue(RUNNING, WAITING, *[f"{job}|PENDING||Priority|b" for job in (9, 10)])
    with driving(folder, "workflow", slurm_run="run-2") as changed:
        assert changed
        assert slurm.calls("scancel") == ["--quiet 2 8 9 10"]
        assert {call.split()[1] for call in slurm.calls("squeue")} == {"--name=run-1"}
        assert json.loads((folder / RECORD).read_text())["run"] == "run-2"
        begin, names = "4 Slurm jobs of an earlier workflow here", "2 (check_lossless), 8 (run a), 9 (b) and 1 more"
        assert capsys.readouterr().out == f"{begin}, cancelled in 0 s: {names}\n"
    assert slurm.calls("squeue")[-1].split()[1] == "--name=run-2"
    assert not (folder / RECORD).exists()


def test_a_driver_without_slurm_ends_them_too(slurm, folder):
    slurm.queue(RUNNING)
    with driving(folder, "figures"):
        assert slurm.calls("scancel") == ["--quiet 2"]
        assert not (folder / RECORD).exists()


def test_where_none_was_submitted_slurm_is_not_asked(slurm, tmp_path):
    slurm.queue(RUNNING)
    with driving(tmp_path / "results", "workflow") as changed:
        assert not changed
    assert slurm.calls("squeue") == []


def test_a_copy_of_the_folder_ends_no_job_of_the_original(slurm, folder, tmp_path):
    slurm.queue(RUNNING)
    shutil.copytree(folder, tmp_path / "copy")
    end_left_jobs(tmp_path / "copy")
    assert slurm.calls("scancel") == []
    assert (folder / RECORD).exists()
    folder.rename(tmp_path / "moved")
    end_left_jobs(tmp_path / "moved")
    assert slurm.calls("scancel") == ["--quiet 2"]


def test_without_an_answer_nothing_begins(slurm, folder):
    slurm.program("squeue", "echo 'squeue: error: Unable to contact slurm controller' >&2; exit 1")
    message = r"\.slurm-jobs: cannot tell whether .* still run: squeue: Unable to contact .*; if none does, delete this"
    with pytest.raises(UserError, match=message), driving(folder, "workflow"):
        pytest.fail("begun")
    assert (folder / RECORD).exists()


def test_a_job_that_does_not_end_is_named(slurm, folder, monkeypatch):
    monkeypatch.setattr(left_jobs, "END_SECONDS", 0.1)
    slurm.queue(RUNNING.replace("RUNNING", "COMPLETING"))
    slurm.program("scancel", "true")
    with pytest.raises(UserError, match=r"Slurm job 2 on node1 is COMPLETING, 0 s after scancel; start again once"):
        end_left_jobs(folder)


def test_those_that_run_can_be_waited_for(slurm, folder, capsys, monkeypatch):
    monkeypatch.setenv("LORAFUSION_SLURM_LEFT_JOBS", "wait")
    slurm.queue(RUNNING, WAITING)
    slurm.program("squeue", 'cat queue; [ "$(wc -l <squeue.calls)" -lt 3 ] || : >queue')
    with driving(folder, "workflow", slurm_run="run-2") as changed:
        assert changed
        assert slurm.calls("scancel") == ["--quiet 8"]
        assert len(slurm.calls("squeue")) == 4
        slurm.queue(RUNNING)
    assert slurm.calls("scancel") == ["--quiet 8", "--quiet 2"]  # a driver that ends leaves nothing running
    assert capsys.readouterr().out.splitlines()[:2] == [
        "1 Slurm jobs of an earlier workflow here, waited for: 2 (check_lossless)",
        "1 Slurm jobs of an earlier workflow here, cancelled in 0 s: 8 (run a)",
    ]


def test_a_way_to_treat_them_that_there_is_not_is_named(slurm, folder, monkeypatch):
    monkeypatch.setenv("LORAFUSION_SLURM_LEFT_JOBS", "keep")
    slurm.queue(RUNNING)
    with pytest.raises(UserError, match="LORAFUSION_SLURM_LEFT_JOBS: left_jobs: .*keep"):
        end_left_jobs(folder, patient=True)
    assert slurm.calls("scancel") == []
