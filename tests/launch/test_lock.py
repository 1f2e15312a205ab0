"""One launcher has a folder: who is alive is refused, who was left behind is ended, and nobody else ever is."""

from __future__ import annotations

import errno
import json
import os
import signal
import time
from pathlib import Path

import psutil
import pytest

from lorafusion.core.schema import UserError
from lorafusion.launch import lock as locks
from lorafusion.launch import pulse
from lorafusion.launch.lock import LOCK, VARIABLE, Lock, Process, inherited, join, locked
from lorafusion.launch.pulse import start_of


@pytest.fixture
def forked():
    """Runs a function in a process that is ended at the end, should it live so long; returns the process's id."""
    pids = []

    def fork(what) -> int:
        pid = os.fork()
        if pid == 0:
            try:
                what()
            finally:
                os._exit(0)
        pids.append(pid)
        return pid

    yield fork
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        except (ProcessLookupError, ChildProcessError):
            pass


def note(folder: Path, token: str = "old", launches: bool = False, **changes) -> None:
    """Put a process down in a folder's lock as an earlier launcher would have."""
    process = Process.current().model_copy(update=changes).model_dump()
    with open(folder / LOCK, "a") as file:
        file.write(json.dumps({"token": token, "launches": launches, "process": process}) + "\n")


def wait_for(true) -> None:
    end = time.monotonic() + 30
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / LOCK).read_text().splitlines()]


def test_the_file_says_who_has_the_folder(tmp_path):
    with locked(tmp_path / "new") as own:
        join(own)
        launcher, worker = lines(tmp_path / "new")
        assert launcher["process"] == worker["process"] == Process.current().model_dump()
        assert (launcher["launches"], worker["launches"]) == (True, False)
    assert lines(tmp_path / "new") == []


def test_a_launcher_at_work_is_not_disturbed(tmp_path):
    with locked(tmp_path):
        before = (tmp_path / LOCK).read_text()
        is_using = (
            rf"another training is using this folder: process {os.getpid()} on .*, since \d\d \w+ \d\d:\d\d:\d\d$"
        )
        with pytest.raises(UserError, match=is_using), locked(tmp_path):
            pass
        assert (tmp_path / LOCK).read_text() == before


def test_who_is_kept_out_hears_what_the_other_does(tmp_path):
    with (
        locked(tmp_path, "a", "sweep of suite smoke"),
        pytest.raises(UserError, match="another sweep of suite smoke is using this folder: process"),
        locked(tmp_path, "a", "workflow"),
    ):
        pass
    with locked(tmp_path, "a"), locked(tmp_path, "b"):
        pass


def test_the_lock_of_those_who_started_a_process_is_in_its_environment(tmp_path, monkeypatch):
    assert inherited() is None
    with locked(tmp_path) as own:
        monkeypatch.setenv(VARIABLE, own.model_dump_json())
        assert inherited() == own
    monkeypatch.setenv(VARIABLE, "")
    assert inherited() is None


def test_the_workers_of_a_killed_launcher_are_ended(tmp_path, forked):
    """They do not listen to SIGTERM, as workers in a microbatch do not."""
    ready = tmp_path / "ready"

    def launch() -> None:
        with locked(tmp_path) as own:
            for _ in range(2):
                forked(lambda: work(own))
            time.sleep(60)

    def work(own: Lock) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        os.closerange(3, 1000)  # as those that are started by another program have nothing of the launcher's open
        join(own)
        with open(ready, "a") as file:
            file.write(f"{os.getpid()}\n")
        time.sleep(60)

    launcher = forked(launch)
    wait_for(lambda: ready.exists() and len(ready.read_text().splitlines()) == 2)
    workers = [Process(**line["process"]) for line in lines(tmp_path) if not line["launches"]]
    assert all(worker.lives for worker in workers)
    os.kill(launcher, signal.SIGKILL)
    os.waitpid(launcher, 0)
    begin = time.monotonic()
    with locked(tmp_path):
        assert not any(worker.lives for worker in workers)
        assert [line["process"]["pid"] for line in lines(tmp_path)] == [os.getpid()]
    assert time.monotonic() - begin < 10


