"""How a workflow's jobs stand, as Snakemake is told: no end is missed, and no answer is never an end."""

from __future__ import annotations

import asyncio
import logging
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from snakemake_executor_plugin_slurm import Executor

from lorafusion.core.config import CONFIGS
from lorafusion.lab.cluster import watch as module
from lorafusion.lab.cluster.left_jobs import record_run
from lorafusion.lab.cluster.watch import watch

WHAT = "run a"
LOGGER = logging.getLogger(__name__)


class ToldExecutor:
    """Snakemake's, as far as it is used. said: what it was told of jobs, by their ids."""

    def __init__(self) -> None:
        self.run_uuid = "run-1"
        self.next_seconds_between_status_checks = 40.0
        settings = SimpleNamespace(init_seconds_before_status_checks=40, keep_successful_logs=False)
        self.workflow = SimpleNamespace(executor_settings=settings)
        self.said: dict[str, str] = {}

    def shutdown(self):
        pass

    def report_job_success(self, info):
        self.said[info.external_jobid] = "success"

    def report_job_error(self, info, msg, aux_logs=None):
        assert aux_logs in (None, [str(info.aux["slurm_logfile"])])
        self.said[info.external_jobid] = msg


class Workflow:
    """A workflow of jobs 1 and 2, which looks at them when it is told to."""

    def __init__(self, folder: Path, monkeypatch) -> None:
        self.executor, self.folder, self.clock = ToldExecutor(), folder, 0.0
        monkeypatch.setattr(module.time, "monotonic", lambda: self.clock)
        folder.mkdir()
        record_run(folder, "run-1")
        watch(self.executor, folder)
        self.active = [self.job(id) for id in ("1", "2")]

    def job(self, id):
        log = self.folder / f"{id}.log"
        log.touch()
        step = SimpleNamespace(
            output=SimpleNamespace(key=str(self.folder / f"{id}.key")),
            params=SimpleNamespace(key=f"key-{id}"),
            is_group=lambda: False,
        )
        return SimpleNamespace(job=step, external_jobid=id, aux={"slurm_logfile": log})

    def look(self, seconds: float = 40.0) -> dict[str, str]:
        """What Snakemake is told at the next look, after so many seconds."""

        async def look():
            return [info async for info in self.executor.check_active_jobs(self.active)]

        self.clock += seconds
        self.executor.said.clear()
        self.active = asyncio.run(look())
        return dict(self.executor.said)


@pytest.fixture
def workflow(tmp_path, monkeypatch) -> Workflow:
    return Workflow(tmp_path / "results", monkeypatch)


def queue(slurm, *jobs: str) -> None:
    """What squeue answers: `ID STATE REASON`, a job each."""
    slurm.queue(*["{}|{}|toy1|{}|{}".format(*(f"{job} None".split(None, 3)[:3]), WHAT) for job in jobs])


def test_squeue_is_asked_for_jobs_that_have_ended_too(slurm, workflow):
    queue(slurm, "1 RUNNING", "2 RUNNING")
    assert workflow.look() == {}
    (call,) = slurm.calls("squeue")
    assert "--name=run-1" in call
    assert "--states=all" in call
    workflow.active = []
    assert workflow.look() == {}
    assert len(slurm.calls("squeue")) == 1, "where nothing is to be known nobody is asked"


def test_a_job_that_is_done_is_reported_and_its_log_goes(slurm, workflow):
    queue(slurm, "1 COMPLETED", "2 COMPLETING")
    assert workflow.look() == {"1": "success"}
    assert [info.external_jobid for info in workflow.active] == ["2"]
    assert [path.name for path in workflow.folder.glob("*.log")] == ["2.log"]


@pytest.mark.parametrize(
    ("state", "advice"),
    [
        ("CANCELLED", "somebody cancelled it; start the workflow again"),
        ("OUT_OF_MEMORY", "it needs more of the host's memory; a larger `memory_gb` in the suite"),
        ("TIMEOUT", "it took longer than it may; more `minutes` in the suite"),
        ("NODE_FAIL", "its node was lost; start the workflow again"),
        ("PREEMPTED", "it had to give way to another job; start the workflow again"),
        ("BOOT_FAIL", "its node did not start; start the workflow again"),
        ("DEADLINE", "its deadline has passed"),
        ("REVOKED", "another cluster of the federation took it; `--clusters` in `extra` names this one"),
        ("FAILED", "its log says why"),
    ],
)
def test_every_end_is_told_in_a_line(slurm, workflow, state, advice):
    queue(slurm, f"1 {state}", "2 RUNNING")
    assert workflow.look() == {"1": f"Slurm job 1 (run a): {state}: {advice}. "}
    assert [info.external_jobid for info in workflow.active] == ["2"]


def test_the_end_of_a_job_that_steps_share_is_told_as_well(slurm, workflow, capsys):
    """Snakemake shows no message of such a job."""
    workflow.active[0].job = Group(**vars(workflow.active[0].job) | {"is_group": lambda: True})
    queue(slurm, "1 CANCELLED", "2 TIMEOUT")
    said = workflow.look()
    assert capsys.readouterr().out == f"{said['1']}\n"
    assert "CANCELLED: somebody cancelled it" in said["1"]


