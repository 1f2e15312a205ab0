"""Slurm's commands as programs that answer from files, for tests without a cluster."""

from __future__ import annotations

import os
import stat
from pathlib import Path


class FakeSlurm:
    """Programs in a folder that stands first in PATH. Each appends its arguments, one call a line, to NAME.calls."""

    def __init__(self, folder: Path, monkeypatch) -> None:
        self.folder = folder
        folder.mkdir()
        monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")

    def program(self, name: str, body: str) -> None:
        """A shell script, in the fake's folder."""
        path = self.folder / name
        path.write_text(f'#!/bin/sh\ncd {self.folder}\necho "$@" >>{name}.calls\n{body}\n')
        path.chmod(path.stat().st_mode | stat.S_IXUSR)

    def queue(self, *lines: str) -> None:
        """What squeue answers; `scancel` takes out the jobs that it is given."""
        (self.folder / "queue").write_text("".join(f"{line}\n" for line in lines))
        self.program("squeue", "cat queue")
        self.program("scancel", 'for job; do sed -i "/^$job|/d" queue; done')

    def calls(self, name: str) -> list[str]:
        path = self.folder / f"{name}.calls"
        return path.read_text().splitlines() if path.exists() else []
