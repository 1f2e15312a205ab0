"""Runs whose processes import nothing: they are forked from one server that has done it.

Importing torch, transformers and PEFT takes each process of a real run 5 s or more, most of what a run of the tiny
model takes. Tests that ask what is computed, and not how processes are started, run here; the worker is the same.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from functools import partial
from multiprocessing.connection import wait
from typing import IO
from unittest.mock import patch

import torch
from torch.distributed import TCPStore

from lorafusion.runtime import worker
from lorafusion.runtime.launch import launch as launch_any
from lorafusion.runtime.launch import worker_environment

HOST = "127.0.0.1"
FORKSERVER = multiprocessing.get_context("forkserver")
# pytest: it is the main module of these processes, too. This module: the worker, with all that it imports. The others,
# where they can be imported: megatron-core takes 4 s.
MEGATRON = ("baselines.megatron.sharded", "baselines.megatron.pipeline")
FORKSERVER.set_forkserver_preload(["pytest", "tests.forked", *MEGATRON])


class Forked:
    """`lorafusion.runtime.launch.Processes` on one node; the first to fail decides, as under torchrun."""

    def __init__(self, processes: int, nodes: int, arguments: list[str], log: IO[str] | None) -> None:
        assert nodes == 1
        # Where the processes meet, kept here as torchrun keeps it, so that the port is one that was free.
        self._store = TCPStore(HOST, 0, is_master=True, wait_for_workers=False) if processes > 1 else None
        places = [place_of(rank, processes, self._store.port) if self._store else {} for rank in range(processes)]
        self._workers = [FORKSERVER.Process(target=_work, args=(place, *arguments)) for place in places]
        # The first start is that of the server, in this environment. A process with more threads cannot be forked.
        with patch.dict(os.environ, worker_environment(1, os.environ) | {"OMP_NUM_THREADS": "1"}):
            for process in self._workers:
                process.start()

    def wait(self, seconds: float) -> int | None:
        end = time.monotonic() + seconds
        while True:
            codes = [process.exitcode for process in self._workers]
            running = [process for process, code in zip(self._workers, codes, strict=True) if code is None]
            if any(codes) or not running:
                return next((code for code in codes if code), 0)
            if time.monotonic() > end:
                return None
            wait([process.sentinel for process in running], min(seconds, 0.05))

    def end(self) -> None:
        for process in self._workers:
            process.kill()
            process.join()


launch = partial(launch_any, start=Forked)


def place_of(rank: int, processes: int, port: int) -> dict[str, str]:
    """The environment by which a process knows its place, as torchrun sets it."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(processes),
        "MASTER_ADDR": HOST,
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }


def _work(place: dict[str, str], spec_path: str, reports: str) -> None:
    os.environ.update(place)
    torch.set_num_threads(1)
    sys.exit(worker.main(spec_path, reports))
