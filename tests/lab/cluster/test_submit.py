"""How jobs are submitted: a busy controller is asked again, and no job comes twice."""

from __future__ import annotations

import logging
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from lorafusion.core.schema import UserError
from lorafusion.lab.cluster import submit as module
from lorafusion.lab.cluster.queue import Job
from lorafusion.lab.cluster.request import Resources, request_of
from lorafusion.lab.cluster.site import Site
from lorafusion.lab.cluster.submit import Submitter, comment_of, sbatch_words, submit

ONE_GPU = Resources(8, 64_000, gpus=1)
BUSY = "sbatch: error: Batch job submission failed: Socket timed out on send/recv operation"


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(module, "PAUSE", 0.01)


def sbatch(slurm, *answers: str) -> None:
    """What sbatch says, call by call; the last of it always. Words are errors, a number is a job's id. Jobs can be
    released."""
    slurm.program("scontrol", "true")
    for number, answer in enumerate(answers, 1):
        (slurm.folder / f"answer.{number}").write_text(f"{answer}\n")
    last = f"[ -e answer.$n ] || n={len(answers)}"
    says = 'if grep -q "^[0-9]" answer.$n; then cat answer.$n; else cat answer.$n >&2; exit 1; fi'
    slurm.program("sbatch", f"cat >>scripts\nn=$(wc -l <sbatch.calls)\n{last}\n{says}")


@pytest.mark.parametrize(
    "error",
    [
        BUSY,
        "sbatch: error: Batch job submission failed: Unable to contact slurm controller (connect failure)",
        "sbatch: Slurm temporarily unable to accept job, sleeping and retrying\n"
        "sbatch: error: Batch job submission failed: Resource temporarily unavailable",
        "sbatch: error: slurm_receive_msg: Zero Bytes were transmitted or received",
        "sbatch: error: Batch job submission failed: Slurm backup controller in standby mode",
        'sbatch: error: Munge encode failed: Failed to connect to "/run/munge.socket": Connection refused',
    ],
)
def test_a_busy_controller_is_asked_again(slurm, capsys, error):
    sbatch(slurm, error, error, "7")
    slurm.queue()
    assert submit(["sbatch"], "true", "run-1", "run a") == "7"
    assert len(slurm.calls("sbatch")) == 3
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("Slurm is busy, and is asked again for 15 minutes: sbatch: ")


@pytest.mark.parametrize(
    "error",
    [
        "Invalid account or account/partition combination specified",
        "Invalid partition name specified",
        "AssocMaxSubmitJobLimit",
        "Job violates accounting/QOS policy (job submit limit, user's size and/or time limits)",
        "Requested node configuration is not available",
    ],
)
def test_a_refusal_is_told_at_once(slurm, error):
    sbatch(slurm, f"sbatch: error: Batch job submission failed: {error}")
    with pytest.raises(UserError, match=error.partition("(")[0]):
        submit(["sbatch"], "true", "run-1", "run a")
    assert len(slurm.calls("sbatch")) == 1


def test_a_job_that_was_taken_without_a_word_is_not_submitted_again(slurm):
    sbatch(slurm, BUSY)
    slurm.queue("5|RUNNING|toy1|None|run b", "6|PENDING||Priority|run a")
    assert submit(["sbatch"], "true", "run-1", "run a") == "6"
    assert len(slurm.calls("sbatch")) == 1
    assert "--name=run-1" in slurm.calls("squeue")[0]


def test_a_job_is_held_until_its_id_is_known(slurm):
    """One that a busy controller takes much later does not begin."""
    sbatch(slurm, BUSY, "7")
    slurm.queue()
    assert submit(["sbatch"], "true", "run-1", "run a") == "7"
    assert slurm.calls("sbatch") == ["--hold", "--hold"]
    assert slurm.calls("scontrol") == ["release 7"]


@pytest.mark.parametrize("second", ["", "echo 'Job is no longer pending execution for job 7' >&2; exit 1"])
def test_a_job_is_released_though_the_controller_is_busy(slurm, second):
    sbatch(slurm, "7")
    busy = "echo 'Unable to contact slurm controller' >&2; exit 1"
    slurm.program("scontrol", f"if [ $(wc -l <scontrol.calls) -lt 3 ]; then {busy}; fi\n{second}")
    assert submit(["sbatch"], "true", "run-1", "run a") == "7"
    assert slurm.calls("scontrol") == ["release 7"] * 3


