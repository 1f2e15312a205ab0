"""Before a sweep: a small Slurm job that finds out in a minute what would fail each cell after hours in the queue.

It has as many nodes as the largest cell, at most two, with that cell's GPUs. What does not hold is a line that says on
which node, and what to do.
"""

import json
import math
import re
import shlex
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lorafusion.core.files import write
from lorafusion.core.plugins import import_extra
from lorafusion.core.schema import UserError
from lorafusion.lab.cluster import probe
from lorafusion.lab.cluster.admission import require_admitted
from lorafusion.lab.cluster.probe import CLOCK_SECONDS, LOGIN, MARK, PROBLEM, SEEN
from lorafusion.lab.cluster.queue import Job, job_state, slurm
from lorafusion.lab.cluster.request import Resources, request_of
from lorafusion.lab.cluster.site import Site, read_site
from lorafusion.lab.cluster.submit import sbatch_words, submit
from lorafusion.lab.cluster.words import never_passes

PASSED = ".preflight"  # a file: what has passed
MINUTES = 10  # that the job may take once it runs: a cold file system takes minutes to import torch
MOST_NODES = 2
OTHERS_SECONDS = 20  # that the other nodes have once it is clear that something does not hold
LOOK_SECONDS = 2.0
SHOW_SECONDS = 60.0  # that a file of a node may take to be seen here
# On each node; `$1` is the workflow's Python, `$2` what the probe is given.
ON_EACH_NODE = f"""
say() {{ echo "{MARK}${{SLURMD_NODENAME:-$(hostname)}} {PROBLEM}: $1"; }}
if ! [ -x "$1" ]; then
    link=$(readlink "$1") && link=", a link to $link"
    say "no $1$link; install where all nodes see it"
elif ! error=$("$1" -c 'import lorafusion.lab.cluster.probe' 2>&1); then
    error=$(echo "$error" | tail -n 1)
    say "$1, which is $("$1" -V 2>&1 | tail -n 1), cannot import lorafusion ($error); install where all nodes see it"
else
    "$1" -m lorafusion.lab.cluster.probe "$2" || say "the probe ended with status $?"
fi
"""


def needs_of(steps: Iterable[Resources]) -> Resources:
    """What the preflight of some steps asks for, by what those need."""
    largest = max(steps, key=lambda needs: (needs.nodes, needs.gpus))
    return Resources(MINUTES, 4000, gpus=largest.gpus, nodes=min(largest.nodes, MOST_NODES), exclusive=False)


def check_nodes(folder: Path, steps: Iterable[Resources]) -> str:
    """The preflight of some steps by itself."""
    import_extra("snakemake_executor_plugin_slurm", "lab", "the preflight")
    return preflight(folder, needs_of(steps), read_site(), "lorafusion-preflight")


def check_nodes_first(folder: Path, steps: Iterable[Resources], name: str) -> None:
    """The preflight of a workflow that is about to submit steps, where there is a point in it: for GPUs or several
    nodes, unless it has passed in this folder, or the site wants none. A cluster that is only busy is no reason not to
    begin. steps: what they need; name: of the workflow's jobs."""
    needs, site, passed = needs_of(steps), read_site(), folder / PASSED
    record = f"{request_of(needs, site)} {sys.executable}\n"
    if not site.preflight or not (needs.gpus or needs.nodes > 1):
        return
    if passed.exists() and passed.read_text() == record:
        return
    try:
        print(preflight(folder, needs, site, name), flush=True)
        write(passed, record)
    except NotStartedError as error:
        if not error.is_busy:
            raise
        print(f"{error}; the workflow begins without it", flush=True)


