"""Who uses a folder: one launcher and its workers, by process id and start time, in the file that is locked.

The operating system lets go of a killed launcher's lock at once, while its workers may go on for minutes. So the next
launcher puts its own name below theirs and then ends all who stand there. A worker puts its name down before it touches
anything, and ends if the last launcher in the file is not its own: it stands there in time, or it sees the new one.

Processes of another machine can be neither seen nor ended. While one of them lives, the file is touched every other
second (`pulse`); a launcher waits to see that it is not. That says nothing where the pulse alone was killed.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import logging
import os
import platform
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path

import psutil
from pydantic import ValidationError

from lorafusion.core.files import parse_json, writing
from lorafusion.core.schema import Config, UserError, validated
from lorafusion.launch import pulse
from lorafusion.launch.pulse import start_of

LOGGER = logging.getLogger(__name__)
LOCK = ".lock"
VARIABLE = "LORAFUSION_LOCK"  # of the environment: the lock of those who started this process
END_SECONDS = 10
LOOK_SECONDS = 0.5
SILENT_SECONDS = 60  # in which nobody of another machine has touched the file: there is nobody
BOOT = Path("/proc/sys/kernel/random/boot_id")


class Process(Config):
    """A process for all time: start is in clock ticks after its machine's boot, as /proc/PID/stat has it."""

    host: str
    boot: str
    namespace: str
    pid: int
    start: int

    @classmethod
    def current(cls) -> Process:
        pid = os.getpid()
        return cls(**_here(), pid=pid, start=start_of(pid))

    @property
    def place(self) -> str:
        """Where its id means something, in eight letters: a kernel since its start, and a namespace of it."""
        return hashlib.sha256(f"{self.boot} {self.namespace}".encode()).hexdigest()[:8]

    @property
    def is_near(self) -> bool:
        """Was it started by this kernel, where its process id means the same?"""
        here = _here()
        return (self.boot, self.namespace) == (here["boot"], here["namespace"])

    @property
    def lives(self) -> bool:
        """Of a near process. Another one that has its id by now is not it."""
        return start_of(self.pid) == self.start

    @property
    def may_live(self) -> bool:
        """A process before this machine's last start does not; of another machine's that cannot be told."""
        here = _here()
        rebooted = self.host == here["host"] and self.boot != here["boot"]
        return self.lives if self.is_near else not rebooted

    def kill(self) -> None:
        if self.lives:
            os.kill(self.pid, signal.SIGKILL)


class Lock(Config):
    """What a launcher gives its workers: the file and the launcher's token in it."""

    path: str
    token: str


class _Member(Config):
    """A line of the file. what: a launcher is doing, for those whom it keeps out."""

    token: str
    launches: bool
    process: Process
    what: str = ""


@contextmanager
def locked(folder: Path, name: str = LOCK, what: str = "training") -> Iterator[Lock]:
    """Within it no other launcher uses the folder, which is made, and nothing of an earlier one is left running. Raises
    `UserError` where that cannot be had. name: of the file; what: the launcher does."""
    path = folder / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})") from None
    with open(descriptor, "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{folder}: {_holder(path, what)}") from None
        except OSError as error:  # NFS without its lock daemon, Lustre that is mounted without flock
            raise UserError(f"{path}: its file system has no locks ({error.strerror}); expected one that has") from None
        silent = _silent(folder, path, what)
        lock = Lock(path=str(path.absolute()), token=secrets.token_hex(8))
        _add(lock, what)
        others = [member for member in _members(path) if member.token != lock.token]
        # Again: a machine whose locks are not ours may have looked when we did.
        far = _far(member for member in others if member.token not in silent)
        if far:
            raise _in_use(folder, far, what)
        _end([member.process for member in others], folder)
        file.truncate(0)
        _add(lock, what)
        command = [sys.executable, "-IS", pulse.__file__, lock.path, lock.token]
        null = subprocess.DEVNULL
        beating = subprocess.Popen(command, cwd="/", stdin=null, stdout=null, stderr=null, start_new_session=True)
        try:
            yield lock
        finally:
            beating.kill()
            beating.wait()
            file.truncate(0)


def _far(members: Iterable[_Member]) -> list[_Member]:
    """Those that may live where this machine cannot see them."""
    return [member for member in members if not member.process.is_near and member.process.may_live]