def test_a_shared_job_that_could_not_be_submitted_is_told_as_well(workflow, capsys):
    """Snakemake's plugin says so, from a loop that calls it by position."""
    info = workflow.job("3")
    info.job = Group(is_group=lambda: True)
    workflow.executor.report_job_error(info, "sbatch failed: Socket timed out")
    assert capsys.readouterr().out == "sbatch failed: Socket timed out\n"
    assert workflow.executor.said == {"3": "sbatch failed: Socket timed out"}


class Group(SimpleNamespace):
    """A job that steps share: here, one."""

    def __iter__(self):
        return iter([self])


def test_a_job_that_could_not_begin_is_told_from_one_that_failed(slurm, workflow):
    """Slurm ends it at once where it cannot write the job's log."""
    (workflow.folder / "1.log").unlink()
    queue(slurm, "1 FAILED", "2 FAILED")
    said = workflow.look()
    assert f"FAILED: it has written no log; can its node write to {workflow.folder}?" in said["1"]
    assert "FAILED: its log says why" in said["2"]


def test_a_workflow_that_ends_leaves_the_folders_of_logs_to_jobs_that_wait(tmp_path):
    """Also another workflow's, whose jobs would fail at once."""
    profile = yaml.safe_load((CONFIGS.parent / "slurm" / "config.yaml").read_text())
    older = profile["slurm-delete-logfiles-older-than"]
    settings = SimpleNamespace(delete_logfiles_older_than=older, keep_successful_logs=False)
    logs = tmp_path / "rule_run" / "a"
    logs.mkdir(parents=True)
    Executor.clean_old_logs(
        SimpleNamespace(workflow=SimpleNamespace(executor_settings=settings), slurm_logdir=tmp_path, logger=LOGGER)
    )
    assert logs.is_dir()


@pytest.mark.parametrize(
    "line",
    [
        "slurmstepd-toy1: error: StepId=1.batch exceeded memory limit (401903616 > 104857600), being killed",
        "slurmstepd: error: Detected 1 oom-kill event(s) in StepId=7.0. Some of the processes may have been killed",
        "slurmstepd: error: Detected 2 oom_kill events in StepId=7.batch. Some of the step tasks have been OOM Killed.",
    ],
)
def test_a_step_that_had_too_little_memory_is_told_from_the_jobs_log(slurm, workflow, line):
    """Its job has merely failed, as Slurm says."""
    (workflow.folder / "1.log").write_text(f"srun: error: toy1: task 0: Killed\n{line}\n")
    queue(slurm, "1 FAILED", "2 RUNNING")
    assert "OUT_OF_MEMORY: it needs more of the host's memory" in workflow.look()["1"]


def test_a_result_that_is_there_counts_whatever_slurm_says_of_the_jobs_end(slurm, workflow):
    (workflow.folder / "1.key").write_text("key-1\n")
    (workflow.folder / "2.key").write_text("another\n")
    queue(slurm, "1 OUT_OF_MEMORY", "2 TIMEOUT")
    said = workflow.look()
    assert said["1"] == "success"
    assert "TIMEOUT" in said["2"]


def test_a_job_that_slurm_has_forgotten_ended_as_its_files_say(slurm, workflow):
    queue(slurm, "1 RUNNING", "2 RUNNING")
    workflow.look()
    queue(slurm)
    (workflow.folder / "1.key").write_text("key-1\n")
    (workflow.folder / "2.key").write_text("key-2\n")
    os.utime(workflow.folder / "2.key", (1, 1))  # of an earlier run
    assert workflow.look() == {"1": "success"}
    assert workflow.look(30) == {}, "a file may be seen late"
    (said,) = workflow.look(31).values()
    assert said.startswith("Slurm job 2 (run a): UNKNOWN: Slurm has forgotten it, and its result is missing")
    assert workflow.active == []


def test_a_job_that_was_missed_once_is_none_that_has_ended(slurm, workflow):
    queue(slurm, "1 RUNNING")
    workflow.look()
    queue(slurm, "1 RUNNING", "2 RUNNING")
    assert workflow.look() == {}
    queue(slurm, "1 RUNNING")
    assert workflow.look() == {}, "it is missed anew"


@pytest.mark.parametrize("body", ["echo 'squeue: error: Unable to contact slurm controller' >&2; exit 1", "exit 1"])
def test_no_answer_is_no_end_and_told_once(slurm, workflow, capsys, body):
    queue(slurm, "1 RUNNING", "2 RUNNING")
    workflow.look()
    slurm.program("squeue", body)
    for _ in range(50):
        assert workflow.look(3600) == {}
    assert len(workflow.active) == 2
    assert capsys.readouterr().out.count("Slurm does not say how jobs stand, and is asked again: squeue: ") == 1
    queue(slurm, "1 COMPLETED", "2 COMPLETED")
    assert workflow.look() == {"1": "success", "2": "success"}