def preflight(folder: Path, needs: Resources, site: Site, name: str) -> str:
    """Run the job and say in a line that all holds; raises `UserError` with all that does not. folder: of the results;
    name: the job's."""
    request = request_of(needs, site)
    require_admitted({"preflight": request})
    folder.mkdir(parents=True, exist_ok=True)
    log = folder.absolute() / "logs" / "preflight.log"
    log.parent.mkdir(exist_ok=True)
    log.unlink(missing_ok=True)
    with tempfile.TemporaryDirectory(prefix=".preflight-", dir=folder.absolute(), ignore_cleanup_errors=True) as path:
        place = Path(path)
        (place / LOGIN).touch()
        begin = time.monotonic()
        comment = f"preflight {place.name}"
        names = {"run_uuid": name, "comment_str": comment, "slurm_logfile": log, "workdir": Path.cwd()}
        before = time.time()
        job = submit(sbatch_words(request, **names), script_of(place, needs, site), name, comment)
        try:
            seen = Seen(Job(job, "PENDING"), before)
            _watch(seen, place, log, needs.nodes, 60.0 * (site.preflight or MINUTES))
        finally:
            slurm("scancel", "--quiet", job)
    problems = problems_of(seen, needs.nodes)
    if problems:
        raise UserError(*(f"preflight: {problem}" for problem in problems), f"preflight: see {log}")
    gpus = f" with {needs.gpus} GPUs each" if needs.gpus else ""
    imports = ", ".join(f"{node.torch:.0f} s on {name}" for name, node in seen.nodes.items())
    took = f"after {time.monotonic() - begin:.0f} s; importing torch took {imports}"
    return f"preflight: {seen.state.nodes}{gpus}: ready, {took}"


def script_of(place: Path, needs: Resources, site: Site) -> str:
    """The job's script: the probe, once on each node, with what the site has each job do first."""
    settings = json.dumps({"place": str(place), "nodes": needs.nodes, "gpus": needs.gpus})
    words = ["srun", f"--nodes={needs.nodes}", f"--ntasks={needs.nodes}", "--ntasks-per-node=1", "--kill-on-bad-exit=0",
             "--wait=0", "sh", "-c", ON_EACH_NODE, "sh", sys.executable, settings]  # fmt: skip
    return f"#!/bin/bash\n{site.shell}{shlex.join(words)}\n"


@dataclass
class Node:
    """What a node has said. clock: its own, at the begin; torch: the seconds that it took to import it."""

    clock: float | None = None
    doing: str = ""
    torch: float = 0.0
    problems: list[str] = field(default_factory=list)
    ended: bool = False


def read_log(log: str) -> dict[str, Node]:
    """What the nodes have said, by their names."""
    nodes: dict[str, Node] = {}
    for name, kind, text in re.findall(rf"^{re.escape(MARK)}(\S+) (\w+): ?(.*)\n", log, re.MULTILINE):
        node = nodes.setdefault(name, Node())
        match kind:
            case probe.CLOCK:
                node.clock = float(text)
            case probe.DOING:
                node.doing = text
            case probe.TORCH:
                node.torch = float(text)
            case probe.PROBLEM:
                node.problems.append(text)
            case probe.ENDED:
                node.ended = True
    return nodes


@dataclass
class Seen:
    """What is seen of the job. before: the login node's clock when the job did not run yet; spans: for each node,
    that and when it was first heard of; files: that the nodes have made; log: None where none has come."""

    state: Job
    before: float
    spans: dict[str, tuple[float, float]] = field(default_factory=dict)
    nodes: dict[str, Node] = field(default_factory=dict)
    files: list[str] = field(default_factory=list)
    log: str | None = None

    def look(self, place: Path, log: Path) -> None:
        self.files = [file.name for file in place.iterdir()]
        if log.exists():
            self.log = log.read_text(errors="replace")
            self.nodes = read_log(self.log)
            for name in self.nodes:
                self.spans.setdefault(name, (self.before, time.time()))

    @property
    def has_problems(self) -> bool:
        return any(node.problems for node in self.nodes.values())

    def has_all_of(self, nodes: int) -> bool:
        """Have so many nodes ended, and are their files here?"""
        files = sum(file.startswith(SEEN) for file in self.files)
        return files == nodes and sum(node.ended for node in self.nodes.values()) == nodes


