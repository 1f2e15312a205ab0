"""status.json is about the last command, whatever became of it."""

from __future__ import annotations

import hashlib
import os
import signal
from pathlib import Path

import pytest

from lorafusion.core.schema import UserError
from lorafusion.launch.lock import Process, locked
from lorafusion.launch.outcome import Outcome
from lorafusion.train import run as training
from lorafusion.train.run import DONE, FAILED, STOPPED, train
from lorafusion.train.status import output_named_in
from tests.train import playback
from tests.train.playback import JOBS, jobs_file, status


def ended(monkeypatch, *outcomes) -> None:
    """Runs end so, one after another."""
    left = list(outcomes)
    monkeypatch.setattr(training, "launch", lambda *_, **__: left.pop(0))


@pytest.fixture
def finished(played, tmp_path):
    """A training that has ended well."""
    assert train(jobs_file(tmp_path)) == DONE
    assert status(tmp_path)["status"] == "ok"
    return tmp_path


def test_it_says_running_while_it_runs(recorded, tmp_path):
    seen = []
    with playback.played(recorded, lambda slot: seen.append(status(tmp_path))):
        assert train(jobs_file(tmp_path)) == DONE
    assert {one["status"] for one in seen} == {"running"}
    process = Process(**seen[0]["process"])
    assert process == Process.current()
    assert process.lives
    last = status(tmp_path)
    assert (last["status"], last["note"], last["began"]) == ("ok", "", seen[0]["began"])
    content = (tmp_path / "jobs.yaml").read_bytes()
    assert last["jobs_file"] == {
        "path": str(tmp_path / "jobs.yaml"), "sha256": hashlib.sha256(content).hexdigest()
    }  # fmt: skip
    assert last["jobs"] == {"short": {"state": "exported", "steps": 2}, "long": {"state": "exported", "steps": 6}}


def test_it_is_not_ok_while_another_job_trains(finished, monkeypatch):
    seen = []
    monkeypatch.setattr(training, "launch", lambda *_, **__: seen.append(status(finished)) or Outcome("crash", "why"))
    assert train(jobs_file(finished, jobs=[*JOBS, {"name": "late"}])) == FAILED
    assert seen[0]["status"] == "running"
    assert seen[0]["jobs"]["late"] == {"state": "training", "steps": 0}
    assert (status(finished)["status"], status(finished)["note"]) == ("crash", "why")


def killed(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)


def test_after_kill_9_it_names_a_process_that_is_gone(finished, monkeypatch):
    monkeypatch.setattr(training, "launch", killed)
    path = jobs_file(finished, jobs=[*JOBS, {"name": "late"}])
    pid = os.fork()
    if pid == 0:
        try:
            train(path)
        finally:
            os._exit(0)
    assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGKILL
    assert status(finished)["status"] == "running"
    process = Process(**status(finished)["process"])
    assert process.pid == pid
    assert not process.lives


BROKEN = {
    "a wrong value": lambda text: text.replace("capacity: 64", "capacity: none"),
    "a wrong name": lambda text: text.replace("name: long", "name: training"),
    "no YAML": lambda text: text + "jobs: [}\n",
    "no jobs": lambda text: "output: out\n",
    "quotes": lambda text: text.replace("output: out", "output: 'out'  # here") + "unknown: 1\n",
}


@pytest.mark.parametrize("change", BROKEN.values(), ids=BROKEN.keys())
def test_a_broken_jobs_file_leaves_no_ok_behind(finished, change):
    path = finished / "jobs.yaml"
    text = change(path.read_text())
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        train(path)
    note = " ".join(str(caught.value).split())[:300]  # of several mistakes
    assert (status(finished)["status"], status(finished)["note"]) == ("refused", note)
    assert status(finished)["jobs_file"]["sha256"] == hashlib.sha256(text.encode()).hexdigest()


BROKEN_LATE = {
    "a typo": ("capacity: 64", "capacity: none", "capacity"),
    "another rank": ("rank: 2", "rank: 3", "job 'short': rank is 3, but its 2 steps in"),
    "no such model": ("model: tiny", "model: tinny", "tinny"),
}


