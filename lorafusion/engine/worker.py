"""One process of a run, from its start to its report. Started by `lorafusion.launch.launch`.

Usage: python -m lorafusion.engine SPEC.json REPORT_DIRECTORY, alone or under torchrun. What it does is the
spec's task (`lorafusion.engine.task`). Each process ends with a report in the directory: rank 0 the run's measurements
(report.json), a process that failed its cause (failure-RANK.json).
"""

import gc
import json
import os
import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from lorafusion.core.files import FullDiskError, write
from lorafusion.core.log import start_logging
from lorafusion.core.plugins import load
from lorafusion.core.schema import LONGEST, UserError, shortened, validated
from lorafusion.engine.build import import_system
from lorafusion.engine.process import WorkerProcess
from lorafusion.launch.heartbeat import ENDED, FAILED, Position
from lorafusion.launch.launch import end_with_parent
from lorafusion.launch.lock import join
from lorafusion.launch.network import network_failure
from lorafusion.launch.outcome import FaultyRunError
from lorafusion.launch.spec import RunSpec

RENDEZVOUS_TIMEOUT = timedelta(minutes=10)


def main(spec_path: str, report_directory: str) -> int:
    end_with_parent()
    start_logging()
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    reports = Path(report_directory)
    position = Position(reports, rank)
    try:
        spec = validated(RunSpec, json.loads(Path(spec_path).read_text()), spec_path)
        if spec.lock:
            join(spec.lock)
        device, task = _device(spec), _imported(spec)
        if world > 1:
            _meet(device, rank, world, Path(spec_path).with_name("workers"))
        keep = partial(_write, reports / "report.json") if rank == 0 else lambda _: None
        keep(task(WorkerProcess(spec, device, position, rank, world, keep=keep)))
    except Exception as error:  # the border of the process: every failure becomes a report
        traceback.print_exc()
        failure = {"status": status_of(error), "message": describe(error, position)}
        try:
            _write(reports / f"failure-{rank}.json", failure)
            position.set(ENDED)
        except OSError:  # a full disk; the position has its place already
            position.set(FAILED + shortened(failure["message"], LONGEST))
        # No orderly shutdown: the other stages wait for this one in a collective that will never come.
        sys.stderr.flush()
        os._exit(1)
    if dist.is_initialized():
        dist.destroy_process_group()
    position.set(ENDED)
    return 0


def _meet(device: torch.device, rank: int, world: int, file: Path) -> None:
    """Join the run's other processes: through a file of the run where all of them are on this machine."""
    is_near = os.environ["LOCAL_WORLD_SIZE"] == os.environ["WORLD_SIZE"]
    place = {"init_method": f"file://{file}", "rank": rank, "world_size": world} if is_near else {}
    backend = "nccl" if device.type == "cuda" else "gloo"
    try:
        dist.init_process_group(backend, timeout=RENDEZVOUS_TIMEOUT, **place)
    except RuntimeError as error:
        if is_near:
            raise
        raise UserError(
            network_failure("the rendezvous at {MASTER_ADDR}:{MASTER_PORT}".format(**os.environ), error)
        ) from error


def _imported(spec: RunSpec) -> Callable[[WorkerProcess], dict]:
    """A spec's task, once all that it needs is imported. No collection of garbage looks at that from here on: at half a
    million objects, which stay, it held runs of 2 to 10 s on an H200 up for 0.4 to 0.5 s."""
    task = load(spec.task, "task")
    import_system(spec.system)
    gc.freeze()
    return task


def _device(spec: RunSpec) -> torch.device:
    if spec.device == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError("device cuda: this machine has no usable NVIDIA GPU; choose a suite for the CPU, such as smoke")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    torch.cuda.set_device(device)
    return device


def status_of(error: Exception) -> str:
    """The status of a run that ended with this error."""
    if isinstance(error, FaultyRunError):
        return error.status
    out_of_memory = isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)
    return "oom" if out_of_memory else "crash"


def describe(error: Exception, position: Position) -> str:
    """One line: which process, doing what, and what went wrong."""
    reason = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, FullDiskError):
        reason = f"{error.filename}: {error.strerror}"
    prefix = "" if isinstance(error, UserError | FullDiskError) else f"{type(error).__name__}: "
    return f"{position.place}, {position.doing}: {prefix}{reason[:500]}"


def _write(path: Path, content: dict) -> None:
    write(path, json.dumps(content))
