"""Start the processes of a run, watch them, and turn however they end into one result file."""

from __future__ import annotations

import ctypes
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from lorafusion.runtime.spec import RunSpec

ROOT = Path(__file__).parent.parent.parent
GRACE_SECONDS = 10
RENDEZVOUS_PORT = 29400
PR_SET_PDEATHSIG = 1  # linux/prctl.h


@dataclass(frozen=True)
class Outcome:
    """How a run ended: a status of the measurement table, why, and the report of rank 0 where there is one."""

    status: str
    note: str = ""
    report: dict = field(default_factory=dict)


def launch(spec: RunSpec, processes: int, timeout: float, nodes: int = 1, reports: Path | None = None) -> Outcome:
    """Run a spec on `processes` processes; output goes to this process's, at most `timeout` seconds pass.

    With several nodes one launcher runs on each (`srun`); `reports` is then a folder that all of them see, in which
    the workers leave their reports, so that the first node knows why another failed.
    """
    with tempfile.TemporaryDirectory(prefix="lorafusion-") as scratch:
        reports = reports or Path(scratch)
        reports.mkdir(parents=True, exist_ok=True)
        spec_path = Path(scratch) / "spec.json"
        spec_path.write_text(spec.model_dump_json())
        command = worker_command(processes, nodes, os.environ) + [str(spec_path), str(reports)]
        print("+", shlex.join(command), flush=True)
        environment = worker_environment(processes // nodes, os.environ)
        # A session of their own, so that the whole tree can be ended.
        child = subprocess.Popen(command, env=environment, start_new_session=True, preexec_fn=end_with_parent)
        previous = signal.signal(signal.SIGTERM, _interrupt)
        try:
            code = child.wait(timeout)
        except subprocess.TimeoutExpired:
            return Outcome("timeout", f"not done after {timeout:g} s")
        finally:
            _end(child)
            signal.signal(signal.SIGTERM, previous)
        return outcome(reports, code)


def worker_command(processes: int, nodes: int, environment: dict[str, str]) -> list[str]:
    """The command that starts the workers of this node: one process plainly, more under torchrun."""
    worker = ["-m", "lorafusion.runtime.worker"]
    if processes == 1:
        return [sys.executable, *worker]
    torchrun = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={processes // nodes}"]
    if nodes == 1:
        return [*torchrun, "--standalone", *worker]
    return [
        *torchrun,
        f"--nnodes={nodes}",
        f"--node-rank={environment['SLURM_NODEID']}",
        f"--rdzv-id={environment['SLURM_JOB_ID']}",
        "--rdzv-backend=c10d",
        # Where srun was called: the job's first node.
        f"--rdzv-endpoint={environment['SLURM_LAUNCH_NODE_IPADDR']}:{RENDEZVOUS_PORT}",
        *worker,
    ]


def worker_environment(processes: int, environment: Mapping[str, str]) -> dict[str, str]:
    """The environment of a node's workers: this process's, with its cores shared out among them.

    A number of threads that is there already stands. More threads than free cores cost more than they bring, as they
    wait for each other spinning: the learning check took 20 s alone and 140 s beside another busy process.
    """
    threads = max(1, len(os.sched_getaffinity(0)) // processes)
    # Baselines are importable from the checkout, whatever the working directory.
    python_path = os.pathsep.join([str(ROOT), *filter(None, [environment.get("PYTHONPATH")])])
    ours = {"PYTHONPATH": python_path, "PYTHONUNBUFFERED": "1"}
    return {"OMP_NUM_THREADS": str(threads)} | dict(environment) | ours


def end_with_parent() -> None:
    """Ask Linux to end this process with its parent, so that a killed launcher leaves nothing running."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def outcome(reports: Path, code: int) -> Outcome:
    """What the workers left behind, read in the order of what explains most."""
    failures = [json.loads(path.read_text()) for path in sorted(reports.glob("failure-*.json"))]
    if failures:
        # An exhausted memory explains the others' broken connections; else the first rank to fail by number.
        failures.sort(key=lambda failure: failure["status"] != "oom")
        causes = [failure for failure in failures if "Connection" not in failure["message"]] or failures
        return Outcome(causes[0]["status"], causes[0]["message"])
    if code < 0:
        name = signal.Signals(-code).name
        hint = ", often the host's out-of-memory killer" if name == "SIGKILL" else ""
        return Outcome("crash", f"ended by {name}{hint}")
    report = reports / "report.json"
    if code or not report.exists():
        return Outcome("crash", f"ended with status {code} and left no report; its log says more")
    return Outcome("ok", report=json.loads(report.read_text()))


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def _end(child: subprocess.Popen) -> None:
    """End what is left of the run's processes: politely, then not."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(child.pid, number)
        except ProcessLookupError:
            return
        try:
            child.wait(GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            continue