def test_a_job_that_cannot_be_released_is_told(slurm):
    sbatch(slurm, "7")
    slurm.program("scontrol", "echo 'Access/permission denied for job 7' >&2; exit 1")
    with pytest.raises(UserError, match="scontrol: Access/permission denied for job 7"):
        submit(["sbatch"], "true", "run-1", "run a")


def test_where_nobody_says_whether_it_was_taken_it_is_not_submitted_again(slurm):
    sbatch(slurm, BUSY)
    slurm.program(
        "squeue", 'if [ $(wc -l <squeue.calls) -lt 4 ]; then echo "squeue: error: Unable to contact slurm controller" '
        '>&2; exit 1; fi; echo "6|PENDING||Priority|run a"',
    )  # fmt: skip
    assert submit(["sbatch"], "true", "run-1", "run a") == "6"
    assert len(slurm.calls("squeue")) == 4
    assert len(slurm.calls("sbatch")) == 1


def test_a_controller_that_stays_busy_is_given_up(slurm, monkeypatch):
    monkeypatch.setattr(module, "BUSY_SECONDS", 0.2)
    sbatch(slurm, BUSY)
    slurm.queue()
    with pytest.raises(
        UserError, match="Socket timed out.*; Slurm is still busy; start the workflow again. A job that"
    ):
        submit(["sbatch"], "true", "run-1", "run a")
    assert 2 <= len(slurm.calls("sbatch")) <= 6


def test_a_workflow_that_ends_does_not_wait_for_a_busy_controller(slurm, monkeypatch):
    monkeypatch.setattr(module, "PAUSE", 600.0)
    sbatch(slurm, BUSY)
    stopped = threading.Event()
    threading.Timer(0.2, stopped.set).start()
    with pytest.raises(UserError, match="Socket timed out"):
        submit(["sbatch"], "true", "run-1", "run a", stopped)


@pytest.mark.parametrize("answer", ["7", "7;toy", "Submitted batch job 7 on cluster toy", "23 hours are left\n7"])
def test_the_id_is_read_as_clusters_tell_it(slurm, answer):
    slurm.program("scontrol", "true")
    slurm.program("sbatch", f"echo '{answer}'")
    assert submit(["sbatch"], "true", "run-1", "run a") == "7"


def test_an_answer_without_an_id_is_shown(slurm):
    slurm.program("sbatch", "echo 'welcome'")
    with pytest.raises(UserError, match="sbatch: expected the id of a job, found 'welcome'"):
        submit(["sbatch"], "true", "run-1", "run a")


class Step(SimpleNamespace):
    """A job of Snakemake that makes one step."""

    def __init__(self, name: str, priority: int = 0) -> None:
        output = SimpleNamespace(main=f"runs/{name}.json")
        super().__init__(
            name="run",
            wildcards=[name],
            priority=priority,
            output=output,
            jobid=1,
            attempt=1,
            resources=request_of(ONE_GPU, Site()),
        )

    def is_group(self):
        return False


def group(*steps: Step) -> SimpleNamespace:
    """A job that steps share."""
    return SimpleNamespace(
        name="run_1_of_2_run",
        groupid="run_1_of_2",
        jobs=steps,
        is_group=lambda: True,
        jobid=2,
        attempt=1,
        resources=steps[0].resources,
    )


def test_a_comment_says_what_a_job_makes():
    assert comment_of(Step("a/b")) == "run a/b"
    shared = group(Step("late", 1), Step("first", 9), Step("middle", 5))
    assert comment_of(shared) == "run_1_of_2: 3 steps, first to late"
    shared.attempt = 2
    assert comment_of(shared) == "run_1_of_2: 3 steps, first to late, try 2"


