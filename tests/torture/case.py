"""A hostile input, the box in which a command meets it, and what must hold whatever the input is.

A box is a folder with `work`, in which the command runs, and with a home and a place for temporary files of its own, so
that whatever the command leaves behind lies in the box and shows.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.torture.server import Ended

ROOT = Path(__file__).parents[2]
LONGEST_LINE = 300  # characters
MOST_LINES = 25  # of a refusal: twenty mistakes of a file, their count and what was said before
MOST_CPU = 2.0  # seconds beyond the start of the interpreter
MOST_WALL = 30.0  # seconds; what is not over then hangs
MOST_MEMORY = 2**20  # KiB
LIBRARIES = ("tests.torture.server:import_libraries",)
WARM = ("tests.torture.server:import_commands",)
REFUSED = frozenset({2})
SHOWN = 4  # changes of a folder

Make = Callable[[Path], None]  # puts an input where the path says


@dataclass(frozen=True)
class Case:
    """One call of the program with something hostile in it.

    name: distinct, `command/kind/mutation`. command: the words that name the command, as `lab list`. words: what
    follows them; `{box}` stands for the folder with the files. files: what lies there, by path. says: what the refusal
    has to name. libraries: the command needs those of models, whose import is not counted. light: the mistake is to be
    told before torch is imported. fresh: in a process of its own, as the environment counts at its start. gone: the
    folder in which it is called has been removed. before: what is done to that folder when the files lie there.
    owns: what it may make in it all the same.
    """

    name: str
    command: str
    words: tuple[str, ...] = ()
    files: Mapping[str, bytes | Make] = field(default_factory=dict)
    says: tuple[str, ...] = ()
    environment: Mapping[str, str | None] = field(default_factory=dict)
    stdin: str | None = None
    stdout: str | None = None
    limits: Mapping[str, int] = field(default_factory=dict)
    libraries: bool = False
    light: bool = False
    fresh: bool = False
    statuses: frozenset[int] = REFUSED
    cpu: float = MOST_CPU
    wall: float = MOST_WALL
    memory: int = MOST_MEMORY
    may_write: bool = False
    owns: tuple[str, ...] = ()
    gone: bool = False
    before: Make | None = None

    @property
    def line(self) -> tuple[str, ...]:
        return (*self.command.split(), *self.words)


class Server:
    """The program in a process of its own that calls it as often as it is asked to. caches: a folder for what libraries
    keep for all programs, as the fonts of the machine. calls: functions, `module:name`, that are called before."""

    def __init__(self, place: Path, caches: Path, calls: Sequence[str] = ()) -> None:
        paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
        self.environment = {
            "PATH": os.environ["PATH"], "PYTHONPATH": paths, "PYTHONDONTWRITEBYTECODE": "1", "LANG": "C.UTF-8",
            "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "MPLCONFIGDIR": str(caches),
            "TORCHINDUCTOR_CACHE_DIR": str(caches),
            "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_DISABLE_TELEMETRY": "1", "COLUMNS": "200",
        }  # fmt: skip
        self.caches = caches
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.torture.server", *calls],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT,
            env=self.environment | {"HOME": str(place / "home"), "TMPDIR": str(place)},
        )  # fmt: skip

    def call(self, case: Case, box: Path) -> Ended:
        fill = {"box": str(box / "work")}
        environment = self.environment | {"HOME": str(box / "home"), "TMPDIR": str(box / "tmp")} | case.environment
        filled = {key: _filled(value, fill) for key, value in environment.items() if value is not None}
        request = {
            "words": [_filled(word, fill) for word in case.line], "folder": str(box / "work"), "environment": filled,
            "stdin": case.stdin, "stdout": case.stdout, "limits": dict(case.limits), "seconds": case.wall * busy(),
            "fresh": case.fresh, "gone": case.gone, "caches": str(self.caches),
        }  # fmt: skip
        print(json.dumps(request), file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        if not answer:
            raise RuntimeError(f"{case.name}: the server has ended with {self.process.wait()}")
        return Ended(*json.loads(answer))

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait(timeout=30)


def busy() -> float:
    """How much longer everything takes than on an idle machine."""
    return max(1.0, os.getloadavg()[0] / len(os.sched_getaffinity(0)))


def _filled(text: str, values: Mapping[str, str]) -> str:
    for key, value in values.items():
        text = text.replace(f"{{{key}}}", value)
    return text


def made(case: Case, box: Path) -> None:
    """Make the box of a case."""
    for name in ("work", "home", "tmp"):
        (box / name).mkdir(parents=True)
    for name, content in case.files.items():
        path = box / "work" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if callable(content):
            content(path)
        else:
            path.write_bytes(content.replace(b"{box}", os.fsencode(box / "work")))
    if case.before:
        case.before(box / "work")


def state(folder: Path) -> dict[str, tuple]:
    """What is in a folder: kinds, modes, and the contents of files and links."""
    entries = {}
    for path in sorted(folder.rglob("*")):
        status = path.lstat()
        content: object = None
        if stat.S_ISREG(status.st_mode):
            content = hashlib.sha256(path.read_bytes()).hexdigest() if os.access(path, os.R_OK) else "unreadable"
        elif stat.S_ISLNK(status.st_mode):
            content = os.readlink(path)
        entries[os.path.relpath(path, folder)] = (stat.filemode(status.st_mode), content)
    return entries


def run(case: Case, server: Server, place: Path, start: float) -> tuple[Ended, list[str]]:
    """Call a case in a box of its own; returns how it ended and what did not hold. start: CPU seconds of a fresh
    interpreter that imports the command line."""
    box = place / "box"
    made(case, box)
    try:
        before = state(box)
        ended = server.call(case, box)
        wrong = mistakes(case, ended, start if case.fresh else 0.0)
        if not case.may_write:
            after = {
                name: content for name, content in state(box).items() if name.removeprefix("work/") not in case.owns
            }
            wrong += changes(before, after)
        return ended, wrong
    finally:
        _remove(box)


def changes(before: dict[str, tuple], after: dict[str, tuple]) -> list[str]:
    wrong = [f"written: {name!r}" for name in after if name not in before]
    wrong += [f"removed: {name!r}" for name in before if name not in after]
    wrong += [f"changed: {name!r}" for name in before if name in after and before[name] != after[name]]
    return wrong[:SHOWN] + ([f"and {len(wrong) - SHOWN} more"] if len(wrong) > SHOWN else [])


def mistakes(case: Case, ended: Ended, start: float) -> list[str]:
    """What does not hold of an end, whatever the input was."""
    wrong = []
    if ended.status == -1000:
        return [f"hangs: still running after {case.wall:.0f} s, {ended.cpu:.1f} s of CPU"]
    text = ended.stdout + ended.stderr
    lines = text.splitlines()
    if "Traceback (most recent call last)" in text or "Exception ignored" in text:
        wrong.append(f"traceback: {next((line for line in reversed(lines) if line.strip()), '')[:200]}")
    if ended.status not in case.statuses:
        wrong.append(f"status {ended.status}, expected {' or '.join(map(str, sorted(case.statuses)))}")
    longest = max(map(len, lines), default=0)
    if longest > LONGEST_LINE:
        wrong.append(f"a line of {longest} characters")
    if any(ord(letter) < 32 and letter not in "\t\n\r" or ord(letter) == 127 for letter in text):
        wrong.append("control characters in what it says")
    if ended.status == 2:
        wrong += _refusal(case, ended)
    cpu = ended.cpu - start
    if cpu > case.cpu:
        wrong.append(f"{cpu:.1f} s of CPU")
    if ended.memory > case.memory:
        wrong.append(f"{ended.memory / 2**20:.1f} GiB of memory")
    if ended.left:
        wrong.append(f"left processes: {', '.join(ended.left)}")
    events = [event for event in ended.events if case.light or event != "import torch"]
    return wrong + [f"outside: {event}" if event != "import torch" else event for event in events]


def _refusal(case: Case, ended: Ended) -> list[str]:
    """What does not hold of a message."""
    lines = ended.stderr.splitlines()
    wrong = []
    if not any(line.startswith(("error: ", "Usage: ")) for line in lines):
        wrong.append("says no error")
    if len(lines) > MOST_LINES and not any(line.startswith("Usage: ") for line in lines):
        wrong.append(f"{len(lines)} lines of message")
    unsaid = [word for word in case.says if word not in ended.stderr]
    return wrong + ([f"does not say {', '.join(map(repr, unsaid))}"] if unsaid else [])


def _remove(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_dir() and not path.is_symlink():
            path.chmod(0o700)
    shutil.rmtree(folder)