def _watch(seen: Seen, place: Path, log: Path, nodes: int, seconds: float) -> None:
    """Look at a job until it has ended, or something does not hold, and say what it waits for. Raises `UserError` where
    the job does not begin in so many seconds, or not end."""
    begin, pause, limit, printed, hosts = time.monotonic(), LOOK_SECONDS, seconds, "", []
    over = math.inf  # when the look ends, on the monotonic clock
    while True:
        now, clock = time.monotonic(), time.time()
        seen.state = state = job_state(seen.state.id)
        seen.look(place, log)
        if state.waits:
            seen.before = clock
            if now - begin > limit or never_passes(state.reason):
                raise NotStartedError(state.id, state.reason, now - begin)
        elif not state.has_ended:
            hosts, pause = hosts or slurm("scontrol", "show", "hostnames", state.nodes).split(), LOOK_SECONDS
            limit = max(limit, seconds + 60.0 * (MINUTES + 2))  # a node that is lost may keep it from ending
            if now - begin > limit:
                raise UserError(
                    f"preflight: job {state.id} on {state.nodes} is {state.state} and does not end; see sinfo -R"
                )
        over = min(over, now + (OTHERS_SECONDS if seen.has_problems else SHOW_SECONDS if state.has_ended else math.inf))
        if now >= over or (state.has_ended and (seen.has_problems or seen.has_all_of(nodes))):
            return
        line = _statement(seen, hosts, seconds)
        if line not in ("", printed):
            print(f"preflight: {line}", flush=True)
            printed = line
        time.sleep(pause)
        pause = min(1.5 * pause, 15.0)


def _statement(seen: Seen, hosts: Sequence[str], seconds: float) -> str:
    """What is waited for."""
    state = seen.state
    if state.waits:
        reason = "" if state.reason in ("", "None") else f", as Slurm says: {state.reason}"
        return f"job {state.id} waits in the queue, for at most {seconds / 60:g} minutes{reason}"
    if state.has_ended:
        return ""
    silent = [f"waiting for {host}" for host in hosts if host not in seen.nodes]
    doing = [f"{name} {node.doing}" for name, node in seen.nodes.items() if not node.ended and node.doing]
    return f"job {state.id} runs on {state.nodes}: {'; '.join([*doing, *silent])}" if doing or silent else ""


class NotStartedError(UserError):
    """A preflight whose job has waited for too long. is_busy: as on a cluster that others use."""

    def __init__(self, job: str, reason: str, seconds: float) -> None:
        self.is_busy = not never_passes(reason)
        advice = "LORAFUSION_SLURM_PREFLIGHT says how many minutes to wait (0: no preflight)"
        if not self.is_busy:
            advice = "it will never start; does the site file ask for what the cluster has?"
        super().__init__(f"preflight: job {job} did not start in {seconds:.0f} s, as Slurm says: {reason}; {advice}")


def problems_of(seen: Seen, nodes: int) -> list[str]:
    """What does not hold on so many nodes."""
    state = seen.state
    where = f"job {state.id} on {state.nodes or 'no node'} ended as {state.state}"
    if seen.log is None:
        return [f"{where} and its log has not come; do the nodes see the folder of the results?"]
    problems = []
    for name, node in seen.nodes.items():
        problems += [f"{name}: {problem}" for problem in node.problems]
        before, after = seen.spans[name]
        behind, ahead = (before - node.clock, node.clock - after) if node.clock is not None else (0.0, 0.0)
        if max(behind, ahead) > CLOCK_SECONDS:
            off = f"{behind:.0f} s behind" if behind > 0 else f"{ahead:.0f} s ahead of"
            problems.append(f"{name}: its clock is at least {off} the login node's; set them by NTP (chrony)")
        if not node.problems and node.ended and f"{SEEN}{name}" not in seen.files:
            problems.append(f"{name}: what it writes into the results is not seen here; is the folder shared?")
    ended = sum(node.ended for node in seen.nodes.values())
    if ended < nodes and not problems:
        last = (seen.log.strip().splitlines() or ["nothing"])[-1]
        doing = [f"{name} {node.doing}" for name, node in seen.nodes.items() if not node.ended]
        end = "; ".join(doing) if doing else f"the log ends: {last}"
        problems.append(f"{where}; {nodes - ended} of {nodes} nodes have not answered; {end}")
    return problems
