"""How a run ended, by what its processes have left behind: `PRECEDENCE` says what is believed before what."""

import json
import re
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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


def silent_death(evidence: Evidence) -> Outcome | None:
    died, name = evidence.died, evidence.signal
    if died is None:
        return None
    end = f"ended by {name}" if name else "ended without a word, as by SIGKILL"
    hint = OUT_OF_MEMORY if name in ("", "SIGKILL") else ""
    return Outcome("crash", f"{died.place}, {died.doing}: {end}{hint}", killed=evidence.is_killed)


def cause_without_report(evidence: Evidence) -> Outcome | None:
    doing = evidence.died.doing if evidence.died else ""
    return Outcome("crash", doing.removeprefix(FAILED)) if doing.startswith(FAILED) else None


def death_by_signal(evidence: Evidence) -> Outcome | None:
    hint = OUT_OF_MEMORY if evidence.is_killed else ""
    note = f"ended by {evidence.signal}{hint}"
    return Outcome("crash", note, killed=evidence.is_killed) if evidence.signal else None


def missing_report(evidence: Evidence) -> Outcome | None:
    note = f"ended with status {evidence.code} and left no report; its log says more"
    return Outcome("crash", note) if evidence.code or evidence.report is None else None


def report_of_part(evidence: Evidence) -> Outcome | None:
    report = evidence.report or {}
    note = f"by {evidence.interrupted or 'request'}, after saving a checkpoint"
    return None if report.get("finished", True) else Outcome("stopped", note, report)


# What is there, and what follows from it; None where it is not there. The first that follows decides.
PRECEDENCE: dict[str, Callable[[Evidence], Outcome | None]] = {
    "a limit": lambda its: Outcome("timeout", its.limit) if its.limit else None,
    "a cause": lambda its: None if its.is_killed else its.cause,
    "a cause without room for its report": cause_without_report,
    "a silent death": silent_death,
    "broken connections": lambda its: None if its.is_killed else its.failure,
    "a signal": death_by_signal,
    "no report": missing_report,
    "part of a run": report_of_part,
    "a whole run": lambda its: Outcome("ok", report=its.report or {}),
}


def judged(evidence: Evidence) -> Outcome:
    """How a run ended."""
    done = next(outcome for rule in PRECEDENCE.values() if (outcome := rule(evidence)))
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
