"""What a preflight job does on each of its nodes: `python -m lorafusion.lab.cluster.probe`.

The nodes meet before any of them imports torch, which takes minutes where a network file system has not read it yet.
What the login node is to know is a line of the job's log, `preflight: NODE KIND: TEXT`.
"""

import json
import os
import platform
import shutil
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Generator
from datetime import timedelta
from pathlib import Path

from lorafusion.core.files import write
from lorafusion.core.schema import shortened
from lorafusion.launch.network import network_failure
from lorafusion.launch.outcome import FaultyRunError
from lorafusion.launch.rendezvous import Meeting, meet, wait_for

MARK = "preflight: "
# Kinds of lines: this node's clock, what it does from now on, how long it has imported torch, what does not hold, and
# that it has ended.
CLOCK, DOING, TORCH, PROBLEM, ENDED = "clock", "doing", "torch", "problem", "ended"
LOGIN, SEEN, READY = "login", "seen-", "ready-"  # files: the login node's, each node's, and whether it can go on
CLOCK_SECONDS = 5.0  # by which clocks may differ: files that are made later must not look older
MEET_SECONDS = 180.0  # in which all nodes have to come
REACH_SECONDS = 30.0  # in which they have to reach the first, and to add up a number
IMPORT_SECONDS = 3600.0  # that others are waited for to import torch: the job ends before
Lines = Generator[tuple[str, str], None, bool]  # kinds and texts; its value says whether all holds


def probe(place: Path, nodes: int, gpus: int) -> Lines:
    """What this node does and finds. place: a folder of the login node; gpus: of this node."""
    yield CLOCK, f"{time.time():.3f}"
    meeting = (yield from _meet(place, nodes)) if (yield from _shared_folder(place)) else None
    reachable = meeting is not None and (yield from _exchange_clocks(meeting))
    ready = (yield from _torch(gpus)) and reachable
    if meeting is None:
        return False
    write(place / f"{READY}{meeting.rank}", "yes" if ready else "no")
    if not ready:
        return False
    yield DOING, "waits for the other nodes to import torch"
    files = {f"{READY}{rank}" for rank in range(nodes)}
    if wait_for(place, files, IMPORT_SECONDS) or any((place / file).read_text() != "yes" for file in files):
        return False  # another node says why
    return (yield from _add_up(place, nodes, gpus))


def _shared_folder(place: Path) -> Lines:
    advice = "results need a folder that the login node and all nodes share"
    if not (place / LOGIN).exists():
        yield PROBLEM, f"{place.parent} is not the login node's; {advice}"
        return False
    try:
        (place / f"{SEEN}{node_name()}").touch()
    except OSError as error:
        yield PROBLEM, f"{place.parent} cannot be written ({error.strerror}); {advice}"
        return False
    return True


def _meet(place: Path, nodes: int) -> Generator[tuple[str, str], None, Meeting | None]:
    yield DOING, "waits for the other nodes"
    try:
        return meet(place / "nodes", nodes, os.environ, MEET_SECONDS)
    except FaultyRunError as error:
        yield PROBLEM, str(error)
        return None


def _exchange_clocks(meeting: Meeting) -> Lines:
    """Each other node asks the first for its time, at the port where they meet. The first only answers: who cannot
    reach it knows why."""
    host, _, port = meeting.endpoint.rpartition(":")
    try:
        if meeting.rank == 0:
            return _answer(int(port), meeting.nodes - 1)
        early, late = _ask(host, int(port))
    except OSError as error:
        yield PROBLEM, network_failure(f"the connection to {meeting.endpoint}", error)
        return False
    off = early if early > 0 else min(late, 0.0)
    if abs(off) > CLOCK_SECONDS:
        yield PROBLEM, f"its clock is {off:+.0f} s from the first node's; set them by NTP (chrony), files go by them"
    return True


def _answer(port: int, askers: int) -> bool:
    """Tell others the time; whether all have asked."""
    with socket.create_server(("", port), backlog=max(1, askers)) as server:
        server.settimeout(REACH_SECONDS)
        for _ in range(askers):
            try:
                connection, _ = server.accept()
            except TimeoutError:
                return False
            with connection:
                connection.settimeout(REACH_SECONDS)
                connection.recv(1)
                connection.sendall(struct.pack("!d", time.time()))
    return True


