"""Where each process of a run is, in memory that outlives it, so that a launcher can tell who died or hangs, and doing
what. Each process has a small file that it alone writes, mapped, so that a note costs a microsecond.
"""

import mmap
import os
import platform
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

SIZE = 512
NODE = platform.node()
PAUSE = 5.0  # seconds; a launcher that has not looked for longer was stopped, perhaps with its processes
START_UP = "start-up"
ENDED = "ended"
FIRST = "first-failure"  # a file: the rank that failed first, where torchrun has told
FAILED = "failed: "  # for want of room for a report
WAITING = "waiting for "


class Position:
    """What this process is doing, for itself and for the launcher."""

    def __init__(self, directory: Path, rank: int) -> None:
        self.place, self.doing = f"rank {rank}", ""
        self._changes = 0
        with open(_path(directory, rank), "wb+") as file:
            file.write(bytes(SIZE))  # on a full disk an error here, not a signal at a note
            file.flush()
            self._memory = mmap.mmap(file.fileno(), SIZE)
        self.set(START_UP)

    def set(self, doing: str) -> None:
        self.doing = doing
        self._changes += 1
        text = f"{NODE}\n{os.getpid()}\n{self._changes}\n{self.place}\n{doing}\n".encode()[:SIZE]
        self._memory[: len(text)] = text

    def waiting(self, what: str) -> None:
        self.set(f"{WAITING}{what}")


@dataclass
class Seen:
    """A process as its file last showed it; `since`: when that last changed, on the monotonic clock."""

    node: str
    pid: int
    changes: int
    place: str
    doing: str
    since: float


class Watch:
    """All processes of a run, as a launcher on one of their nodes sees them."""

    def __init__(self, directory: Path, processes: int) -> None:
        self.directory, self.processes = directory, processes
        self.seen: dict[int, Seen] = {}
        self.died: Seen | None = None  # the first one that was gone without having ended
        self._looked = time.monotonic()

    def look(self) -> None:
        now = time.monotonic()
        if now - self._looked > PAUSE:
            for process in self.seen.values():
                process.since += now - self._looked
        self._looked = now
        for rank in range(self.processes):
            current = _read(_path(self.directory, rank), now)
            if current is None:
                continue
            if rank not in self.seen or self.seen[rank].changes != current.changes:
                self.seen[rank] = current
            if self.died is None and current.node == NODE and not _lives(current.pid):
                last = _read(_path(self.directory, rank), now)  # it may have ended since it was read
                self.died = last if last is not None and last.doing != ENDED else None

    def first_dead(self) -> Seen | None:
        """Who died first. torchrun ends the others at once, so between two looks all may be gone; it knows."""
        if self.died is not None:
            with suppress(OSError, ValueError):
                return self.seen.get(int((self.directory / FIRST).read_text()), self.died)
        return self.died

    def stalled(self, seconds: float) -> str:
        """Who keeps the run from going on, if nobody has moved for so long; else nothing. Start-up has no limit here:
        weights may take long to load."""
        running = [process for process in self.seen.values() if process.doing != ENDED]
        if not running or any(
            process.doing == START_UP or time.monotonic() - process.since < seconds for process in running
        ):
            return ""
        active = [process for process in running if not process.doing.startswith(WAITING)]
        return "; ".join(f"{process.place}: {process.doing}" for process in active or running)


def _path(directory: Path, rank: int) -> Path:
    return directory / f"position-{rank}"


def _read(path: Path, now: float) -> Seen | None:
    try:
        node, pid, changes, place, doing, _ = path.read_bytes().decode(errors="replace").split("\n", 5)
        return Seen(node, int(pid), int(changes), place, doing, now)
    except (FileNotFoundError, ValueError):
        return None  # not there yet, or half written


def _lives(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
