"""The events of a run: losses, norms and evaluations as they become known, a line of JSON each, in a file a replica.

A checkpoint notes how far each file went and its hash until there, so the file can be taken back to that place, and
nothing before it can change unseen. What comes after it is run again. So a line that a crash left half written is of no
account, and a broken line before that place is an error.
"""

import errno
import hashlib
import json
import os
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from lorafusion.core.files import writing
from lorafusion.core.manifest import DamagedError, FileEntry

KINDS = ("loss", "norm", "evaluation", "stopped")


class EventLog:
    """The file of one replica, to be added to after its first `keep` bytes."""

    def __init__(self, path: Path, keep: int = 0) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        if path.stat().st_size < keep:
            raise DamagedError(f"{path}: cut, it has {path.stat().st_size} bytes of {keep}")
        trim(path, keep)
        self.path = path
        self._hash, self._size = hashlib.sha256(path.read_bytes()), keep
        with ExitStack() as stack:
            self._file = stack.enter_context(open(path, "ab", buffering=0))
            self._open = stack.pop_all()

    def write(self, event: dict) -> None:
        """Add a line, for a reader in another process to see."""
        line = (json.dumps(event) + "\n").encode()
        with writing(self.path):
            if self._file.write(line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._hash.update(line)
        self._size += len(line)

    def close(self) -> None:
        self._open.close()

    def entry(self) -> FileEntry:
        """All lines so far."""
        return FileEntry(size=self._size, sha256=self._hash.hexdigest())

    def sync(self) -> None:
        """Have the lines so far on the disk, from any thread."""
        os.fsync(self._file.fileno())


def trim(path: Path, keep: int) -> None:
    """Drop what comes after the first `keep` bytes of a file: it is run again."""
    if path.exists() and path.stat().st_size > keep:
        os.truncate(path, keep)


def require(folder: Path, kept: dict[str, FileEntry]) -> None:
    """Raise `DamagedError` unless the files of a folder begin with what was noted of them; it names the first line
    that is broken."""
    for name, entry in kept.items():
        path = folder / name
        if not path.is_file():
            raise DamagedError(f"{path}: missing")
        with open(path, "rb") as file:
            data = file.read(entry.size)
        parse(path, data, lambda _: None)
        if len(data) != entry.size:
            raise DamagedError(f"{path}: cut, it has {len(data)} bytes of {entry.size}")
        if hashlib.sha256(data).hexdigest() != entry.sha256:
            raise DamagedError(f"{path}: damaged, its hash is not the one that was noted")


def parse(path: Path, data: bytes, take: Callable[[dict], None], first_line: int = 1) -> int:
    """Give `take` the event of each line of a file's `data` that is whole, and return how many bytes these lines have.
    `first_line` is the number of the first one in the file. Raises `DamagedError` with a line's number where it is not
    an event, or `take` finds it to be of another run (a KeyError, IndexError or TypeError)."""
    whole = data[: data.rfind(b"\n") + 1]
    for number, line in enumerate(whole.split(b"\n")[:-1], start=first_line):
        try:
            event = json.loads(line)
            if not isinstance(event, dict) or not any(kind in event for kind in KINDS):
                raise ValueError("not an event")
            take(event)
        except (ValueError, KeyError, IndexError, TypeError) as error:
            why = f"{type(error).__name__}: {error}"[:80]
            raise DamagedError(f"{path}: line {number} is broken ({why})") from None
    return len(whole)