def _silent(folder: Path, path: Path, what: str) -> set[str]:
    """Wait until it is clear that nobody of another machine lives who stands in the file; returns their launchers'
    tokens. Raises `UserError` where somebody does."""
    far = _far(_members(path))
    if far:
        process = far[0].process
        where = f"process {process.pid} on {process.host} was at work here"
        LOGGER.warning(f"{folder}: {where}; waiting {SILENT_SECONDS} s to see whether it still is")
        before, end = _touched(path), time.monotonic() + SILENT_SECONDS
        while time.monotonic() < end:
            time.sleep(LOOK_SECONDS)
            if _touched(path) != before:
                raise _in_use(folder, _far(_members(path)) or far, what)
    return {member.token for member in far}


def _touched(path: Path) -> tuple[int, int]:
    """When a file was touched, and its size. NFS asks its server where a file is opened, else only once a minute."""
    with open(path, "rb") as file:
        status = os.fstat(file.fileno())
    return status.st_mtime_ns, status.st_size


def _in_use(folder: Path, members: list[_Member], what: str) -> UserError:
    """Names the last launcher among those who use a folder, or else a worker."""
    member = next((member for member in reversed(members) if member.launches), members[-1])
    where = f"process {member.process.pid} on {member.process.host}"
    return UserError(f"{folder}: another {member.what or what} is using this folder: {where}")


def _holder(path: Path, what: str) -> str:
    """Who has a lock, as far as its file says: nothing yet where the launcher has just come."""
    launchers, since = [], ""
    with suppress(UserError, OSError):
        launchers = [member for member in _members(path) if member.launches]
    if not launchers:
        return f"another {what} is using this folder"
    process = launchers[0].process
    with suppress(psutil.Error):
        started = psutil.Process(process.pid).create_time() if process.is_near else 0
        since = f", since {datetime.fromtimestamp(started):%d %b %H:%M:%S}" if started else ""
    return f"another {launchers[0].what or what} is using this folder: process {process.pid} on {process.host}{since}"


def join(lock: Lock) -> None:
    """Put this process, a worker, down as one of its launcher's. Raises `UserError` where that is no longer the one
    that has the folder; nothing in it may be touched then."""
    _add(lock)
    launcher_of(lock)


def launcher_of(lock: Lock) -> Process:
    """The process that has a lock; raises `UserError` where another one has the folder by now, or none."""
    launchers = [member for member in _members(Path(lock.path)) if member.launches]
    if not launchers or launchers[-1].token != lock.token:
        raise UserError(f"{lock.path}: another launcher has the folder by now")
    return launchers[-1].process


def inherited() -> Lock | None:
    """The lock of those who started this process; None where there is none, or none of this machine."""
    text = os.environ.get(VARIABLE)
    return validated(Lock, parse_json(text, VARIABLE), VARIABLE) if text else None


def end_others(lock: Lock) -> None:
    """End all that stand in a lock's file but this process."""
    path, me = Path(lock.path), Process.current()
    _end([member.process for member in _members(path) if member.process != me], path.parent)


def _add(lock: Lock, launches: str = "") -> None:
    """Append a line in one write, so that lines of several processes do not mix. launches: what a launcher does."""
    member = _Member(token=lock.token, launches=bool(launches), process=Process.current(), what=launches)
    line = member.model_dump_json() + "\n"
    before = Path(lock.path).read_bytes()
    data = ("\n" * (before[-1:] not in (b"", b"\n")) + line).encode()
    with writing(Path(lock.path)), open(lock.path, "ab", buffering=0) as file:
        if file.write(data) < len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _members(path: Path) -> list[_Member]:
    """Those who put their names down. Of half a line, for want of room, whoever wrote it has touched nothing."""
    try:
        lines = path.read_bytes().splitlines()
        whole = [line for line in lines if line.endswith(b"}") or not line.startswith(b'{"token"')]
        return [_Member.model_validate(json.loads(line)) for line in whole]
    except (ValueError, ValidationError):
        raise UserError(f"{path}: damaged; if no training uses the folder, delete this file") from None


def _end(processes: list[Process], folder: Path) -> None:
    """Kill those that live, and wait until they do not."""
    living = [process for process in processes if process.is_near and process.lives]
    for process in living:
        try:
            process.kill()
        except PermissionError:
            raise UserError(f"{folder}: process {process.pid}, another user's, is training here") from None
        except ProcessLookupError:
            pass  # it has just ended
    end = time.monotonic() + END_SECONDS
    while any(process.lives for process in living):
        if time.monotonic() > end:
            left = next(process.pid for process in living if process.lives)
            raise UserError(f"{folder}: process {left} of an earlier training here cannot be ended")
        time.sleep(0.02)
    if living:
        LOGGER.info(f"ended {len(living)} processes that an earlier training left running")


def _here() -> dict[str, str]:
    return {"host": platform.node(), "boot": BOOT.read_text().strip(), "namespace": os.readlink("/proc/self/ns/pid")}