def _ask(host: str, port: int) -> tuple[float, float]:
    """By how many seconds this clock is ahead of the first node's: at least, and at most."""
    end = time.monotonic() + REACH_SECONDS
    while True:
        try:
            with socket.create_connection((host, port), timeout=max(1.0, end - time.monotonic())) as connection:
                before = time.time()
                connection.sendall(b"?")
                answer = connection.recv(8, socket.MSG_WAITALL)
                after = time.time()
            break
        except ConnectionRefusedError:  # it does not listen yet
            if time.monotonic() > end:
                raise
            time.sleep(0.1)
    if len(answer) < 8:
        raise ConnectionError("the first node closed the connection")
    (there,) = struct.unpack("!d", answer)
    return before - there, after - there


def _torch(gpus: int) -> Lines:
    yield DOING, "imports torch"
    begin = time.monotonic()
    try:
        import torch
    except (ImportError, OSError) as error:  # OSError: a library of CUDA that is missing
        yield PROBLEM, f"torch cannot be imported ({error}); install anew: `make setup`"
        return False
    yield TORCH, f"{time.monotonic() - begin:.1f}"
    reason = _missing_gpus(torch.version.cuda, torch.cuda.device_count(), gpus)
    if reason:
        yield PROBLEM, f"torch {torch.__version__} sees {torch.cuda.device_count()} of the {gpus} GPUs: {reason}"
    return not reason


def _missing_gpus(cuda: str | None, seen: int, gpus: int) -> str:
    """Why torch sees fewer GPUs than a job has asked for; empty where it sees them. cuda: that torch is built for."""
    if seen >= gpus:
        return ""
    listed = _listed_gpus()
    if isinstance(listed, str) or listed == 0:
        return f"nvidia-smi {listed or 'lists none'}; is this a node with GPUs (partition, constraint of the site)?"
    if listed < gpus:
        return f"nvidia-smi lists {listed}; correct gpus_per_node of the site, or report the node"
    if cuda is None:
        return "it is built for CPUs; install with `make setup GPU=1`"
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES", "not set")
    return f"nvidia-smi lists {listed}; the driver is too old for CUDA {cuda}, or CUDA_VISIBLE_DEVICES ({hidden}) wrong"


def _listed_gpus() -> int | str:
    """How many nvidia-smi lists, or what is wrong with it."""
    if not shutil.which("nvidia-smi"):
        return "is not there"
    try:
        done = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60, check=False)
    except subprocess.TimeoutExpired:
        return "does not answer"
    return done.stdout.count("GPU ") if done.returncode == 0 else f"fails ({done.stdout.strip()})"


def _add_up(place: Path, nodes: int, gpus: int) -> Lines:
    """Add up a number over all nodes, as trainings do: on the first GPU of each, where they have one."""
    import torch
    import torch.distributed as dist

    backend, device = ("nccl", "cuda:0") if gpus and torch.cuda.is_available() else ("gloo", "cpu")
    what = f"{backend}'s all_reduce over {nodes} nodes"
    yield DOING, f"tries {what}"
    os.environ["TORCH_NCCL_BLOCKING_WAIT"] = "1"  # what fails is raised here, and does not abort the process
    # NCCL may wait for ever for a connection that a firewall swallows.
    patience = threading.Timer(2 * REACH_SECONDS, _give_up, (what,))
    patience.start()
    try:
        meeting = meet(place / "torch", nodes, os.environ, REACH_SECONDS)
        options = {"rank": meeting.rank, "world_size": nodes, "timeout": timedelta(seconds=REACH_SECONDS)}
        dist.init_process_group(backend, init_method=f"tcp://{meeting.endpoint}", **options)
        total = torch.ones(1, device=device)
        dist.all_reduce(total)
        total = int(total)
    except (RuntimeError, ValueError, OSError) as error:
        yield PROBLEM, str(error) if isinstance(error, FaultyRunError) else network_failure(what, error)
        return False
    finally:
        patience.cancel()
    if total != nodes:
        yield PROBLEM, f"{what} gives {total}; is another program at {meeting.endpoint}?"
    return total == nodes


def _give_up(what: str) -> None:
    """End this process, which waits for others in a library."""
    say(PROBLEM, network_failure(what, TimeoutError(f"no end after {2 * REACH_SECONDS:.0f} s")))
    end()


def node_name() -> str:
    return os.environ.get("SLURMD_NODENAME") or platform.node()


def say(kind: str, text: str) -> None:
    line = f"{MARK}{node_name()} {kind}: {shortened(' '.join(text.split()), 250)}\n"
    sys.stdout.write(line)  # as a whole, between those of other nodes
    sys.stdout.flush()


def end() -> None:
    """Without the libraries' own ends, which wait for other nodes."""
    say(ENDED, "")
    os._exit(0)


if __name__ == "__main__":
    settings = json.loads(sys.argv[1])
    for kind, text in probe(Path(settings["place"]), settings["nodes"], settings["gpus"]):
        say(kind, text)
    end()
