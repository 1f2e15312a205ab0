"""What a preflight job does on each of its nodes: `python -m lorafusion.lab.cluster.probe`.

What does not hold is a line of the job's log. The last line says by this node's clock when the checks ended.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

from lorafusion.core.schema import shortened
from lorafusion.launch.outcome import FaultyRunError
from lorafusion.launch.rendezvous import failure_at, meet

MARK = "preflight: "  # begins the lines that are for the login node
ENDED = "ended at "
LOGIN, SEEN = "login", "seen-"  # files: the login node's, and each node's
CLOCK_SECONDS = 5.0  # by which clocks may differ: files that are made later must not look older
MEET_SECONDS = 60.0


def probe(place: Path, nodes: int, gpus: int) -> Iterator[str]:
    """What does not hold on this node. place: a folder of the login node; gpus: of this node."""
    yield from _torch(gpus)
    shared = list(_shared_folder(place))
    yield from shared
    if nodes > 1 and not shared:
        yield from _meeting(place / "rendezvous", nodes)


def _torch(gpus: int) -> Iterator[str]:
    try:
        import torch
    except (ImportError, OSError) as error:  # OSError: a library of CUDA that is missing
        yield f"torch cannot be imported ({error}); install anew: `make setup`"
        return
    if gpus and torch.cuda.device_count() < gpus:
        yield (
            f"torch {torch.__version__} sees {torch.cuda.device_count()} of the {gpus} GPUs asked for, nvidia-smi "
            f"{_listed_gpus()}; is torch built for the driver's CUDA (`make setup GPU=1`), and does the site file ask "
            f"for the right GPUs?"
        )


def _listed_gpus() -> str:
    if not shutil.which("nvidia-smi"):
        return "is not there"
    try:
        done = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60, check=False)
    except subprocess.TimeoutExpired:
        return "does not answer"
    return f"{done.stdout.count('GPU ')}"


def _shared_folder(place: Path) -> Iterator[str]:
    advice = "results need a folder that the login node and all nodes share"
    if not (place / LOGIN).exists():
        yield f"{place.parent} is not the login node's; {advice}"
        return
    try:
        (place / f"{SEEN}{node_name()}").touch()
    except OSError as error:
        yield f"{place.parent} cannot be written ({error.strerror}); {advice}"


def _meeting(folder: Path, nodes: int) -> Iterator[str]:
    """Add up a number over all nodes, and compare their clocks."""
    import torch
    import torch.distributed as dist

    try:
        meeting = meet(folder, nodes, os.environ, MEET_SECONDS)
    except FaultyRunError as error:
        yield str(error)
        return
    options = {"rank": meeting.rank, "world_size": nodes, "timeout": timedelta(seconds=MEET_SECONDS)}
    try:
        dist.init_process_group("gloo", init_method=f"tcp://{meeting.endpoint}", **options)
        total = torch.ones(1)
        dist.all_reduce(total)
        dist.barrier()
        clocks = [torch.zeros(1, dtype=torch.float64) for _ in range(nodes)]
        dist.all_gather(clocks, torch.tensor([time.time()], dtype=torch.float64))
        dist.destroy_process_group()
    except (RuntimeError, ValueError, OSError) as error:
        yield failure_at(meeting.endpoint, error)
        return
    if int(total) != nodes:
        yield f"a sum over {nodes} nodes is {int(total)}; is another program at {meeting.endpoint}?"
    off = float(clocks[meeting.rank] - clocks[0])
    if abs(off) > CLOCK_SECONDS:
        yield f"its clock is {off:+.0f} s from the first node's; set them by NTP (chrony), as files go by their times"


def node_name() -> str:
    return os.environ.get("SLURMD_NODENAME") or platform.node()


if __name__ == "__main__":
    settings = json.loads(sys.argv[1])
    for finding in probe(Path(settings["place"]), settings["nodes"], settings["gpus"]):
        print(f"{MARK}{node_name()}: {shortened(' '.join(finding.split()), 250)}", flush=True)
    print(f"{MARK}{node_name()}: {ENDED}{time.time()}", flush=True)
