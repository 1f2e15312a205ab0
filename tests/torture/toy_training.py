"""A tiny training whose command and workers are real processes, forked from this one, which has imported everything.

What is not tried so is how torchrun starts the workers; `real` has that too, at several seconds a process.
"""

from __future__ import annotations

import ctypes
import json
import logging
import os
import resource
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path

import psutil
import yaml

from lorafusion.cli import main as command_line
from lorafusion.core.source_tree import ROOT
from lorafusion.engine import fork_server
from lorafusion.launch import pulse
from lorafusion.launch.launch import SIGNALS, launch
from lorafusion.train import run as training

# So that each command and each worker need not.
for module in ("lorafusion.engine.worker", "lorafusion.engine.stream", "matplotlib.pyplot"):
    import_module(module)

PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h
SHAPES = {(1, 1): 1, (2, 1): 2, (2, 2): 4}  # stages and replicas: processes
SETTINGS = {
    "model": "tiny", "output": "out", "capacity": 64, "save_every": 3, "device": "cpu",
    "defaults": {"data": {"synthetic": {"samples": 16, "dataset": "xsum", "scale": 32}}, "global_batch_size": 4,
                 "rank": 2, "target_modules": ["q_proj"], "epochs": 4},
    "jobs": [{"name": "short", "steps": 3, "seed": 1}, {"name": "long", "seed": 2}],
}  # fmt: skip
EXACT = ("adapter_model.safetensors", "adapter_config.json", "training.json")
MOST_SECONDS = 120  # of one command


def jobs_file(folder: Path, shape: tuple[int, int] = (1, 1), **changes) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    shaped = {"processes": SHAPES[shape], "data_parallel": shape[1]}
    (folder / "jobs.yaml").write_text(yaml.safe_dump(SETTINGS | shaped | changes))
    return folder / "jobs.yaml"


def results(folder: Path) -> dict[str, bytes]:
    """What a user has of a training: its rows and its adapters."""
    paths = [path for path in (folder / "out/adapters").glob("[!.]*/*") if path.name in EXACT]
    return {f"{path.parent.name}/{path.name}": path.read_bytes() for path in [*paths, folder / "out/metrics.jsonl"]}


def left_behind(folder: Path) -> list[str]:
    """Files that a training which has ended should not leave, in its folder and in that for temporary files."""
    unwanted = [*folder.rglob(".*"), *folder.rglob("passed-over-*"), *(folder / "tmp").iterdir()]
    return sorted(str(path.relative_to(folder)) for path in unwanted if path.name != ".lock")


class Command:
    """`lorafusion train` in a process of its own, with its workers as in the product: each in a session of its own."""

    def __init__(
        self, path: Path, real: bool = False, most_bytes: int | None = None, terminal: str | None = None
    ) -> None:
        """real: as a user starts it. most_bytes: that a file may have, as on a disk that is full. terminal: for its
        output, in place of a file."""
        self.folder = path.parent
        self.log = self.folder / f"command-{time.monotonic_ns()}.log"
        if terminal:
            self.log = Path(terminal)
        temporary = self.folder / "tmp"
        temporary.mkdir(exist_ok=True)
        self.process = psutil.Process((_start_real if real else _fork)(path, temporary, self.log, most_bytes))
        self.code: int | None = None

    def wait(self, seconds: float) -> int | None:
        """The exit status, negative for a signal; None if it is still at work after so long."""
        end = time.monotonic() + seconds
        while self.code is None:
            pid, status = os.waitpid(self.process.pid, os.WNOHANG)
            if pid:
                self.code = os.waitstatus_to_exitcode(status)
            elif time.monotonic() > end:
                return None
            else:
                time.sleep(0.01)
        return self.code

    def workers(self) -> list[psutil.Process]:
        try:
            children = self.process.children(recursive=True)
            return [child for child in children if child.status() != psutil.STATUS_ZOMBIE and not is_pulse(child)]
        except psutil.NoSuchProcess:
            return []

    @property
    def output(self) -> str:
        return self.log.read_text(errors="replace") if self.log.is_file() else ""


class _Forked(fork_server.Forked):
    @staticmethod
    def work(*arguments) -> None:
        os.setsid()
        for number in SIGNALS:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        fork_server.work(*arguments)


def _fork(path: Path, temporary: Path, log: Path, most_bytes: int | None) -> int:
    ready = os.pipe()
    pid = os.fork()
    if pid:
        os.close(ready[1])
        os.read(ready[0], 1)
        os.close(ready[0])
        return pid
    code = 70
    try:
        os.setsid()
        for number in SIGNALS:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        with open(log, "ab", buffering=0) as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        sys.stdout, sys.stderr = (os.fdopen(descriptor, "w", buffering=1, closefd=False) for descriptor in (1, 2))
        os.environ["TMPDIR"] = str(temporary)
        import tempfile

        tempfile.tempdir = None
        if most_bytes is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, resource.RLIM_INFINITY))
        fork_server.FORKSERVER = get_context("fork")
        training.launch = lambda *arguments, **options: launch(*arguments, start=_Forked, **options)
        train_all = training._train_all

        def train_from_here(*arguments):
            os.close(ready[1])
            return train_all(*arguments)

        training._train_all = train_from_here
        os.close(ready[0])
        sys.argv = ["lorafusion", "train", str(path)]
        command_line.main()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
        code = 71
    finally:
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError):
                stream.flush()
        os._exit(code or 0)


def _start_real(path: Path, temporary: Path, log: Path, most_bytes: int | None) -> int:
    def limit() -> None:
        if most_bytes is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, resource.RLIM_INFINITY))

    environment = os.environ | {"TMPDIR": str(temporary), "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    with open(log, "ab") as file:
        return subprocess.Popen([sys.executable, "-m", "lorafusion.cli.main", "train", str(path)], env=environment,
                                stdout=file, stderr=file, start_new_session=True, preexec_fn=limit).pid  # fmt: skip


@contextmanager
def adopting() -> Iterator[None]:
    """Within it what a process of a training leaves running becomes a child of this process, which ends it at last."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)
    before = set(psutil.Process().children())
    try:
        yield
    finally:
        for child in set(psutil.Process().children()) - before:
            child.kill()
            with suppress(ChildProcessError):
                os.waitpid(child.pid, 0)
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 0)


def is_pulse(process: psutil.Process) -> bool:
    """Of a lock; it ends by itself once nobody lives who has the lock."""
    with suppress(psutil.Error):
        return pulse.__file__ in process.cmdline()
    return False


def reap() -> None:
    """Those that were adopted and have ended."""
    for child in psutil.Process().children():
        with suppress(ChildProcessError, psutil.NoSuchProcess):
            if child.status() == psutil.STATUS_ZOMBIE:
                os.waitpid(child.pid, os.WNOHANG)


if __name__ == "__main__":
    logging.disable()
    for shape in SHAPES:
        for real in (False, True):
            folder = Path(sys.argv[1]) / f"{shape[0]}x{shape[1]}-{real}"
            begin = time.monotonic()
            command = Command(jobs_file(folder, shape), real=real)
            code = command.wait(MOST_SECONDS)
            slots = json.loads(max((folder / "out/runs/000/checkpoints").glob("slot-*/manifest.json")).read_text())
            print(shape, real, code, f"{time.monotonic() - begin:.1f} s", slots["facts"]["slot"], left_behind(folder))
            if code:
                print(command.output, (folder / "out/log.txt").read_text()[-3000:])