def test_looks_come_less_often_while_nothing_changes_but_once_a_minute(slurm, workflow):
    queue(slurm, "1 PENDING Resources", "2 RUNNING")
    pauses = []
    for _ in range(4):
        workflow.look()
        pauses.append(workflow.executor.next_seconds_between_status_checks)
    assert pauses == [40.0, 60.0, 60.0, 60.0]
    queue(slurm, "1 RUNNING", "2 RUNNING")
    workflow.look()
    assert workflow.executor.next_seconds_between_status_checks == 40.0


def test_a_job_that_waits_in_vain_is_cancelled_and_the_others_go_on(slurm, workflow, capsys):
    queue(slurm, "1 PENDING QOSMaxWallDurationPerJobLimit", "2 RUNNING")
    assert workflow.look() == {}
    assert slurm.calls("scancel") == [], "a reason that was seen once may be passing"
    assert workflow.look() == {}
    assert slurm.calls("scancel") == ["--quiet --state=PENDING 1"]
    queue(slurm, "1 CANCELLED", "2 RUNNING")
    advice = "jobs have to be shorter; a smaller `group_minutes`, less `minutes`, or another `qos` or `partition`"
    line = f"Slurm job 1 (run a): cancelled, as QOSMaxWallDurationPerJobLimit does not pass: {advice}. "
    assert workflow.look() == {"1": line}
    assert capsys.readouterr().out == ""


def test_a_job_larger_than_a_limit_on_jobs_together_is_cancelled(slurm, workflow, monkeypatch):
    asked = []
    monkeypatch.setattr(
        module, "excess", lambda job: asked.append(job.id) or ("it is too large" if job.id == "1" else "")
    )
    queue(slurm, "1 PENDING QOSMaxGRESPerUser", "2 PENDING QOSMaxGRESPerUser")
    for _ in range(3):
        workflow.look()
    assert slurm.calls("scancel")[0] == "--quiet --state=PENDING 1"
    assert asked == ["1", "2"], "each is asked for once"
    queue(slurm, "1 CANCELLED", "2 RUNNING")
    line = "cancelled, as QOSMaxGRESPerUser does not pass: it is too large; another `qos` or `partition`"
    assert workflow.look() == {"1": f"Slurm job 1 (run a): {line}. "}


def test_a_job_that_came_a_second_time_is_cancelled(slurm, workflow):
    """A busy controller took it after all, when it had been submitted again."""
    workflow.executor.check_active_jobs.__self__.submitter._ids[WHAT] = "1"
    workflow.active = workflow.active[:1]
    queue(slurm, "1 RUNNING", "2 PENDING JobHeldUser")
    assert workflow.look() == {}
    assert slurm.calls("scancel") == ["--quiet 2"]


def test_a_reason_that_passes_resets_the_clock(slurm, workflow):
    for reason in ("PartitionTimeLimit", "Resources", "PartitionTimeLimit", "Priority"):
        queue(slurm, f"1 PENDING {reason}", "2 RUNNING")
        workflow.look()
    assert slurm.calls("scancel") == []


def test_a_controller_that_does_not_cancel_is_asked_again(slurm, workflow):
    queue(slurm, "1 PENDING BadConstraints", "2 RUNNING")
    slurm.program("scancel", "exit 1")
    for _ in range(4):
        assert workflow.look() == {}
    assert len(slurm.calls("scancel")) == 3


def test_a_job_that_somebody_holds_is_told_at_once_and_cancelled_after_an_hour(slurm, workflow, capsys):
    queue(slurm, "1 PENDING JobHeldUser", "2 RUNNING")
    workflow.look()
    line = "Slurm jobs 1 (run a) wait, as Slurm says: JobHeldUser; somebody holds it; `scontrol release` lets it go\n"
    assert capsys.readouterr().out == line
    workflow.look(3000)
    assert slurm.calls("scancel") == []
    workflow.look(600)
    assert slurm.calls("scancel") == ["--quiet --state=PENDING 1"]
    assert capsys.readouterr().out == ""


def test_a_long_wait_is_told_once_with_its_reason(slurm, workflow, capsys):
    for reason in ("Priority", "Resources", "Priority") * 20:
        queue(slurm, f"1 PENDING {reason}", "2 PENDING QOSGrpGRES")
        assert workflow.look(60) == {}
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "Slurm jobs 1 (run a) wait, as Slurm says: Priority; the cluster is busy"
    assert lines[1].startswith("Slurm jobs 2 (run a) wait, as Slurm says: QOSGrpGRES; all that its account or QOS may")
    assert len(lines) == 2
    assert slurm.calls("scancel") == []


def test_a_group_is_made_when_all_its_steps_are(slurm, workflow):
    first, second = workflow.active
    first.job = type("Group", (), {"is_group": lambda self: True, "__iter__": lambda self: iter(steps)})()
    steps = [workflow.job("3").job, second.job]
    (workflow.folder / "3.key").write_text("key-3\n")
    queue(slurm, "1 FAILED", "2 RUNNING")
    workflow.active = [first]
    assert "FAILED" in workflow.look()["1"]
    (workflow.folder / "2.key").write_text("key-2\n")
    workflow.active = [first]
    assert workflow.look() == {"1": "success"}