def test_a_process_that_has_got_a_dead_ones_id_is_left_alone(tmp_path, forked):
    pid = forked(lambda: time.sleep(60))
    note(tmp_path, pid=pid, start=Process.current().start - 1)
    with locked(tmp_path):
        assert os.waitpid(pid, os.WNOHANG) == (0, 0)


def test_a_worker_that_comes_late_touches_nothing(tmp_path):
    """Its launcher was killed before it had put its name down."""
    with locked(tmp_path) as old:
        pass
    with locked(tmp_path), pytest.raises(UserError, match="another launcher has the folder by now"):
        join(old)
    with pytest.raises(UserError, match="another launcher has the folder by now"):
        join(old)


def test_a_worker_that_comes_between_is_seen(tmp_path, monkeypatch):
    """It puts its name down after the new launcher has read the file for the first time."""
    note(tmp_path, launches=True, start=0)
    ended = []

    def come(folder, path, what):
        join(Lock(path=str(tmp_path / LOCK), token="old"))
        return set()

    monkeypatch.setattr(locks, "_silent", come)
    monkeypatch.setattr(locks, "_end", lambda processes, folder: ended.extend(processes))
    with locked(tmp_path):
        assert Process.current() in ended


ELSEWHERE = [{"host": "other", "boot": "b"}, {"namespace": "pid:[1]"}, {"host": "other", "namespace": "pid:[1]"}]


@pytest.mark.parametrize("elsewhere", ELSEWHERE)
def test_who_lives_on_another_machine_is_not_disturbed(tmp_path, forked, elsewhere):
    """Its worker, too, whose launcher was killed. It gives a sign every two seconds."""
    pid = forked(lambda: time.sleep(60))
    note(tmp_path, launches=True, pid=1, start=1, **elsewhere)
    note(tmp_path, pid=pid, start=start_of(pid), **elsewhere)
    forked(lambda: pulse.beat(tmp_path / LOCK, "old"))
    before = (tmp_path / LOCK).read_text()
    with pytest.raises(UserError, match="another training is using this folder: process"), locked(tmp_path):
        pass
    assert (tmp_path / LOCK).read_text() == before
    assert start_of(pid)


@pytest.mark.parametrize("elsewhere", ELSEWHERE)
def test_who_lives_no_longer_on_another_machine_is_waited_for(tmp_path, monkeypatch, caplog, elsewhere):
    monkeypatch.setattr(locks, "SILENT_SECONDS", 1)
    note(tmp_path, launches=True, **elsewhere)
    begin = time.monotonic()
    with locked(tmp_path):
        assert time.monotonic() - begin > 1
        assert [line["process"] for line in lines(tmp_path)] == [Process.current().model_dump()]
    assert "was at work here; waiting 1 s to see whether it still is" in caplog.text


@pytest.mark.slow
def test_the_file_is_touched_until_the_launcher_ends(tmp_path, forked):
    """Also where it is stopped, as by Ctrl-Z; no longer once it was killed."""

    def launch() -> None:
        with locked(tmp_path):
            time.sleep(60)

    def is_touched() -> bool:
        before = (tmp_path / LOCK).stat().st_mtime_ns
        time.sleep(2 * pulse.BEAT_SECONDS)
        return (tmp_path / LOCK).stat().st_mtime_ns != before

    launcher = forked(launch)
    wait_for(lambda: (tmp_path / LOCK).exists() and lines(tmp_path))
    os.kill(launcher, signal.SIGSTOP)
    assert is_touched()
    os.kill(launcher, signal.SIGKILL)
    os.waitpid(launcher, 0)
    time.sleep(pulse.BEAT_SECONDS)
    assert not is_touched()
    with locked(tmp_path):
        (beating,) = [child for child in psutil.Process().children() if pulse.__file__ in child.cmdline()]
    assert not beating.is_running()


