"""How the launchers of a run on several nodes, one on each (`srun`), come together at a port of the first node.

They share a folder that only this attempt has: each leaves its name there, and once all are there the first writes at
which of its ports their processes meet. So a node that does not come is named, and no attempt meets another.
"""

import glob
import hashlib
import platform
import shutil
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from lorafusion.core.files import write
from lorafusion.launch.network import address_of, free_port
from lorafusion.launch.outcome import FaultyRunError

# What all nodes of an attempt know, and what changes when a job is requeued or calls `srun` again. Slurm numbers the
# steps of a requeued job from 0 again; Snakemake's plugin hides the number of restarts; Slurm before 23.02 tells no
# start; and the port is the same again where SrunPortRange is narrow. So the Snakefile names each attempt, too.
ATTEMPT = ("LORAFUSION_ATTEMPT", "SLURM_RESTART_COUNT", "SLURM_JOB_START_TIME", "SLURM_SRUN_COMM_PORT")
WAIT_SECONDS = 120  # in which all nodes have to come, and then to reach the port
LOOK_SECONDS = 0.2
MEETING = "rendezvous"  # a file: where the processes meet
NONE = "none"  # in it: the first node waits no longer


@dataclass(frozen=True)
class Meeting:
    """Where the processes of a run meet: at `endpoint`, a host and a port of it. attempt: its name, with that of the
    run; rank: this node's."""

    attempt: str
    endpoint: str
    rank: int
    nodes: int


def node_rank(environment: Mapping[str, str]) -> int:
    """Which node of its run this is; the first, 0, alone judges how the run ended, and writes it down."""
    return int(environment.get("SLURM_NODEID", 0))


def attempt_of(environment: Mapping[str, str]) -> str:
    """The name of this attempt: the same on all nodes, and another one after a requeue."""
    life = hashlib.sha256(repr([environment.get(name) for name in ATTEMPT]).encode()).hexdigest()[:8]
    return f"{environment.get('SLURM_JOB_ID', 'local')}.{environment.get('SLURM_STEP_ID', 0)}-{life}"


def shared_folder(out: Path, environment: Mapping[str, str]) -> Path:
    """The folder of this attempt at a result file, in which its nodes meet and their processes report. What earlier
    attempts left is removed."""
    folder = out.with_name(f"{out.name}.reports-{attempt_of(environment)}")
    if node_rank(environment) == 0:
        for path in out.parent.glob(f"{glob.escape(out.name)}.reports-*"):
            if path != folder:
                shutil.rmtree(path, ignore_errors=True)
    return folder


def meet(folder: Path, nodes: int, environment: Mapping[str, str], seconds: float = WAIT_SECONDS) -> Meeting:
    """Wait for the other nodes. Raises `FaultyRunError` where one of them does not come in time, or where the first has
    no free port."""
    rank = node_rank(environment)
    write(folder / f"node-{rank}", environment.get("SLURMD_NODENAME") or platform.node())
    if rank == 0:
        try:
            _require_all(folder, nodes, environment, seconds)
            endpoint = f"{address_of(environment)}:{free_port()}"
        except FaultyRunError:
            write(folder / MEETING, NONE)
            raise
        write(folder / MEETING, endpoint)
    # The first may have come last, and waits for others after that.
    elif wait_for(folder, {MEETING}, 2 * seconds) or (folder / MEETING).read_text() == NONE:
        raise FaultyRunError("crash", f"{node_name(0, environment)}, the first node, called no rendezvous")
    return Meeting(f"{attempt_of(environment)}.{folder.name}", (folder / MEETING).read_text(), rank, nodes)


def decided(folder: Path, name: str, value: str, environment: Mapping[str, str], seconds: float) -> str:
    """What the first node of an attempt decides, on all its nodes: `value`, which is that of the first. Empty on the
    others once it has left the folder, or says nothing for so long."""
    if node_rank(environment) == 0:
        write(folder / name, value)
        return value
    return "" if wait_for(folder, {name}, seconds, leaves=True) else (folder / name).read_text()


def leave(folder: Path) -> None:
    """Remove the folder of an attempt that has ended. That there was no rendezvous stays there for a node that comes
    late, until the next attempt."""
    if all(meeting.read_text() != NONE for meeting in folder.rglob(MEETING)):
        shutil.rmtree(folder, ignore_errors=True)  # NFS keeps what another node has open


def wait_for(folder: Path, names: set[str], seconds: float, leaves: bool = False) -> set[str]:
    """Wait until files of other nodes are in a folder; returns the names of those that are not. They show by listing
    the folder: NFS remembers for a minute that a name was not there. leaves: not once the folder is gone."""
    end = time.monotonic() + seconds
    while missing := names.difference(path.name for path in folder.glob("*")):
        if time.monotonic() > end or (leaves and not folder.exists()):
            break
        time.sleep(LOOK_SECONDS)
    return missing


def _require_all(folder: Path, nodes: int, environment: Mapping[str, str], seconds: float) -> None:
    missing = wait_for(folder, {f"node-{node}" for node in range(nodes)}, seconds)
    if missing:
        names = ", ".join(node_name(int(name.removeprefix("node-")), environment) for name in sorted(missing))
        raise FaultyRunError("crash", f"{len(missing)} of {nodes} nodes did not come to the rendezvous in {seconds:g} "
                                      f"s: {names}; does lorafusion start there, and see the results?")  # fmt: skip


def node_name(rank: int, environment: Mapping[str, str]) -> str:
    """A node as Slurm calls it, where that is known here."""
    listed = environment.get("SLURM_STEP_NODELIST", "")
    if listed and shutil.which("scontrol"):
        done = subprocess.run(["scontrol", "show", "hostnames", listed], capture_output=True, text=True, check=False)
        names = done.stdout.split()
        if rank < len(names):
            return names[rank]
    return f"node {rank} of {listed}" if listed else f"node {rank}"
