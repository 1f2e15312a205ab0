"""Start the processes of a run, watch them, and turn however they end into one result file."""

import ctypes
import logging
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from pathlib import Path
from types import FrameType
from typing import IO

import psutil

from lorafusion.core.files import write, writing
from lorafusion.core.source_tree import IS_CHECKOUT, ROOT
from lorafusion.launch.heartbeat import Watch
from lorafusion.launch.judgement import judge
from lorafusion.launch.lock import inherited
from lorafusion.launch.outcome import FaultyRunError, Outcome
from lorafusion.launch.rendezvous import WAIT_SECONDS, Meeting, meet
from lorafusion.launch.scratch import scratch_folder
from lorafusion.launch.spec import STOP_FILE, RunSpec

LOGGER = logging.getLogger(__name__)
GRACE_SECONDS = 10
END_SECONDS = 10  # that a process may take to end once it is killed
LOOK_SECONDS = 0.2
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
# Of processes on one machine: what they listen on cannot be reached from another. The stores of torch listen on all
# addresses, so these meet in files.
LOOPBACK = {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
LAUNCHER = "LORAFUSION_LAUNCHER"  # in the environment of workers: their launcher's process id
PR_SET_PDEATHSIG = 1  # linux/prctl.h
# By these a launcher tells a process its place among others. Only our own launch places workers: what a shell or a
# notebook has left over would have them wait for processes that nobody has started.
# `PET_` begins those that torchrun takes for its options.
PLACE = re.compile(r"((LOCAL_|GROUP_|ROLE_)?(RANK|WORLD_SIZE)|ROLE_NAME|MASTER_(ADDR|PORT)|(TORCHELASTIC|PET)_\w+)")


class Processes:
    """The processes of a run on this node, in a session of their own so that the whole tree can be ended."""

    def __init__(self, processes: int, meeting: Meeting | None, arguments: list[str], log: IO[str] | None) -> None:
        command = worker_command(processes, meeting, Path(arguments[0]).parent) + arguments
        with writing(Path(log.name)) if log else nullcontext():
            print("+", shlex.join(command), flush=True, file=log)
        here = processes // meeting.nodes if meeting else processes
        environment = worker_environment(here, os.environ) | ({} if meeting else LOOPBACK)
        environment[LAUNCHER] = str(os.getpid())
        self._child = subprocess.Popen(
            command,
            env=environment,
            start_new_session=True,
            preexec_fn=partial(end_with_parent, parent=os.getpid()),
            stdout=log,
            stderr=log,
        )

    def wait(self, seconds: float) -> int | None:
        """The exit status, or None if they are still running after so long."""
        try:
            return self._child.wait(seconds)
        except subprocess.TimeoutExpired:
            return None

    def end(self, at_once: bool = False) -> None:
        """End what is left of them, wherever torchrun has put them: politely first, unless it is to be at once."""
        if self._child.poll() is not None:
            return
        first = psutil.Process(self._child.pid)
        tree = [first, *first.children(recursive=True)]
        if not at_once:
            self._child.terminate()
            self.wait(GRACE_SECONDS)
        for process in tree:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self.wait(END_SECONDS)
        psutil.wait_procs(tree, END_SECONDS)


def launch(
    spec: RunSpec,
    processes: int,
    timeout: float = math.inf,
    nodes: int = 1,
    reports: Path | None = None,
    stall: float = math.inf,
    look: Callable[[], None] = lambda: None,
    log: IO[str] | None = None,
    start: Callable[[int, Meeting | None, list[str], IO[str] | None], Processes] = Processes,
) -> Outcome:
    """Run a spec on `processes` processes; output goes to this process's, or to a log; at most `timeout` seconds pass,
    and at most `stall` in which no process gets on. `look` is called a few times a second.

    With several nodes one launcher runs on each (`srun`); `reports` is then the folder of this attempt, which all of
    them see (`rendezvous.shared_folder`). There they meet, and the workers leave their reports, so that the first node
    knows why another failed; only its outcome says how the run ended. A run that saves checkpoints is asked to do so
    before it ends when this process gets SIGTERM, SIGINT or SIGHUP; the outcome is then "stopped".
    """
    spec = spec if spec.lock else spec.model_copy(update={"lock": inherited()})
    with scratch_folder() as scratch:
        reports = reports or scratch
        reports.mkdir(parents=True, exist_ok=True)
        spec_path = scratch / "spec.json"
        write(spec_path, spec.model_dump_json())
        watch = Watch(reports, processes)
        with _interrupts(spec) as interrupts:
            try:
                meeting = meet(reports, nodes, os.environ) if nodes > 1 else None
            except FaultyRunError as fault:
                return Outcome(fault.status, str(fault))
            running = start(processes, meeting, [str(spec_path), str(reports)], log)
            try:
                code = _wait(running, watch, timeout, stall, look)
            except KeyboardInterrupt:
                running.end(at_once=True)
                raise
            finally:
                running.end()
        LOGGER.debug(f"{processes} processes on {nodes} nodes ended: {code}")
        return judge(reports, code, watch, meeting, interrupts)


def _wait(running: Processes, watch: Watch, timeout: float, stall: float, look: Callable[[], None]) -> int | str:
    """The exit status of a run's processes, or why they are not waited for any longer."""
    begin = time.monotonic()
    while True:
        code = running.wait(LOOK_SECONDS)
        look()
        watch.look()
        if code is not None:
            return code
        if time.monotonic() - begin > timeout:
            return f"not done after {timeout:g} s"
        stalled = watch.stalled(stall)
        if stalled:
            return f"nothing happened for {stall:g} s; {stalled}"


@contextmanager
def _interrupts(spec: RunSpec) -> Iterator[list[str]]:
    """Within it SIGTERM, SIGINT and SIGHUP ask a run with checkpoints to save and end; the names of those that came are
    in the list. A second one, or the first for another run, interrupts this process, once."""
    came: list[str] = []
    stop = Path(spec.saving.folder) / STOP_FILE if spec.saving else None

    def handle(number: int, frame: FrameType | None) -> None:
        came.append(signal.Signals(number).name)
        before = previous[signal.Signals(number)]
        if number == signal.SIGHUP and callable(before):
            before(number, frame)
        if stop is None or came[:-1] not in ([], ["SIGHUP"]):
            for other in SIGNALS:
                signal.signal(other, signal.SIG_IGN)
            raise KeyboardInterrupt(came[-1])
        stop.parent.mkdir(parents=True, exist_ok=True)
        stop.touch()
        if LOGGER.isEnabledFor(logging.INFO):
            _tell(f"{came[-1]}: saving a checkpoint; once more ends at once, with what was saved before")

    if stop:
        stop.unlink(missing_ok=True)
    previous = {number: signal.getsignal(number) for number in SIGNALS}
    for number in SIGNALS:
        signal.signal(number, handle)
    try:
        yield came
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _tell(text: str) -> None:
    """Say something in a signal's handler, where a stream may be in the middle of a line of its own."""
    with suppress(OSError):
        os.write(2, f"{text}\n".encode())


def worker_command(processes: int, meeting: Meeting | None, scratch: Path) -> list[str]:
    """The command that starts the workers of this node: one process plainly, more under torchrun. meeting: where there
    are several nodes; scratch: a folder of this run, in which the processes of a single one meet."""
    worker = ["-m", "lorafusion.engine"]
    if processes == 1:
        return [sys.executable, *worker]
    here = processes // meeting.nodes if meeting else processes
    torchrun = [sys.executable, "-m", "lorafusion.engine.agent", f"--nproc-per-node={here}",
                f"--log-dir={scratch / 'torchrun-logs'}"]  # fmt: skip
    if meeting is None:
        place = [f"--rdzv-endpoint={scratch / 'torchrun'}", "--rdzv-conf=store_type=file"]
        return [*torchrun, "--rdzv-backend=c10d", *place, *worker]
    # Static: ranks in the order of the nodes, and the first node itself listens, or fails.
    return [*torchrun, f"--nnodes={meeting.nodes}", f"--node-rank={meeting.rank}", f"--rdzv-id={meeting.attempt}",
            "--rdzv-backend=static", f"--rdzv-endpoint={meeting.endpoint}", f"--rdzv-conf=timeout={WAIT_SECONDS}",
            *worker]  # fmt: skip


def worker_environment(processes: int, environment: Mapping[str, str]) -> dict[str, str]:
    """The environment of a node's workers: this process's without `PLACE`, with its cores shared out among them.

    A number of threads that is there already stands. More threads than free cores cost more than they bring, as they
    wait for each other spinning: the learning check took 20 s alone and 140 s beside another busy process.
    """
    threads = max(1, len(os.sched_getaffinity(0)) // processes)
    # Baselines are importable from the checkout, whatever the working directory.
    python_path = os.pathsep.join(filter(None, [str(ROOT) if IS_CHECKOUT else "", environment.get("PYTHONPATH")]))
    ours = {"PYTHONPATH": python_path, "PYTHONUNBUFFERED": "1"}
    inherited = {name: value for name, value in environment.items() if not PLACE.fullmatch(name)}
    return {"OMP_NUM_THREADS": str(threads)} | inherited | ours


def end_with_parent(parent: int | None = None) -> None:
    """Ask Linux to kill this process when its parent ends, so that a killed launcher leaves nothing running. parent:
    its id, where it may be gone already."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if parent is not None and os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


def end_with_launcher() -> None:
    """As `end_with_parent`, of a worker that `Processes` has started: by its launcher, or by torchrun between them."""
    end_with_parent()
    parent = psutil.Process().parent()
    if parent is None or int(os.environ[LAUNCHER]) not in (parent.pid, parent.ppid()):
        os.kill(os.getpid(), signal.SIGKILL)
