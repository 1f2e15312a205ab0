"""Before a sweep: a small Slurm job that finds out in a minute what would fail each cell after hours in the queue.

It has as many nodes as the largest cell, at most two, with that cell's GPUs. What does not hold is a line that says on
which node, and what to do.
"""

from __future__ import annotations

import json
import re
import shlex
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

from lorafusion.core.files import write
from lorafusion.core.plugins import import_extra
from lorafusion.core.schema import UserError
from lorafusion.lab.cluster.admission import require_admitted, sbatch_words
from lorafusion.lab.cluster.probe import CLOCK_SECONDS, ENDED, LOGIN, MARK, SEEN
from lorafusion.lab.cluster.queue import JobState, job_state, slurm
from lorafusion.lab.cluster.request import Resources, request_of
from lorafusion.lab.cluster.site import Site, read_site

PASSED = ".preflight"  # a file: what has passed
MINUTES = 5  # that the job may take once it runs
MOST_NODES = 2
OTHERS_SECONDS = 20  # that the other nodes have once one has ended: they would wait for it
LOOK_SECONDS = 2.0
SHOW_SECONDS = 60.0  # that a file of a node may take to be seen here
# Why a job waits that will never run. All other reasons, of which Slurm has dozens, are those of a busy cluster.
NEVER = re.compile("PartitionConfig|PartitionNodeLimit|PartitionTimeLimit|BadConstraints|Invalid.*|AccountNotAllowed|"
                   "QOSNotAllowed|ReservationDeleted|.*PerJob.*")  # fmt: skip
# On each node; `$1` is the workflow's Python, `$2` what the probe is given.
ON_EACH_NODE = f"""
say() {{ echo "{MARK}${{SLURMD_NODENAME:-$(hostname)}}: $1"; }}
if ! [ -x "$1" ]; then
    say "no $1; install where all nodes see it"
elif ! error=$("$1" -c 'import lorafusion.lab.cluster.probe' 2>&1); then
    say "$1 cannot import lorafusion ($(echo "$error" | tail -n 1)); install where all nodes see it"
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
        begin = time.time()
        options = [f"--job-name={name}", "--comment=preflight", f"--output={log}", f"--chdir={Path.cwd()}"]
        words = [*sbatch_words(request), *options]  # of an option that is given twice the last counts
        job = slurm(*words, text=script_of(place, needs, site)).strip().partition(";")[0]
        try:
            state = _wait(job, 60.0 * site.preflight)
        finally:
            slurm("scancel", "--quiet", job)
        _wait_for_files(log, place, needs.nodes)
        text = log.read_text(errors="replace") if log.exists() else None
        seen = [file.name for file in place.iterdir()]
    problems = problems_of(text, seen, needs.nodes, state, (begin, time.time()))
    if problems:
        raise UserError(*(f"preflight: {problem}" for problem in problems), f"preflight: see {log}")
    gpus = f" with {needs.gpus} GPUs each" if needs.gpus else ""
    return f"preflight: {needs.nodes} nodes{gpus} ({state.nodes}) are ready, after {time.time() - begin:.0f} s"


def script_of(place: Path, needs: Resources, site: Site) -> str:
    """The job's script: the probe, once on each node, with what the site has each job do first."""
    settings = json.dumps({"place": str(place), "nodes": needs.nodes, "gpus": needs.gpus})
    words = ["srun", f"--nodes={needs.nodes}", f"--ntasks={needs.nodes}", "--ntasks-per-node=1", "--kill-on-bad-exit=0",
             f"--wait={OTHERS_SECONDS}", "sh", "-c", ON_EACH_NODE, "sh", sys.executable, settings]  # fmt: skip
    return f"#!/bin/bash\n{site.shell}{shlex.join(words)}\n"


def _wait(job: str, seconds: float) -> JobState:
    """The state of a job that has ended. Raises `UserError` where it does not begin in so many seconds, or not end."""
    begin, pause, limit = time.monotonic(), LOOK_SECONDS, seconds
    while not (state := job_state(job)).has_ended:
        waited = time.monotonic() - begin
        if state.waits and (waited > limit or NEVER.fullmatch(state.reason)):
            raise NotStartedError(job, state.reason, waited)
        if not state.waits:
            limit = max(limit, seconds + 60.0 * (MINUTES + 2))  # a node that is lost may keep it from ending
            if waited > limit:
                raise UserError(
                    f"preflight: job {job} on {state.nodes} is {state.state} and does not end; see sinfo -R"
                )
        time.sleep(pause)
        pause = min(1.5 * pause, 15.0)
    return state


class NotStartedError(UserError):
    """A preflight whose job has waited for too long. is_busy: as on a cluster that others use."""

    def __init__(self, job: str, reason: str, seconds: float) -> None:
        self.is_busy = not NEVER.fullmatch(reason)
        advice = "LORAFUSION_SLURM_PREFLIGHT says how many minutes to wait (0: no preflight)"
        if not self.is_busy:
            advice = "it will never start; does the site file ask for what the cluster has?"
        super().__init__(f"preflight: job {job} did not start in {seconds:.0f} s, as Slurm says: {reason}; {advice}")


def _wait_for_files(log: Path, place: Path, nodes: int) -> None:
    """What a node has written may be seen here late, as through NFS."""
    end = time.monotonic() + SHOW_SECONDS
    while time.monotonic() < end:
        if log.exists() and sum(file.name.startswith(SEEN) for file in place.iterdir()) == nodes:
            return
        if log.exists() and len(_lines(log.read_text(errors="replace"))[0]) > 0:
            return
        time.sleep(LOOK_SECONDS)


def problems_of(log: str | None, seen: list[str], nodes: int, state: JobState, times: tuple[float, float]) -> list[str]:
    """What does not hold. log: of the job, None where none has come; seen: names of files that the nodes have made;
    times: before the job was submitted and after it had ended, by the login node's clock."""
    where = f"job {state.id} on {state.nodes or 'no node'} ended as {state.state}"
    if log is None:
        return [f"{where} and its log has not come; do the nodes see the folder of the results?"]
    problems, ends = _lines(log)
    for node, end in ends.items():
        early, late = times[0] - end, end - times[1]
        if max(early, late) > CLOCK_SECONDS:
            off = f"{early:.0f} s behind" if early > 0 else f"{late:.0f} s ahead of"
            problems.append(f"{node}: its clock is {off} the login node's; set them by NTP (chrony)")
        if f"{SEEN}{node}" not in seen and not any(problem.startswith(f"{node}: ") for problem in problems):
            problems.append(f"{node}: what it writes into the results is not seen here; is the folder shared?")
    if len(ends) < nodes and not problems:
        last = (log.strip().splitlines() or ["nothing"])[-1]
        problems.append(f"{where}; {nodes - len(ends)} of {nodes} nodes have not answered; the log ends: {last}")
    return problems


def _lines(log: str) -> tuple[list[str], dict[str, float]]:
    """What the nodes found, and when each was done, by its own clock."""
    problems, ends = [], {}
    for node, text in re.findall(rf"^{re.escape(MARK)}(\S+): (.*)$", log, re.MULTILINE):
        if text.startswith(ENDED):
            ends[node] = float(text.removeprefix(ENDED))
        else:
            problems.append(f"{node}: {text}")
    return problems, ends
