"""What comes before the first step of a workflow."""

from __future__ import annotations

import os
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace

import pytest

from lorafusion.core.schema import UserError
from lorafusion.lab.begin import begin, dag_of_config
from lorafusion.lab.cluster.request import Resources, request_of
from lorafusion.lab.cluster.site import Site
from lorafusion.lab.driver import is_driven
from lorafusion.lab.failures import unmade
from lorafusion.lab.steps import dag_of
from lorafusion.lab.submission import Submission
from tests.lab.cluster.fake_slurm import FakeSlurm


@pytest.fixture
def slurm(tmp_path, monkeypatch) -> FakeSlurm:
    """It has a node of one partition, and takes all jobs."""
    fake = FakeSlurm(tmp_path / "slurm", monkeypatch)
    fake.program("sinfo", "echo 'toy*|1:00:00|1-infinite|2|8|1|16000|(null)'")
    fake.program("sbatch", "")
    fake.queue()
    return fake


def submission(minutes: int) -> Submission:
    """A job of so many minutes."""
    settings = SimpleNamespace(requeue=True, qos=None, reservation=None)
    executor = SimpleNamespace(
        run_uuid="lorafusion_1",
        workflow=SimpleNamespace(executor_settings=settings),
        report_job_error=print,
        shutdown=print,
    )
    return Submission(executor, {"runs/a.json": request_of(Resources(minutes, 1000), Site())})


def test_the_configuration_chooses_suite_and_folder(tmp_path, suite):
    config = {"suite": str(suite), "folder": str(tmp_path / "there"), "again": "True"}
    dag = dag_of_config(config)
    assert dag.folder == tmp_path / "there"
    assert config["again"] is True
    assert config["suite_name"] == "swept"


@pytest.mark.parametrize(
    ("config", "mistake"),
    [
        ({"suit": "smoke"}, "--config: unknown key 'suit'; known: suite, folder, again"),
        ({"again": "yes"}, "--config: again: expected true or false, found 'yes'"),
    ],
)
def test_a_mistake_in_the_configuration_is_a_line(config, mistake):
    with pytest.raises(UserError) as error:
        dag_of_config(config)
    assert error.value.mistakes == [mistake]


def test_it_takes_the_folder_and_leaves_word_of_its_jobs(slurm, tmp_path, suite):
    dag, asked = dag_of(suite, tmp_path / "results"), submission(8)
    with ExitStack() as driver:
        begin(dag, driver, asked, is_local=False)
        assert is_driven()
        assert "lorafusion_1" in (dag.folder / ".slurm-jobs").read_text()
        assert asked.settings.efficiency_report_path == dag.folder
        assert len(slurm.calls("sbatch")) == 1
        assert asked.executor.check_active_jobs
    assert not is_driven()


def test_a_job_that_cannot_run_ends_it_before_the_folder_is_taken(slurm, tmp_path, suite):
    with ExitStack() as driver, pytest.raises(UserError, match="61 minutes, at most 60 there"):
        begin(dag_of(suite, tmp_path / "results"), driver, submission(61), is_local=False)
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize(("is_local", "refused"), [(True, True), (False, False)])
def test_a_suite_for_gpus_needs_them_here_unless_jobs_are_placed_elsewhere(monkeypatch, tmp_path, is_local, refused):
    monkeypatch.setattr("lorafusion.lab.begin.has_gpu", lambda: False)
    mistakes = []
    with ExitStack() as driver:
        try:
            begin(dag_of("h200", tmp_path / "results"), driver, None, is_local)
        except UserError as error:
            mistakes = error.mistakes
    assert mistakes == (
        ["configs/suites/h200.yaml: a suite for GPUs, but nvidia-smi finds none; try suite=smoke or Slurm"]
        if refused
        else []
    )


def test_steps_that_were_begun_and_not_made_are_named(tmp_path, suite):
    """Among them one without a key; not those that were not begun, or only by an earlier workflow."""
    steps = dag_of(suite, tmp_path).steps[:6]
    assert unmade(steps) == []
    for step in steps[:4]:
        step.log.parent.mkdir(parents=True, exist_ok=True)
        step.log.touch()
    steps[5].log.parent.mkdir(parents=True, exist_ok=True)
    steps[5].log.touch()
    os.utime(steps[5].log, (1, 1))
    for path in [*steps[0].files, *steps[1].outputs]:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).touch()
    assert unmade(steps) == [f"not made: {step.relative} (see {step.log})" for step in steps[1:4]]
