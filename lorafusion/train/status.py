"""status.json: how the last command in an output folder ended, or that one is at work, for scripts that watch it.

status    running, or how it ended: ok, nan, stopped, failed, refused, interrupted, or as a run of processes can: crash,
          oom, timeout
note      why, in one line
jobs_file the jobs file that this is about, and the hash of what stood in it
process   of the command: `running` is true only while a process of this id was started at this time on this machine
began, changed
jobs      of each: its steps that are done, and `state`: training, exported, stopped (by a gradient that is not finite;
          what it was before is exported), or failed (to be exported) with a note
"""

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

from lorafusion.core.files import MOST_YAML, named_path, read_bytes, read_text, write
from lorafusion.core.schema import UserError
from lorafusion.launch.lock import Process

STATUS, RUNNING = "status.json", "running"


class Status:
    """The file, written anew at every change."""

    def __init__(self, folder: Path, jobs_file: Path, digest: str | None = None, remark: str = "") -> None:
        """digest: `digest_of` the jobs file when it was read. remark: the note while the command is at work."""
        self.path, self.remark = folder / STATUS, remark
        self.status = ""
        self.jobs: dict[str, dict] = {}
        digest = digest_of(jobs_file) if digest is None else digest
        self._known = {"jobs_file": {"path": str(jobs_file.absolute()), "sha256": digest},
                       "process": Process.current().model_dump(), "began": _now()}  # fmt: skip

    def write(self, status: str, note: str = "") -> None:
        self.status = status
        note = note or (self.remark if status == RUNNING else "")
        content = {"status": status, "note": note, **self._known, "changed": _now(), "jobs": self.jobs}
        write(self.path, json.dumps(content, indent=1) + "\n")


@contextmanager
def running(status: Status) -> Iterator[Status]:
    """Within it a command is at work; who ends in order says how by `Status.write`, else the error does."""
    status.write(RUNNING)
    try:
        yield status
    except (UserError, OSError) as error:
        with suppress(OSError):  # a full disk: the file says of a process that is gone that it runs
            status.write("failed", _line(error))
        raise
    except KeyboardInterrupt:
        with suppress(OSError):
            status.write("interrupted", "at once, what was done since the last checkpoint is lost")
        raise
    finally:
        if status.status == RUNNING:
            with suppress(OSError):
                status.write("crash", "an error of the program, it said more on standard error")


def digest_of(jobs_file: Path) -> str:
    """A hash of what stands in a jobs file, if there is one."""
    try:
        content = read_bytes(jobs_file, most=MOST_YAML)
    except UserError:
        content = b""
    return hashlib.sha256(content).hexdigest()


def refuse(folder: Path, jobs_file: Path, error: UserError) -> None:
    """Say that a jobs file was not taken."""
    Status(folder, jobs_file).write("refused", _line(error))


def output_named_in(jobs_file: Path) -> Path | None:
    """The output folder that a jobs file names, however broken the rest of it is."""
    try:
        match = re.search(r"^output:[ \t]*([^#\n]+)", read_text(jobs_file, most=MOST_YAML), re.MULTILINE)
        return named_path(jobs_file.absolute().parent, match[1].strip().strip("'\""), "output") if match else None
    except UserError:
        return None


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
