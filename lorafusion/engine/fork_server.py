"""Runs whose processes import nothing: they are forked from one server that has done it.

Importing torch, transformers and PEFT takes each process of a run 5 s or more, megatron-core 4 s besides. Where many
short runs follow each other (a suite on a machine that is rented by the minute, tests) that is most of their time. The
worker is the same, and each run has fresh processes that have not seen a GPU before.
"""

import multiprocessing
import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from multiprocessing.connection import wait
from typing import IO

from lorafusion.launch.launch import LOOPBACK, worker_environment
from lorafusion.launch.launch import launch as launch_any

FORKSERVER = multiprocessing.get_context("forkserver")
# One thread, as a process with more cannot be forked. To ask whether there is a GPU must not stop those that are forked
# from using it.
SERVER_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "PYTORCH_NVML_BASED_CUDA_CHECK": "1"}


_modules: list[str] = []


def preload(*modules: str) -> None:
    """Have the server import these too, where they can be imported, before its first process."""
    _modules.extend(modules)
    FORKSERVER.set_forkserver_preload(_modules)


preload("lorafusion.engine.worker", "liger_kernel.ops.rms_norm")


def work(place: dict[str, str], threads: int, log: str | None, spec_path: str, reports: str) -> None:
    """The worker, in a process that was forked for it. log: the file to which its output goes."""
    if log is not None:
        with open(log, "a") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
    import torch

    from lorafusion.engine import worker

    os.environ.update(place)
    torch.set_num_threads(threads)
    sys.exit(worker.main(spec_path, reports))


class Forked:
    """`lorafusion.launch.launch.Processes` on one node; the first to fail decides, as under torchrun, and first of all
    one that was ended by a signal."""

    work = staticmethod(work)  # tests have one that waits for them

    def __init__(self, processes: int, meeting: None, arguments: list[str], log: IO[str] | None) -> None:
        places = [place_of(rank, processes) for rank in range(processes)] if processes > 1 else [{}]
        environment = worker_environment(processes, os.environ)
        threads = int(environment["OMP_NUM_THREADS"])
        settings = (threads, log.name if log else None, *arguments)
        self._workers = [FORKSERVER.Process(target=self.work, args=(place, *settings)) for place in places]
        # The first start is that of the server, in this environment.
        with _environment(environment | SERVER_ENVIRONMENT):
            for process in self._workers:
                process.start()

    def wait(self, seconds: float) -> int | None:
        end = time.monotonic() + seconds
        while True:
            codes = [process.exitcode for process in self._workers]
            running = [process for process, code in zip(self._workers, codes, strict=True) if code is None]
            if any(codes) or not running:
                return min((code for code in codes if code), default=0)
            if time.monotonic() > end:
                return None
            wait([process.sentinel for process in running], min(seconds, 0.05))

    def end(self, at_once: bool = True) -> None:
        for process in self._workers:
            process.kill()
            process.join()


launch = partial(launch_any, start=Forked)


@contextmanager
def _environment(whole: Mapping[str, str]) -> Iterator[None]:
    """Within it this is the process's environment."""
    before = dict(os.environ)
    os.environ.clear()
    os.environ.update(whole)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def place_of(rank: int, processes: int) -> dict[str, str]:
    """The environment by which a process on this machine knows its place, as torchrun sets it."""
    count = str(processes)
    return LOOPBACK | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