@pytest.mark.parametrize(("before", "after", "reason"), BROKEN_LATE.values(), ids=BROKEN_LATE.keys())
def test_with_a_mistake_at_the_signal_to_read_it_again_it_goes_on_as_it_was(
    recorded, tmp_path, monkeypatch, capsys, before, after, reason
):
    path = jobs_file(tmp_path)
    text, seen = path.read_text(), []

    def look(slot: int) -> None:
        seen.append(status(tmp_path))
        if len(list((tmp_path / "out/runs/000/checkpoints").glob("slot-*"))) == 2 and before in path.read_text():
            path.write_text(text.replace(before, after))
            raise TimeoutError

    with playback.played(recorded, look):
        launch = training.launch

        def stopped_once(*arguments, **options) -> Outcome:
            try:
                return launch(*arguments, **options)
            except TimeoutError:
                return Outcome("stopped", "by SIGHUP, after saving a checkpoint")

        monkeypatch.setattr(training, "launch", stopped_once)
        assert train(path) == DONE
    assert playback.files(tmp_path) == playback.files(recorded)
    [line] = [line for line in capsys.readouterr().err.splitlines() if "going on with the jobs as they were" in line]
    assert line.startswith("error: ")
    assert reason in line
    assert seen[-1]["status"] == "running"
    assert reason in seen[-1]["note"]
    assert seen[-1]["note"].startswith("with the jobs as they were: ")
    assert seen[-1]["jobs_file"]["sha256"] == hashlib.sha256(text.encode()).hexdigest()
    assert status(tmp_path)["status"] == "ok"


def test_a_refused_second_command_says_nothing_of_the_first(finished):
    before = (finished / "out/status.json").read_bytes()
    with locked(finished / "out"):
        with pytest.raises(UserError, match="another training is using this folder"):
            train(finished / "jobs.yaml")
        (finished / "jobs.yaml").write_text("output: out\n")
        with pytest.raises(UserError, match="jobs"):
            train(finished / "jobs.yaml")
    assert (finished / "out/status.json").read_bytes() == before


def test_a_users_own_status_is_left_alone(tmp_path):
    (tmp_path / "jobs.yaml").write_text("output: .\n")
    (tmp_path / "status.json").write_text("mine")
    with pytest.raises(UserError):
        train(tmp_path / "jobs.yaml")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["jobs.yaml", "status.json"]
    assert (tmp_path / "status.json").read_text() == "mine"


def raising(error: BaseException):
    def launch(*_, **__):
        raise error

    return launch


@pytest.mark.parametrize(
    ("error", "expected", "raised"),
    [
        (KeyboardInterrupt(), "interrupted", KeyboardInterrupt),
        (UserError("why"), "failed", UserError),
        (OSError(28, "No space left on device", "x"), "failed", UserError),
        (ZeroDivisionError(), "crash", ZeroDivisionError),
    ],
)
def test_it_says_how_a_command_was_broken_off(finished, monkeypatch, error, expected, raised):
    monkeypatch.setattr(training, "launch", raising(error))
    with pytest.raises(raised):
        train(jobs_file(finished, jobs=[*JOBS, {"name": "late"}]))
    assert status(finished)["status"] == expected


@pytest.mark.parametrize(
    ("outcome", "code"),
    [(Outcome("stopped", "by SIGTERM"), STOPPED), (Outcome("oom", "why"), FAILED), (Outcome("timeout", "why"), FAILED)],
)
def test_it_has_the_outcome_of_the_processes(tmp_path, monkeypatch, outcome, code):
    ended(monkeypatch, outcome)
    assert train(jobs_file(tmp_path)) == code
    assert (status(tmp_path)["status"], status(tmp_path)["note"]) == (outcome.status, outcome.note)


def test_the_output_is_found_in_what_cannot_be_read(tmp_path):
    path = tmp_path / "jobs.yaml"
    for text, expected in {
        "output: a b # c\n": tmp_path / "a b",
        'x: [\noutput: "/d"\n': Path("/d"),
        "a: 1": None,
    }.items():
        path.write_text(text)
        assert output_named_in(path) == expected
    assert output_named_in(tmp_path / "none.yaml") is None
