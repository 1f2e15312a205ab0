"""Who makes the steps of a results folder: one driver, its own processes, and never a bystander."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from lorafusion.core.schema import UserError
from lorafusion.lab.driver import driving, is_driven, join_driver
from lorafusion.lab.runner import Share
from lorafusion.launch.lock import LOCK, VARIABLE, Process
from tests.cli.test_cli import lorafusion

# A process of a driver, which does not listen to SIGTERM and says in a file that it is there.
STEP = """
import signal, sys, time
from pathlib import Path
signal.signal(signal.SIGTERM, signal.SIG_IGN)
from lorafusion.lab.driver import join_driver
join_driver()
Path(sys.argv[1]).touch()
time.sleep(120)
"""
# A driver of a folder, with a step; the rest of the command line is its share.
DRIVER = f"""
import subprocess, sys, time
from pathlib import Path
from lorafusion.lab.driver import driving
from lorafusion.lab.runner import Share
folder, share = Path(sys.argv[1]), Share.read(sys.argv[2])
with driving(folder, "sweep of suite toy", share):
    step = subprocess.Popen([sys.executable, "-c", {STEP!r}, str(folder / "ready")], start_new_session=True)
    (folder / "step").write_text(str(step.pid))
    time.sleep(120)
"""


@pytest.fixture
def start():
    """Starts a Python program; ended at the end, with its step."""
    started, folders = [], set()

    def run(program: str, *arguments: object) -> subprocess.Popen:
        folders.add(Path(str(arguments[0])))
        started.append(subprocess.Popen([sys.executable, "-c", program, *map(str, arguments)]))
        return started[-1]

    yield run
    for process in started:
        process.kill()
        process.wait()
    for folder in folders:
        if (folder / "step").exists():
            end(int((folder / "step").read_text()))


def end(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def driver(start, folder: Path, share: str = "0/1") -> subprocess.Popen:
    """A driver at work, whose step has begun."""
    process = start(DRIVER, folder, share)
    wait_for((folder / "ready").exists)
    (folder / "ready").unlink()
    return process


def wait_for(true) -> None:
    limit = time.monotonic() + 60
    while not true():
        assert time.monotonic() < limit
        time.sleep(0.02)


def lives(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def test_the_second_hears_who_is_at_work(start, tmp_path):
    first = driver(start, tmp_path)
    message = (
        rf"another sweep of suite toy is using this folder: process {first.pid} on .*, since \d\d \w+ \d\d:\d\d:\d\d$"
    )
    with pytest.raises(UserError, match=message), driving(tmp_path, "workflow"):
        pass
    assert not is_driven()
    assert first.poll() is None
    assert lives(int((tmp_path / "step").read_text()))


def test_every_command_that_makes_steps_is_kept_out(start, suite, tmp_path):
    folder = tmp_path / "results"
    first = driver(start, folder)
    step = folder / "runs/model~tiny/a/repeat~1.json"
    for arguments in (["run", suite, "--here"], ["measure", suite], ["figure", suite], ["check", suite],
                      ["run", suite]):  # fmt: skip
        done = lorafusion("lab", *arguments, "--folder", folder)
        assert done.returncode == 2, arguments
        assert done.stderr.startswith(f"error: {folder}: another sweep of suite toy is using this folder: process "
                                      f"{first.pid} on ")  # fmt: skip
        assert done.stderr.count("\n") == 1
    assert not step.exists()
    assert lorafusion("lab", "list", suite, "--folder", folder).returncode == 0


@pytest.mark.parametrize("share", ["0/1", "1/2"])
@pytest.mark.parametrize("after", [Share(0, 1), Share(1, 2)])
def test_what_a_killed_driver_left_is_ended_and_no_bystander(start, tmp_path, share, after):
    """The bystander has the step's command line and reads its log, but was started by somebody else."""
    (tmp_path / "log").touch()
    bystander = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(120)", STEP], cwd=tmp_path)
    reader = subprocess.Popen(["tail", "-f", "log", "lorafusion lab run toy --step x"], cwd=tmp_path, stderr=-3)
    try:
        first = driver(start, tmp_path, share)
        step = int((tmp_path / "step").read_text())
        first.kill()
        first.wait()
        assert lives(step)
        with driving(tmp_path, "workflow", after):
            assert not lives(step)
        assert (bystander.poll(), reader.poll()) == (None, None)
    finally:
        for process in (bystander, reader):
            process.kill()
            process.wait()


def test_shares_work_side_by_side_and_beside_nobody_else(start, tmp_path):
    other = driver(start, tmp_path, "0/2")
    with driving(tmp_path, "sweep", Share(1, 2)):
        pass
    for share in (None, Share(0, 1), Share(0, 2), Share(1, 3)):
        with (
            pytest.raises(UserError, match=rf"another sweep of suite toy is using .*: process {other.pid}"),
            driving(tmp_path, "workflow", share),
        ):
            pass
    assert lives(int((tmp_path / "step").read_text()))


def test_a_driver_leaves_nothing_running(tmp_path):
    with driving(tmp_path, "workflow"):
        assert is_driven()
        step = subprocess.Popen([sys.executable, "-c", STEP, str(tmp_path / "ready")])
        wait_for((tmp_path / "ready").exists)
    assert step.wait(10) == -signal.SIGKILL
    assert not is_driven()
    assert (tmp_path / LOCK).read_text() == ""


def test_a_step_that_comes_after_its_driver_was_killed_does_nothing(tmp_path, monkeypatch):
    with driving(tmp_path, "workflow"):
        late = os.environ[VARIABLE]
    with driving(tmp_path, "workflow"):
        monkeypatch.setenv(VARIABLE, late)
        with pytest.raises(UserError, match="another launcher has the folder by now"):
            join_driver()
        monkeypatch.undo()


def test_a_step_on_another_machine_is_none_that_can_be_ended(tmp_path, monkeypatch):
    """Slurm starts it, and ends it."""
    lock = {"path": str(tmp_path / LOCK), "token": "t"}
    process = Process.current().model_copy(update={"host": "login", "boot": "b"}).model_dump()
    (tmp_path / LOCK).write_text(json.dumps({"token": "t", "launches": True, "process": process, "what": "w"}) + "\n")
    monkeypatch.setenv(VARIABLE, json.dumps(lock))
    with driving(tmp_path, "step"):
        assert (os.environ[VARIABLE], is_driven()) == ("", True)
    assert len((tmp_path / LOCK).read_text().splitlines()) == 1
