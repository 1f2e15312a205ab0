"""How a run ended, by what its processes have left behind: `PRECEDENCE` says what is believed before what."""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from lorafusion.core.files import write
from lorafusion.launch.heartbeat import FAILED, Seen, Watch
from lorafusion.launch.outcome import Outcome
from lorafusion.launch.rendezvous import Meeting, wait_for

NODES_SECONDS = 20  # that other nodes may take to say how their processes ended
NODE_FAILURE = "failure-on-node-{}.json"
# In what gloo, NCCL and the store say when a process at the other end is gone.
BROKEN_CONNECTION = re.compile("Connection|Broken pipe|Socket closed")
OUT_OF_MEMORY = ", often the host's out-of-memory killer"


@dataclass(frozen=True)
class Evidence:
    """What is there once a run's processes have ended. limit: which one of time has ended them; code: the exit status
    of this node's first; interrupted: the signal that asked them to stop; failures: what they have said; died: the
    first that ended without a word; report: of rank 0."""

    limit: str = ""
    code: int = 0
    interrupted: str = ""
    failures: tuple[Outcome, ...] = ()
    died: Seen | None = None
    report: dict[str, Any] | None = None

    @property
    def signal(self) -> str:
        return signal.Signals(-self.code).name if self.code < 0 else ""

    @property
    def is_killed(self) -> bool:
        """What its processes say then, they say of that."""
        return self.signal == "SIGKILL"

    @property
    def failure(self) -> Outcome | None:
        """That explains most: an exhausted memory explains the others' broken connections."""
        return min(self.failures, key=lambda failure: failure.status != "oom", default=None)

    @property
    def cause(self) -> Outcome | None:
        """A failure that is no consequence of another one's end."""
        causes = tuple(failure for failure in self.failures if not BROKEN_CONNECTION.search(failure.note))
        return Evidence(failures=causes).failure


def silent_death(evidence: Evidence) -> Outcome:
    name, died = evidence.signal, evidence.died
    end = f"ended by {name}" if name else "ended without a word, as by SIGKILL"
    hint = OUT_OF_MEMORY if name in ("", "SIGKILL") else ""
    return Outcome("crash", f"{died.place}, {died.doing}: {end}{hint}", killed=evidence.is_killed)


def death_by_signal(evidence: Evidence) -> Outcome:
    hint = OUT_OF_MEMORY if evidence.is_killed else ""
    return Outcome("crash", f"ended by {evidence.signal}{hint}", killed=evidence.is_killed)


class Rule(NamedTuple):
    """name: what is there; holds: is it; outcome: what follows from it."""

    name: str
    holds: Callable[[Evidence], Any]
    outcome: Callable[[Evidence], Outcome]


# The first that holds decides.
PRECEDENCE = (
    Rule("a limit", lambda its: its.limit, lambda its: Outcome("timeout", its.limit)),
    Rule("a cause", lambda its: its.cause and not its.is_killed, lambda its: its.cause),
    Rule("a cause without room for its report", lambda its: its.died and its.died.doing.startswith(FAILED),
         lambda its: Outcome("crash", its.died.doing.removeprefix(FAILED))),
    Rule("a silent death", lambda its: its.died, silent_death),
    Rule("broken connections", lambda its: its.failure and not its.is_killed, lambda its: its.failure),
    Rule("a signal", lambda its: its.signal, death_by_signal),
    Rule("no report", lambda its: its.code or its.report is None,
         lambda its: Outcome("crash", f"ended with status {its.code} and left no report; its log says more")),
    Rule("part of a run", lambda its: not its.report.get("finished", True),
         lambda its: Outcome("stopped", f"by {its.interrupted or 'request'}, after saving a checkpoint", its.report)),
    Rule("a whole run", lambda its: True, lambda its: Outcome("ok", report=its.report)),
)  # fmt: skip


def judged(evidence: Evidence) -> Outcome:
    """How a run ended."""
    done = next(rule.outcome(evidence) for rule in PRECEDENCE if rule.holds(evidence))
    return with_its_report(done, evidence.report or {})


def with_its_report(done: Outcome, report: dict[str, Any]) -> Outcome:
    """The outcome of a run that failed after it had reported is a good one: the report names the part that is `pending`
    (`engine.task.Process.keep`), and says of it why it is unknown."""
    if "pending" not in report or done.status in ("ok", "stopped"):
        return done
    rest = {name: value for name, value in report.items() if name != "pending"}
    return Outcome("ok", report=rest | {report["pending"]: {"unknown": done.note}})


def judge(
    reports: Path, end: int | str, watch: Watch, meeting: Meeting | None = None, interrupts: Sequence[str] = ()
) -> Outcome:
    """How a run ended, also by what the launchers of other nodes know: here connections broke, and there a process was
    killed that left no word. reports: its folder; end: the exit status of this node's processes, or the limit that
    ended them; interrupts: the names of signals that came."""
    evidence = evidence_of(reports, end, watch, interrupts)
    done = judged(evidence)
    if meeting and meeting.rank and evidence.code and reports.exists():
        write(reports / NODE_FAILURE.format(meeting.rank), json.dumps({"status": done.status, "message": done.note}))
    if meeting and not meeting.rank and BROKEN_CONNECTION.search(done.note):
        wait_for(reports, {NODE_FAILURE.format(node) for node in range(1, meeting.nodes)}, NODES_SECONDS)
        return judged(evidence_of(reports, end, watch, interrupts))
    return done


def evidence_of(reports: Path, end: int | str, watch: Watch, interrupts: Sequence[str]) -> Evidence:
    """What stands in the folder of a run; the rest as `judge`."""
    failures = [json.loads(path.read_text()) for path in sorted(reports.glob("failure-*.json"))]
    path = reports / "report.json"
    report = json.loads(path.read_text()) if path.exists() else None
    # A signal that torchrun got too is a failure to it, however orderly its processes ended.
    code = 0 if isinstance(end, str) or (interrupts and report is not None) else end
    return Evidence(
        limit=end if isinstance(end, str) else "",
        code=code,
        interrupted=interrupts[-1] if interrupts else "",
        failures=tuple(Outcome(failure["status"], failure["message"]) for failure in failures),
        died=watch.first_dead(),
        report=report,
    )