def test_a_launcher_that_slept_ends_where_another_has_the_folder(tmp_path, forked):
    """With its machine, and all that it has started."""
    pids = [forked(lambda: time.sleep(60)) for _ in range(2)]
    note(tmp_path, launches=True, pid=pids[0], start=start_of(pids[0]))
    note(tmp_path, pid=pids[1], start=start_of(pids[1]))
    forked(lambda: pulse.beat(tmp_path / LOCK, "old"))
    time.sleep(0.5)
    (tmp_path / LOCK).write_text("")
    note(tmp_path, token="new", launches=True)
    assert {os.WTERMSIG(os.waitpid(pid, 0)[1]) for pid in pids} == {signal.SIGKILL}


def test_nothing_lives_from_before_the_machine_was_started(tmp_path):
    note(tmp_path, launches=True, boot="before", namespace="pid:[1]")
    with locked(tmp_path):
        pass


def test_who_cannot_be_ended_is_refused_in_time(tmp_path, monkeypatch, forked):
    pid = forked(lambda: time.sleep(60))
    note(tmp_path, pid=pid, start=start_of(pid))
    monkeypatch.setattr(Process, "kill", lambda _: None)
    monkeypatch.setattr(locks, "END_SECONDS", 0.1)
    for _ in range(2):  # it still stands there
        with (
            pytest.raises(UserError, match=f"process {pid} of an earlier training here cannot be ended"),
            locked(tmp_path),
        ):
            pass


def test_a_damaged_lock_is_one_line(tmp_path):
    (tmp_path / LOCK).write_text("{")
    with pytest.raises(UserError, match="damaged; if no training uses the folder, delete this file"), locked(tmp_path):
        pass


def test_half_a_line_for_want_of_room_hinders_nobody(tmp_path):
    with locked(tmp_path) as old:
        whole = (tmp_path / LOCK).read_text()
    (tmp_path / LOCK).write_text(whole[:100])
    with locked(tmp_path) as new:
        assert len(lines(tmp_path)) == 1
        (tmp_path / LOCK).write_text((tmp_path / LOCK).read_text() + whole[:50])
        join(new)
        with pytest.raises(UserError, match="another launcher"):
            join(old)


def test_two_machines_that_look_at_once_refuse_each_other(tmp_path, monkeypatch):
    """Each has a lock of its own, as on a file system without locks."""
    add = locks._add

    def both(lock, launches):
        add(lock, launches)
        note(tmp_path, token="other", launches=True, host="other", boot="b")

    monkeypatch.setattr(locks, "_add", both)
    with pytest.raises(UserError, match="is using this folder: process .* on other"), locked(tmp_path):
        pass


def test_a_link_is_not_followed(tmp_path):
    (tmp_path / "mine").write_text("mine")
    (tmp_path / LOCK).symlink_to("mine")
    with pytest.raises(UserError, match=r"\.lock: cannot be written \(.*symbolic links\)"), locked(tmp_path):
        pass
    assert (tmp_path / "mine").read_text() == "mine"


def test_a_process_is_known_by_its_start(forked):
    own = Process.current()
    assert own.lives
    assert not own.model_copy(update={"start": own.start + 1}).lives
    pid = forked(lambda: None)
    wait_for(lambda: start_of(pid) is None)  # a zombie
    os.waitpid(pid, 0)
    assert start_of(pid) is None


@pytest.mark.parametrize("text", ["junk", "{}", "[]"])
def test_a_lock_in_the_environment_that_is_none_is_one_line(monkeypatch, text):
    monkeypatch.setenv(VARIABLE, text)
    with pytest.raises(UserError, match=f"^{VARIABLE}: [^\n]*"):
        inherited()


def test_a_file_system_without_locks_is_one_line(tmp_path, monkeypatch):
    def flock(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(locks.fcntl, "flock", flock)
    with (
        pytest.raises(UserError, match=r"\.lock: its file system has no locks \(No locks available\)"),
        locked(tmp_path),
    ):
        pass
