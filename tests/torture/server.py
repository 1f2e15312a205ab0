"""The program, imported once and called many times: each call in a child of this process, watched and measured.

`python -m tests.torture.server [MODULE:FUNCTION ...]` imports the command line, calls these functions, and then reads a
call a line from standard input. A call is made in a forked child that becomes the program: it returns from `serve` and
runs `main` as the installed command does, so that its end is the end of a real process. The answer is a line on
standard output.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import io
import json
import os
import resource
import select
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import NamedTuple

import psutil

KEPT = 200_000  # bytes of an output that are kept; all are counted
ADDRESSES, FILES = 8 * 2**30, 2**28  # bytes of memory and of a file that a call may ask for
WRITES = {
    "os.mkdir": 0, "os.remove": 0, "os.rmdir": 0, "os.rename": 1, "os.link": 1, "os.symlink": 1, "os.truncate": 0,
    "os.chmod": 0, "os.chown": 0, "shutil.rmtree": 0,
}  # fmt: skip # events of the interpreter that change the path of that argument
DEVICES = ("/dev/", "/proc", "/sys/")  # what is opened there is no file, and none can be made


class Ended(NamedTuple):
    """How a call ended. cpu: seconds of the child and of all that it waited for; left: processes that it left."""

    status: int
    cpu: float
    wall: float
    memory: int
    stdout: str
    stderr: str
    events: list[str]
    left: list[str]


def serve() -> None:
    """Answer calls until standard input ends; in a child that is to be the program, return."""
    gc.freeze()  # else a child looks through all imports at its end: 0.33 s of CPU a call instead of 0.10
    for line in sys.stdin:
        call = json.loads(line)
        ends = [os.pipe() for _ in range(3)]
        start = time.monotonic()
        pid = os.fork()
        if not pid:
            become(call, *(write for _, write in ends))
            return
        for _, write in ends:
            os.close(write)
        print(json.dumps(watch(pid, call["seconds"], start, [read for read, _ in ends])), flush=True)
    os._exit(0)


def watch(pid: int, seconds: float, start: float, pipes: list[int]) -> Ended:
    """Read what a child says until it and all that has its outputs open have ended, or its time is over."""
    said = {pipe: b"" for pipe in pipes}
    waiting, ended = {*pipes, os.pidfd_open(pid)}, False
    while waiting and time.monotonic() - start < seconds:
        ready, _, _ = select.select(waiting, [], [], 0.5 if ended else seconds)
        if ended and not ready:
            break  # what it left holds its outputs
        for pipe in ready:
            part = os.read(pipe, 2**16) if pipe in said else b""
            if not part:
                ended |= pipe not in said
                waiting.discard(pipe)
                os.close(pipe)
            elif len(said[pipe]) < KEPT:
                said[pipe] += part
            elif not said[pipe].endswith(b"\n[and more]\n"):
                said[pipe] += b"\n[and more]\n"
    wall = time.monotonic() - start
    left = [name for process, name in session(pid) if process != pid]
    for process, _ in session(pid):
        os.kill(process, signal.SIGKILL)
    _, state, usage = os.wait4(pid, 0)
    for pipe in waiting:
        os.close(pipe)
    stdout, stderr, events = (said[pipe].decode(errors="replace") for pipe in pipes)
    status = os.waitstatus_to_exitcode(state) if ended else -1000  # it was still running
    return Ended(status, usage.ru_utime + usage.ru_stime, wall, usage.ru_maxrss, stdout, stderr,
                 sorted(set(events.splitlines())), left)  # fmt: skip


def session(leader: int) -> list[tuple[int, str]]:
    """The processes of a session by their number and name, the leader among them until it is waited for."""
    processes = []
    for process in psutil.process_iter(["name"]):
        try:
            if os.getsid(process.pid) == leader:
                processes.append((process.pid, process.info["name"]))
        except ProcessLookupError:
            pass
    return processes


def become(call: dict, stdout: int, stderr: int, events: int) -> None:
    """Make this process what the program finds when it is called."""
    os.setsid()
    os.chdir(call["folder"])
    if call["gone"]:
        shutil.rmtree(call["folder"])
    os.environ.clear()
    os.environ.update(call["environment"])
    null = os.open(os.devnull, os.O_RDWR)
    wanted = {0: call["stdin"], 1: call["stdout"]}
    for number, default in ((0, null), (1, stdout), (2, stderr)):
        path = wanted.get(number)
        os.dup2(os.open(path, os.O_RDWR) if path and path != "closed" else default, number)
        if path == "closed":
            os.close(number)
    for name, limit in {"RLIMIT_AS": ADDRESSES, "RLIMIT_FSIZE": FILES, "RLIMIT_CORE": 0, **call["limits"]}.items():
        resource.setrlimit(getattr(resource, name), (limit, limit))
    if call["fresh"]:
        os.execv(sys.executable, [sys.executable, "-P", "-m", "lorafusion.cli.main", *call["words"]])
    obey_modes()
    restart_streams(wanted)
    sys.dont_write_bytecode = True
    sys.argv = ["lorafusion", *call["words"]]
    box = str(Path(call["folder"]).parent)
    allowed = (box + "/", call["caches"], *DEVICES)
    sys.addaudithook(lambda event, values: note(events, allowed, event, values))


def restart_streams(wanted: dict) -> None:
    """Streams on the descriptors as they are now; None for one that is closed, as the interpreter has it."""
    for name, number, mode in (("stdin", 0, "r"), ("stdout", 1, "w"), ("stderr", 2, "w")):
        stream = None
        if wanted.get(number) != "closed":
            file = io.FileIO(number, mode, closefd=False)
            buffer = io.BufferedWriter(file) if number else io.BufferedReader(file)
            errors = "backslashreplace" if number == 2 else "strict"
            stream = io.TextIOWrapper(buffer, encoding="utf-8", errors=errors, line_buffering=number == 2)
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)


def note(pipe: int, allowed: tuple[str, ...], event: str, values: tuple) -> None:
    """Say on a pipe that torch is imported, or that something is changed that is not where it is allowed."""
    if event == "import" and values[0] == "torch":
        os.write(pipe, b"import torch\n")
    path = None
    if event == "open" and values[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND):
        path = values[0]
    elif event in WRITES:
        path = values[WRITES[event]]
    if isinstance(path, str | bytes | os.PathLike):
        place = os.path.abspath(os.fsdecode(path))
        if not place.startswith(allowed):
            os.write(pipe, f"{event} {place!r}\n".encode())


def obey_modes() -> None:
    """Obey the modes of files also as root, who may else write to read-only folders."""
    header, sets = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    libc = ctypes.CDLL(None)
    libc.capget(header, sets)
    overrides = 0b110  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
    for index in range(3):
        sets[index] &= ~overrides
    libc.capset(header, sets)


def import_commands() -> None:
    """Import what most commands import when they are called, so that a sample of them is done sooner."""
    for name in ("pandas", "matplotlib.pyplot", "lorafusion.lab.steps", "lorafusion.lab.reproduce",
                 "lorafusion.planning", "lorafusion.train.jobs_file"):  # fmt: skip
        importlib.import_module(name)


def import_libraries() -> None:
    """Import what commands need that read models and adapters, so that it does not count."""
    for name in ("torch", "transformers", "peft", "huggingface_hub", "tokenizers", "safetensors.torch"):
        importlib.import_module(name)


if __name__ == "__main__":
    from lorafusion.cli.main import main
    from lorafusion.core.plugins import load

    for function in sys.argv[1:]:
        load(function, "hook")()
    serve()
    main()
