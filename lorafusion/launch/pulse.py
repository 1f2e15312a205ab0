"""The pulse of a lock: a process beside a launcher that touches the lock's file while anybody of that launcher lives on
this machine, so that other machines can tell. It imports nothing of ours, to be small and there at once.

It is in a session of its own, and goes on where the launcher is stopped by Ctrl-Z. If another launcher has the file all
the same, as when this machine was asleep, it ends its own launcher and all that this has started.
"""

import json
import os
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

BEAT_SECONDS = 2.0


def start_of(pid: int) -> int | None:
    """When a process was started, in clock ticks after its machine's boot; None where there is none of this id that
    could still do anything."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if state in "ZX" else int(fields[18])


def beat(path: Path, token: str) -> None:
    """Until nobody lives that stands in a lock's file with this token."""
    living: set[tuple[int, int]] = set()
    while True:
        with suppress(OSError, ValueError):  # a file server that does not answer; half a line
            members = [json.loads(line) for line in path.read_text().splitlines() if line]
            last = next((member["token"] for member in reversed(members) if member["launches"]), token)
            processes = [member["process"] for member in members if member["token"] == token]
            living |= {(process["pid"], process["start"]) for process in processes}
            if last != token:
                _kill(living)
                return
        living = {(pid, start) for pid, start in living if start_of(pid) == start}
        if not living:
            return
        with suppress(OSError):
            os.utime(path)
        time.sleep(BEAT_SECONDS)


def _kill(processes: set[tuple[int, int]]) -> None:
    for pid, start in processes:
        if start_of(pid) == start:
            with suppress(OSError):
                os.kill(pid, signal.SIGKILL)


if __name__ == "__main__":
    beat(Path(sys.argv[1]), sys.argv[2])
