"""What happens to jobs on a real cluster: Snakemake is killed, a job is put back into the queue, a node is lost."""

import json
import os
from collections import defaultdict
from typing import NamedTuple

import pytest

from lorafusion.lab.cluster.left_jobs import RECORD
from tests.slurm.toy import Job, Workflow, answer, cluster, lives, queue, wait_until

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(600), pytest.mark.usefixtures("two_nodes")]


class Survived(NamedTuple):
    """A workflow of two cells that both take both nodes. lives: of its jobs, without what the preflight asked. foreign:
    how another user's job of the same name stood in the end."""

    workflow: Workflow
    status: int
    said: str
    lives: list[Job]
    foreign: str


@pytest.fixture(scope="module")
def survived(two_nodes, tmp_path_factory):
    """Both cells train when Snakemake is killed. It is started again; both train again when one cell's job is put back
    into the queue, and then a node is lost with the other's."""
    workflow, before = Workflow(tmp_path_factory.mktemp("survived"), "two-nodes"), len(lives())
    table = "results/two-nodes/measurements.csv"
    first = workflow.start(table)
    first_met = two_train(workflow)
    first.kill()
    foreign = submit_as_another(json.loads((workflow.results / RECORD).read_text())["run"])
    second = workflow.start(table)
    two_train(workflow, but=first_met)
    requeued, lost = sorted(queue().keys() - {foreign}, key=int)
    answer("scontrol", "requeue", requeued)
    wait_until(lambda: queue()[requeued] == "PENDING", 30, f"job {requeued} waits again")
    assert queue()[lost] == "RUNNING"
    cluster("lose", "toy2")
    cluster("return", "toy2")
    status, said = second.end(300)
    stands = queue().get(foreign, "ended")
    answer("scancel", foreign)
    return Survived(workflow, status, said, [job for job in lives()[before:] if job.what.startswith("run ")], stands)


def submit_as_another(name):
    """Submit a job of this name as another user; returns its id."""
    words = ["--parsable", "--uid=nobody", "--account=lab", "--partition=long", "--mem=10", f"--job-name={name}"]
    return answer("sbatch", *words, "--output=/dev/null", "--wrap=sleep 600", cwd="/").strip()


def two_train(workflow, but=frozenset()):
    """Wait until the processes of two cells have met; returns the files in which they agreed where. but: those of
    earlier attempts."""
    met = set()

    def look():
        met.update(path for path in workflow.results.rglob("*.reports-*/**/rendezvous") if path not in but)
        return len(met) == 2

    wait_until(look, 240, "two cells have begun to train")
    return met


def test_both_cells_end_well(survived):
    assert survived.status == 0, survived.said[-8000:]
    rows = survived.workflow.rows()
    assert len({row["cell"] for row in rows}) == 2
    assert {row["status"] for row in rows} == {"ok"}, rows
    assert not list(survived.workflow.results.rglob("*.reports-*")), "folders of attempts were left"
    assert not queue()


def test_the_jobs_of_another_user_are_left_alone(survived):
    assert survived.foreign == "RUNNING"


def test_a_resume_leaves_no_job_of_the_snakemake_that_was_killed(survived):
    # A job also ends itself, as soon as it sees that its Snakemake has gone.
    assert {job.state.split()[0] for job in survived.lives[:2]} <= {"CANCELLED", "FAILED"}, survived.lives
    assert "2 Slurm jobs of an earlier workflow" in survived.said


def test_a_job_put_back_and_one_that_lost_its_node_run_again(survived):
    states = [job.state for job in survived.lives]
    assert sorted(states[2:4]) == ["NODE_FAIL", "REQUEUED"], survived.lives
    assert states[4:] == ["COMPLETED"] * 2, survived.lives


def test_no_cell_runs_twice_at_once(survived):
    cells = defaultdict(list)
    for job in survived.lives:
        cells[job.what].append((job.start, job.end))
    assert len(cells) == 2
    for spans in cells.values():
        spans.sort()
        assert all(end <= start for (_, end), (start, _) in zip(spans, spans[1:], strict=False)), spans


def test_the_cells_ran_on_the_same_nodes_at_once(survived):
    begin, end = max(job.start for job in survived.lives[-2:]), min(job.end for job in survived.lives[-2:])
    assert begin < end


def test_each_run_says_what_ran_beside_it_on_all_its_nodes(survived):
    """The jobs on all its nodes are asked for by the first."""
    results = [json.loads(path.read_text()) for path in survived.workflow.results.rglob("repeat~*.json")]
    origins = [result["provenance"] for result in results if "other_nodes" in result["provenance"]]
    assert [len(origin["other_nodes"]) for origin in origins] == [1, 1]
    assert any(" of root: " in origin["other_jobs"] for origin in origins), "the later one saw the other"
    assert any("beside other Slurm jobs (" in row["note"] for row in survived.workflow.rows())


def test_a_run_that_crashed_is_tried_again_alone(survived):
    """And the efficiency report lies with the results."""
    workflow, before = survived.workflow, len(lives())
    first, second = sorted((workflow.results / "runs").rglob("repeat~*.json"))
    times = os.stat(first).st_mtime_ns, os.stat(second).st_mtime_ns
    first.write_text(first.read_text().replace('"status": "ok"', '"status": "crash"', 1))
    os.utime(first, ns=(times[0], times[0]))
    words = ["--slurm-efficiency-report", "results/two-nodes/measurements.csv"]
    status, said = workflow.start(*words, settings=["again=true"]).end(300)
    assert status == 0, said[-8000:]
    (job,) = lives()[before:]
    assert job.state == "COMPLETED"
    assert {row["status"] for row in workflow.rows()} == {"ok"}
    assert second.stat().st_mtime_ns == times[1]
    (report,) = workflow.results.glob("efficiency_report_*.csv")
    assert f"{job.id}.0" in report.read_text()
    assert not list(workflow.checkout.glob("efficiency_report_*"))
