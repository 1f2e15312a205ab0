"""The hostile inputs, and how they are run: several servers at once, each with its own cases."""

from __future__ import annotations

import hashlib
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.torture import calls, files, keys
from tests.torture.case import LIBRARIES, MOST_CPU, WARM, Case, Server
from tests.torture.case import run as run_case
from tests.torture.server import Ended

START = Case("version", "--version", statuses=frozenset({0}), fresh=True)


@cache
def cases() -> tuple[Case, ...]:
    """All of them, in the order of their names."""
    return tuple(sorted(_all(), key=lambda case: case.name))


def sample() -> list[Case]:
    """A tenth of them, at least four of each command, the same every time: of the others those that are soon done."""
    groups: dict[str, list[Case]] = {}
    for case in sorted(cases(), key=lambda case: hashlib.sha256(case.name.encode()).digest()):
        groups.setdefault(case.command, []).append(case)
    chosen: list[Case] = []
    for group in groups.values():
        first = [case for case in group if case.cpu <= MOST_CPU][:4]
        soon = [case for case in group if case.light and not case.fresh and case not in first]
        chosen += first + soon[: max(0, -(-len(group) // 10) - len(first))]
    return chosen


def _all() -> Iterator[Case]:
    for part in (files, keys, calls):
        yield from part.all_cases()


def start_of(server: Server, place: Path) -> float:
    """CPU seconds of a fresh interpreter that imports the command line: the most of three."""
    return max(run_case(START, server, place / str(n), 0.0)[0].cpu for n in range(3))


def run(chosen: Sequence[Case], servers: int = 2, warm: bool = False) -> dict[str, list[str]]:
    """What did not hold of each case. warm: without the time that a command takes to import what it needs."""
    waiting: queue.SimpleQueue[Case] = queue.SimpleQueue()
    for case in chosen:
        waiting.put(case)
    outcomes: dict[str, tuple[Ended, list[str]]] = {}
    with TemporaryDirectory(prefix="torture-") as folder:
        caches = Path(folder) / "caches"
        fonts = [sys.executable, "-c", "import matplotlib.font_manager"]  # else the first figure makes the list
        subprocess.run(fonts, env=os.environ | {"MPLCONFIGDIR": str(caches)}, check=True)
        threads = [threading.Thread(target=_work, args=(waiting, outcomes, Path(folder) / str(n), len(chosen), warm))
                   for n in range(servers)]  # fmt: skip
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    return {case.name: outcomes[case.name][1] for case in chosen}


def _work(waiting: queue.SimpleQueue, outcomes: dict, place: Path, total: int, warm: bool) -> None:
    servers: dict[bool, Server] = {}
    start = 0.0
    place.mkdir()
    try:
        while True:
            try:
                case = waiting.get_nowait()
            except queue.Empty:
                return
            if case.libraries not in servers:
                servers[case.libraries] = Server(
                    place, place.parent / "caches", LIBRARIES if case.libraries else WARM if warm else ()
                )
            server = servers[case.libraries]
            start = start or start_of(server, place)
            outcomes[case.name] = run_case(case, server, place, start)
            for line in outcomes[case.name][1]:
                print(f"{case.name}: {line}", flush=True)
            if len(outcomes) % 50 == 0:
                print(
                    f"{time.strftime('%H:%M:%S')} {len(outcomes)} of {total} inputs, "
                    f"{sum(bool(wrong) for _, wrong in outcomes.values())} failed",
                    file=sys.stderr,
                    flush=True,
                )
    finally:
        for server in servers.values():
            server.close()
