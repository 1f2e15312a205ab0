"""An experiment more is one class and one entry of the registry."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import yaml

from lorafusion.core.schema import UserError
from lorafusion.lab.dag import make_step, state
from lorafusion.lab.experiments import EXPERIMENTS
from lorafusion.lab.experiments.bench import BenchExperiment, DeviceEntry
from lorafusion.lab.gather import require_results
from lorafusion.lab.keys import OutOfDateError, require_result_of
from lorafusion.lab.steps import dag_of
from lorafusion.lab.table import table
from lorafusion.lab.table.result import row


class SumEntry(DeviceEntry):
    sizes: list[int]


class Sums(BenchExperiment):
    """How long it takes to add some numbers."""

    name = folder = kind = "sums"
    entry = SumEntry

    def subjects(self, entry, source):
        return ((f"size~{size}", size) for size in entry.sizes)

    def depends_on(self, point):
        return [point.settings.dtype, point.subject]

    def columns(self, point):
        return {"cell": point.name, "tokens": point.subject}

    def measure(self, point, repeat, out):
        yield [row("time", sum(range(point.subject)) + repeat, "whole", {})]
        yield [row("overhead", None, "whole", {}, status="oom", note="too large")]


@pytest.fixture
def sums(tmp_path, monkeypatch):
    experiment = Sums()
    experiment.config = tmp_path / "sums.yaml"
    entry = {"device": "cpu", "dtype": "float32", "repeats": 2, "sizes": [3, 4]}
    experiment.config.write_text(yaml.safe_dump({"smoke": entry}))
    monkeypatch.setitem(EXPERIMENTS, "sums", experiment)
    return experiment


def test_every_experiment_can_be_listed_without_what_measures():
    for name, experiment in EXPERIMENTS.items():
        points = experiment.points("smoke")
        assert all(len(experiment.key(point)) == 16 for point in points), name
        assert len({point.name for point in points}) == len(points)
        assert all(experiment.resources(point).minutes > 0 and point.repeats for point in points)
        assert {point.suite for point in experiment.points("configs/suites/smoke.yaml")} == {"smoke"}
        assert experiment.points("no-such-suite") == []


def test_an_experiment_more_is_listed_run_and_tabled(sums, tmp_path):
    points = EXPERIMENTS["sums"].points("smoke")
    assert [point.name for point in points] == ["size~3", "size~4"]
    assert sums.resources(points[0]).gpus == 0
    paths = []
    for point in points:
        for repeat in range(1, point.repeats + 1):
            paths.append(tmp_path / f"{point.name}-{repeat}.json")
            assert sums.run(point, repeat, paths[-1], None) == "2 numbers, 1 failed"
    single = table.read_results(paths)
    times = single[single["metric"] == "time"]
    assert list(zip(times["tokens"], times["repeat"], times["value"], strict=True)) == [
        (3, 1, 4.0), (3, 2, 5.0), (4, 1, 7.0), (4, 2, 8.0),
    ]  # fmt: skip
    assert set(single[single["metric"] == "overhead"]["status"]) == {"oom"}
    require_results({str(path): json.loads(path.read_text()) for path in paths}, None)
    assert require_result_of(paths[0], sums.key(points[0]), 1)
    with pytest.raises(OutOfDateError):
        require_result_of(paths[0], sums.key(points[1]), 1)


def test_an_experiment_more_has_its_steps(sums, tmp_path):
    """A process for each point and repeat, and a table of them, without a line elsewhere."""
    dag = dag_of("smoke", tmp_path)
    runs = dag.select(["sums_bench"])
    assert {step.name for step in runs} == {f"size~{size}/repeat~{repeat}" for size in (3, 4) for repeat in (1, 2)}
    for step in runs:
        make_step(step, None)
    (gathered,) = dag.targets["sums"]
    make_step(gathered, None)
    assert (tmp_path / "sums" / "measurements.csv").exists()
    assert not any(state(step) for step in [*runs, gathered])


def test_a_result_of_other_settings_is_out_of_date(sums, tmp_path):
    path = tmp_path / "1.json"
    sums.run(sums.point("smoke", "size~3"), 1, path, None)
    Path(sums.config).write_text(sums.config.read_text().replace("float32", "bfloat16"))
    with pytest.raises(OutOfDateError):
        require_result_of(path, sums.key(sums.point("smoke", "size~3")), 1)


def test_a_result_says_what_else_ran_there(sums, tmp_path, monkeypatch):
    (tmp_path / "squeue").write_text("#!/bin/sh\necho '7 of me: 1 CPUs, N/A'\necho '8 of alice: 2 CPUs, N/A'\n")
    (tmp_path / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_JOB_NODELIST", "toy1")
    path = tmp_path / "1.json"
    sums.run(sums.point("smoke", "size~3"), 1, path, None)
    origin = json.loads(path.read_text())["provenance"]
    assert origin["other_jobs"] == "8 of alice: 2 CPUs, N/A"
    assert origin["host_load"] >= 0
    assert "other_gpu_processes" in origin


def test_a_suite_for_gpus_needs_one(sums, tmp_path, monkeypatch):
    monkeypatch.setattr("lorafusion.lab.experiments.experiment.has_gpu", lambda: False)
    Path(sums.config).write_text(sums.config.read_text().replace("cpu", "cuda"))
    with pytest.raises(UserError, match=r"sums\.yaml: a suite for GPUs, but nvidia-smi finds none"):
        sums.run(sums.point("smoke", "size~3"), 1, tmp_path / "1.json", None)
