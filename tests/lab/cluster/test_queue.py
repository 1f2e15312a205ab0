"""What Slurm's commands answer, and that no answer is never taken for an empty queue."""

from __future__ import annotations

import os

import pytest

from lorafusion.core.schema import UserError
from lorafusion.lab.cluster import queue
from lorafusion.lab.cluster.queue import Job, cancel, jobs_here, jobs_named, read_jobs

ANSWER = """\
8|PENDING||(Resources)|run model~tiny_gpus~4_system~lorafusion_repeat~1
2|RUNNING|node[1-2]|None|check_lossless
12|PENDING||Priority|a|b
12|RUNNING|node3|None|a|b
13|COMPLETING|node1|None|(null)
slurm_load_jobs: a line that is no job
"""


def test_jobs_are_read_each_once_with_what_they_make():
    jobs = read_jobs(ANSWER)
    assert [job.id for job in jobs] == ["8", "2", "12", "13"]
    assert [job.waits for job in jobs] == [True, False, False, False]
    assert jobs[1] == Job("2", "RUNNING", "node[1-2]", "None", "check_lossless")
    assert [job.statement for job in jobs] == [
        "8 (run model~tiny_gpus~4_system~lorafusion_repeat~1)",
        "2 (check_lossless)",
        "12 (a|b)",
        "13",
    ]


def test_only_this_users_jobs_of_the_names_are_asked_for(slurm, monkeypatch):
    slurm.program("squeue", 'echo "7|RUNNING|n|None|$SQUEUE_FORMAT"')
    monkeypatch.setenv("SQUEUE_FORMAT", "a user's own")
    assert jobs_named([]) == []
    assert slurm.calls("squeue") == []
    assert jobs_named(["a", "b"]) == [Job("7", "RUNNING", "n", "None", "")]
    (call,) = slurm.calls("squeue")
    assert call.startswith(f"--user={os.getuid()} --name=a,b ")


def test_an_array_or_no_job_is_cancelled_by_its_id(slurm):
    slurm.queue()
    cancel([])
    assert slurm.calls("scancel") == []
    cancel(read_jobs(ANSWER)[:2])
    assert slurm.calls("scancel") == ["--quiet 8 2"]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("echo 'squeue: error: Unable to contact slurm controller' >&2; exit 1", "squeue: Unable to contact slurm con"),
        ("exit 3", "squeue: status 3"),
        ("exec sleep 30", r"squeue: no answer in 0 s; is its controller up"),
    ],
)
def test_no_answer_is_an_error_of_one_line(slurm, monkeypatch, body, message):
    slurm.program("squeue", body)
    with pytest.raises(UserError, match=f"^{message}"):
        queue.slurm("squeue", seconds=0.3 if "sleep" in body else 30)


def test_letters_that_are_no_utf8_end_nothing(slurm):
    """An administrator may have written them."""
    slurm.program("squeue", r"printf 'Wartung f\374r alle\n' >&2; exit 1")
    with pytest.raises(UserError, match="^squeue: Wartung f\ufffdr alle$"):
        queue.slurm("squeue")


def test_a_machine_without_slurm_says_so(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=r"squeue: cannot be run \(No such file or directory\); expected Slurm's comm"):
        jobs_named(["a"])


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("echo '7 of me: 8 CPUs, gres/gpu:8'; echo '78 of alice: 1 CPUs, N/A'", "78 of alice: 1 CPUs, N/A"),
        ("echo '7 of me: 8 CPUs, gres/gpu:8'", ""),
        ("exit 1", None),
    ],
    ids=["beside another", "alone", "no answer"],
)
def test_a_run_knows_what_other_jobs_are_on_its_nodes(slurm, answer, expected):
    slurm.program("squeue", answer)
    assert jobs_here({}) is None
    assert slurm.calls("squeue") == [], "outside of a job nobody is asked"
    assert jobs_here({"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "toy[1-2]"}) == expected
    assert "--nodelist=toy[1-2]" in slurm.calls("squeue")[0]
    assert jobs_here({"SLURM_JOB_ID": "7", "SLURMD_NODENAME": "toy1"}) == expected, "as Snakemake's plugin leaves it"
    assert "--nodelist=toy1" in slurm.calls("squeue")[1]
