"""The slurm profile on a real, if toy, Slurm of two nodes on this machine: `make slurm-test`."""

import json
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.slurm.toy import Job, Workflow, answer, lives

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(1200), pytest.mark.usefixtures("two_nodes")]


def test_a_job_of_two_processes_runs_on_two_nodes(tmp_path):
    output = tmp_path / "out.txt"
    answer(
        *["sbatch", "--account=lab", "--wait", "--nodes=2", "--ntasks=2", f"--output={output}"],
        input="#!/bin/sh\nsrun --label sh -c 'echo rank $SLURM_PROCID of $SLURM_NTASKS on $SLURMD_NODENAME'\n",
        cwd=tmp_path,
    )
    assert sorted(output.read_text().splitlines()) == [
        "0: rank 0 of 2 on toy1",
        "1: rank 1 of 2 on toy2",
    ]


# The first of three runs fails. The job is put back into the queue when the third begins: then the second is there.
BEFORE = """
n=$(cat {0} 2>/dev/null || true); echo x$n >{0}
case $n in '' | xxx) exit 1 ;; xx) scontrol requeue $SLURM_JOB_ID; sleep 60 ;; esac
"""


def test_steps_share_a_job_one_by_one_and_the_workflow_ends_well(tmp_path):
    """The first of three runs that share a job fails: the others are made, once each, though the job begins anew. A
    second start makes that one, and the rest."""
    workflow, begin = Workflow(tmp_path, "suite"), now()
    folder = "results/slurm-test/runs/model~tiny/workload~xsum/gpus~2/batch~4"
    targets = [f"{folder}/system~{system}/repeat~1.json" for system in ("lorafusion", "mlora", "megatron-pp")]
    before = BEFORE.format(tmp_path / "shells").strip()
    status, output = workflow.start(*targets, LORAFUSION_SLURM_BEFORE=before, LORAFUSION_SLURM_PREFLIGHT="0").end(600)
    assert status != 0, output[-8000:]
    assert "3 steps in 1 Slurm jobs" in output
    (failed,) = [path for path in targets if not (workflow.checkout / path).exists()]
    assert f"error: not made: {failed.partition('slurm-test/')[2]} (see " in output, output[-8000:]
    others = [times(workflow.checkout / path) for path in targets if path != failed]
    assert [job.state for job in since(begin)] == ["REQUEUED", "FAILED"]
    assert since(begin)[-1].what.startswith("run_1_of_1: 3 steps, model~tiny/workload~xsum/")
    assert (tmp_path / "shells").read_text() == "xxxxx\n", "a run that was made was made again"
    (first, second) = sorted(others)
    assert first.end <= second.start, "a run was disturbed by another of its job"

    status, output = workflow.start().end(900)
    assert status == 0, output[-8000:]
    submitted = since(begin)[2:]
    assert {job.state for job in submitted} == {"COMPLETED"}
    assert sum("run" in job.what for job in submitted) == 2, submitted  # the one that failed, and that on two nodes
    assert [times(workflow.checkout / path).start for path in targets if path != failed] == [
        span.start for span in others
    ]

    rows = workflow.rows()
    assert {row["status"] for row in rows} == {"ok"}, [row for row in rows if row["status"] != "ok"]
    assert any(float(row["gpus"] or 0) == 2 for row in rows), "no cell ran with two processes"
    assert any(float(row["gpus"] or 0) == 4 for row in rows), "no cell ran on two nodes"
    assert (workflow.results / "report.html").stat().st_size > 0
    assert not list(workflow.checkout.rglob("PWNED"))


def now() -> str:
    return datetime.now().isoformat(timespec="seconds")


def since(begin: str) -> list[Job]:
    """The lives that began later: the end of a job before may be in the accounts late."""
    return [job for job in lives() if begin < job.start < "U"]  # Unknown is the start of a job that never ran


class Span(NamedTuple):
    """When a run began and when it had written its result, in seconds."""

    start: float
    end: float


def times(result: Path) -> Span:
    begin = json.loads(result.read_text())["provenance"]["started_at"]
    return Span(datetime.fromisoformat(begin).timestamp(), result.stat().st_mtime)
