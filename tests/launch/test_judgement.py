"""What is believed of how a run ended: each row of the table alone, and before all that come after it."""

from __future__ import annotations

import json
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from lorafusion.launch.heartbeat import FAILED, Seen, Watch
from lorafusion.launch.judgement import PRECEDENCE, Evidence, judge, judged
from lorafusion.launch.outcome import Outcome
from lorafusion.launch.rendezvous import Meeting

CLOSED = Outcome("crash", "RuntimeError: Connection closed by peer")
CAUSE = Outcome("crash", "ValueError: bad")
MEMORY = Outcome("oom", "CUDA out of memory")
DEAD = Seen("toy2", 7, 3, "rank 1", "step", 0.0)
KILLER = ", often the host's out-of-memory killer"

# Rules, evidence by which they decide, and how.
ROWS = {
    "a limit": (Evidence(limit="not done after 5 s"), Outcome("timeout", "not done after 5 s")),
    "a cause": (Evidence(code=1, failures=(CLOSED, CAUSE)), CAUSE),
    "a cause without room for its report": (
        Evidence(code=1, died=Seen("toy2", 7, 3, "rank 1", f"{FAILED}OSError: no space", 0.0)),
        Outcome("crash", "OSError: no space"),
    ),
    "a silent death": (
        Evidence(code=1, died=DEAD),
        Outcome("crash", f"rank 1, step: ended without a word, as by SIGKILL{KILLER}"),
    ),
    "broken connections": (Evidence(code=1, failures=(CLOSED,)), CLOSED),
    "a signal": (Evidence(code=-signal.SIGSEGV), Outcome("crash", "ended by SIGSEGV")),
    "no report": (Evidence(code=3), Outcome("crash", "ended with status 3 and left no report; its log says more")),
    "part of a run": (
        Evidence(interrupted="SIGTERM", report={"finished": False}),
        Outcome("stopped", "by SIGTERM, after saving a checkpoint", {"finished": False}),
    ),
    "a whole run": (Evidence(report={"losses": {}}), Outcome("ok", report={"losses": {}})),
}


def test_every_rule_has_a_row():
    assert list(PRECEDENCE) == list(ROWS)


@pytest.mark.parametrize("name", ROWS)
def test_a_rule_decides(name):
    evidence, expected = ROWS[name]
    assert next(name for name, rule in PRECEDENCE.items() if rule(evidence)) == name
    assert judged(evidence) == expected


def together(first: Evidence, second: Evidence) -> Evidence:
    """The evidence of both; of what there is once, that of the first."""
    return Evidence(
        limit=first.limit or second.limit,
        code=first.code or second.code,
        interrupted=first.interrupted or second.interrupted,
        failures=first.failures + second.failures,
        died=first.died or second.died,
        report=second.report if first.report is None else first.report,
    )


@pytest.mark.parametrize(("before", "after"), list(zip(ROWS, list(ROWS)[1:], strict=False)))
def test_a_rule_comes_before_the_next(before, after):
    evidence, expected = ROWS[before]
    done = judged(together(evidence, ROWS[after][0]))
    assert (done.status, done.note.partition(":")[0]) == (expected.status, expected.note.partition(":")[0])


@pytest.mark.parametrize(
    ("evidence", "note"),
    [
        (Evidence(code=1, failures=(CAUSE, MEMORY)), MEMORY.note),
        (Evidence(code=1, failures=(Outcome("crash", "writev [127.0.0.1]: Broken pipe"), CAUSE)), CAUSE.note),
        (Evidence(code=1, failures=(Outcome("crash", "RuntimeError: Socket closed"), CAUSE)), CAUSE.note),
        (Evidence(code=0), "ended with status 0 and left no report; its log says more"),
        (Evidence(code=-9, failures=(CAUSE,)), f"ended by SIGKILL{KILLER}"),
        (Evidence(code=-9, failures=(CAUSE,), died=DEAD), f"rank 1, step: ended by SIGKILL{KILLER}"),
        (Evidence(code=-11, died=DEAD), "rank 1, step: ended by SIGSEGV"),
        (Evidence(report={"finished": False}), "by request, after saving a checkpoint"),
    ],
)
def test_the_cause_that_explains_most_is_told(evidence, note):
    done = judged(evidence)
    assert done.note == note
    assert done.killed == ("ended by SIGKILL" in note)


@pytest.mark.parametrize("name", ["a limit", "a cause", "a silent death"])
def test_what_fails_after_the_report_is_unknown(name):
    evidence, expected = ROWS[name]
    done = judged(together(evidence, Evidence(report={"pending": "cost", "losses": {}})))
    assert done == Outcome("ok", report={"losses": {}, "cost": {"unknown": expected.note}})


def test_a_signal_that_torchrun_got_too_is_no_failure(tmp_path):
    (tmp_path / "report.json").write_text('{"finished": false}')
    assert judge(tmp_path, 1, Watch(tmp_path, 1), interrupts=["SIGHUP", "SIGTERM"]).status == "stopped"
    assert judge(tmp_path, 1, Watch(tmp_path, 1)).status == "crash"


def test_a_process_that_was_killed_on_another_node_explains_broken_connections(tmp_path: Path):
    """The first node sees no more than that a connection was closed."""
    closed = {"status": "crash", "message": "rank 0, step: RuntimeError: Connection closed by peer [10.0.0.8]"}
    (tmp_path / "failure-0.json").write_text(json.dumps(closed))
    watches = [Watch(tmp_path, 2) for _ in range(2)]
    watches[1].died = DEAD
    with ThreadPoolExecutor() as pool:
        first = pool.submit(judge, tmp_path, 1, watches[0], Meeting("77.0", "10.0.0.7:20123", 0, 2))
        time.sleep(0.5)
        judge(tmp_path, -signal.SIGKILL, watches[1], Meeting("77.0", "10.0.0.7:20123", 1, 2))
        done = first.result(timeout=10)
    assert done == Outcome("crash", f"rank 1, step: ended by SIGKILL{KILLER}")
