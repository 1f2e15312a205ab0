"""The slurm profile on a real, if toy, Slurm of two nodes on this machine: `make slurm-test`."""

import pytest

from tests.slurm.toy import Workflow, answer, lives

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


def test_the_workflow_runs_through_the_slurm_profile(tmp_path):
    workflow, before = Workflow(tmp_path, "suite"), len(lives())
    status, said = workflow.start().end(1100)
    assert status == 0, said[-8000:]

    submitted = lives()[before:]
    assert submitted, "no job went through Slurm"
    assert {job.state for job in submitted} == {"COMPLETED"}

    rows = workflow.rows()
    assert {row["status"] for row in rows} == {"ok"}, [row for row in rows if row["status"] != "ok"]
    assert any(float(row["gpus"] or 0) == 2 for row in rows), "no cell ran with two processes"
    assert any(float(row["gpus"] or 0) == 4 for row in rows), "no cell ran on two nodes"
    assert (workflow.results / "report.html").stat().st_size > 0
    assert not list(workflow.checkout.rglob("PWNED"))