class Executor:
    """Snakemake's, as far as it is used: what it is told of each job."""

    def __init__(self, folder: Path) -> None:
        self.run_uuid, self.slurm_logdir = "run-1", folder / "logs"
        settings = SimpleNamespace(requeue=True, qos=None, reservation=None, exclude_failed_nodes=None)
        self.workflow = SimpleNamespace(executor_settings=settings, workdir_init=str(folder))
        self.logger = logging.getLogger(__name__)
        self.said, self.is_shut = {}, False

    def format_job_exec(self, job):
        return f"snakemake {job.name}"

    def shutdown(self):
        self.is_shut = True

    def _report_job_submission_threadsafe(self, info):
        self.said[comment_of(info.job)] = info.external_jobid, info.aux["slurm_logfile"]

    def _report_job_error_threadsafe(self, info, message):
        self.said[comment_of(info.job)] = message


@pytest.fixture
def executor(tmp_path):
    executor = Executor(tmp_path)
    Submitter(executor)
    return executor


def test_a_job_is_submitted_with_its_script_and_its_log(slurm, executor, tmp_path):
    sbatch(slurm, "7", "8")
    executor.run_job(Step("a/b"))
    executor.run_job(group(Step("c"), Step("d")))
    assert executor.said == {
        "run a/b": ("7", tmp_path / "logs" / "run" / "a_b" / "7.log"),
        "run_1_of_2: 2 steps, c to d": ("8", tmp_path / "logs" / "run_1_of_2" / "8.log"),
    }
    first, second = slurm.calls("sbatch")
    assert "--job-name run-1" in first
    assert "--comment run a/b" in first
    assert f"-D {tmp_path}" in first
    assert "--requeue" in first
    assert "--comment run_1_of_2: 2 steps, c to d" in second
    assert all(path.parent.is_dir() for _, path in executor.said.values()), "Slurm makes no folders"
    assert (slurm.folder / "scripts").read_text() == "#!/bin/sh\nsnakemake run#!/bin/sh\nsnakemake run_1_of_2_run"


def test_a_job_that_is_refused_is_told_in_a_line(slurm, executor):
    sbatch(slurm, "sbatch: error: Batch job submission failed: Invalid qos specification")
    executor.run_job(Step("a"))
    line = "Slurm did not take run a: sbatch: Batch job submission failed: Invalid qos specification. "
    assert executor.said == {"run a": line}


def test_whatever_happens_snakemake_is_told(slurm, executor):
    """It would wait for the job for ever."""
    sbatch(slurm, "7")
    executor.format_job_exec = lambda job: 1 // 0
    with pytest.raises(ZeroDivisionError):
        executor.run_job(Step("a"))
    assert executor.said == {"run a": "Slurm did not take run a: see above. "}


def test_nothing_is_submitted_by_a_workflow_that_ends(slurm, executor):
    sbatch(slurm, "7")
    executor.shutdown()
    executor.run_job(Step("a"))
    assert executor.is_shut
    assert slurm.calls("sbatch") == []


def test_a_twin_that_came_after_all_is_known(slurm, executor):
    sbatch(slurm, "7", "sbatch: error: Invalid account")
    submitter = Submitter(executor)
    submitter.run_job(Step("a"))
    submitter.run_job(Step("b"))
    jobs = [Job(id, state, comment=comment) for id, state, comment in [
        ("7", "RUNNING", "run a"),
        ("8", "PENDING", "run a"),  # the twin
        ("9", "COMPLETED", "run a"),
        ("10", "PENDING", "run b"),  # of a job that was given up
        ("11", "PENDING", "run c"),  # is being submitted
    ]]  # fmt: skip
    assert [job.id for job in submitter.twins(jobs)] == ["8", "10"]


def test_a_job_is_tried_as_it_would_be_submitted():
    words = sbatch_words(request_of(ONE_GPU, Site(account="a$b", partition="gpu", qos="high", constraint="x&y")))
    assert words[0] == "sbatch"
    for options in (["-A", "a$b"], ["-p", "gpu"], ["--qos=high"], ["-C", "x&y"]):
        assert any(words[index : index + len(options)] == options for index in range(len(words)))


def test_where_memory_is_not_tracked_none_is_asked_for():
    assert "--mem" not in sbatch_words(request_of(ONE_GPU, Site(memory_gb=0)))
    assert "--mem" in sbatch_words(request_of(ONE_GPU, Site()))
