"""The experiment `planner`: what it would run, what a bench writes, and the figures of that."""

from __future__ import annotations

import json
import shlex

import pandas as pd
import pytest
import yaml

from lorafusion.core.schema import UserError
from lorafusion.lab.experiments import EXPERIMENTS
from lorafusion.lab.experiments.planner import repeated_workload
from lorafusion.lab.report.registry import FIGURES
from lorafusion.lab.table import table
from lorafusion.lab.table.table import MeasurementError
from tests.cli.test_cli import lorafusion

PLANNER = EXPERIMENTS["planner"]
SUITE = {
    "model": "llama-3.1-8b",
    "capacity": 8192,
    "grids": [
        {
            "workloads": ["xsum", "heterogeneous"],
            "stages": [4],
            "global_batch": [4],
            "adapters": [2, 4],
            "samples": 8,
            "strategies": ["fast", "mlora", "sequential"],
        }
    ],
}


@pytest.fixture
def suite(tmp_path, monkeypatch):
    """A file with one suite; returns a function that changes it."""
    path = tmp_path / "planner.yaml"
    monkeypatch.setattr(PLANNER, "config", path)

    def write(changes=None):
        grid = SUITE["grids"][0] | (changes or {})
        path.write_text(yaml.safe_dump({"toy": SUITE | {"grids": [grid]}}))

    write()
    return write


@pytest.fixture
def measured(suite, tmp_path):
    """The table of both benches."""
    paths = [tmp_path / f"{index}.json" for index in range(2)]
    for point, path in zip(PLANNER.points("toy"), paths, strict=True):
        PLANNER.run(point, 1, path, None)
    frame = table.summarise(table.read_results(paths))
    table.validate(frame)
    return frame


def test_the_suites_that_come_with_the_project_are_sound():
    assert {"smoke", "cpu", "paper-grid"} <= set(PLANNER.entries())
    names = [point.name for point in PLANNER.points("cpu")]
    assert "workload~xsum/stages~8/samples~1000" in names
    assert len(names) == len(set(names)) == 40


def test_a_bench_has_a_row_for_each_metric_of_each_plan(measured):
    single = measured[measured["statistic"] == "single"]
    assert len(single) == 2 * 2 * 3 * 8 + 2  # workloads, adapters, strategies, metrics; the memory of a process
    of_machine = single["metric"].isin(["solve_time", "time", "peak_memory"])
    assert set(single["kind"][of_machine]) == {"measured"}
    assert set(single["kind"][~of_machine]) == {"simulated"}
    assert single[single["metric"] == "time"]["implementation"].eq("simulator").all()
    ratios = single[single["metric"] == "microbatch_ratio"]
    assert ratios["value"].min() >= 1
    assert ratios["note"].str.contains("of them no-ops").all()
    bubbles = single[single["metric"] == "bubble"]["value"]
    assert bubbles.between(0, 1).all()


def test_adapters_are_repeated_with_their_own_samples():
    workload = repeated_workload("heterogeneous", 8, 4, 6, 1)
    assert [job.dataset for job in workload.jobs] == [
        "xsum",
        "cnn_dailymail",
        "wikisum",
        "mixed",
        "xsum",
        "cnn_dailymail",
    ]
    assert workload.jobs[0].samples != workload.jobs[4].samples
    assert len({job.name for job in workload.jobs}) == 6


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"strategies": ["best"]}, "toy.grids.0: unknown strategy 'best'; known: fast, fewest"),
        ({"workloads": ["xsums"]}, "toy.grids.0: unknown workload 'xsums'"),
        ({"samples": 0}, "grids.0.samples"),
    ],
)
def test_mistakes_in_the_file_are_named(suite, changes, message):
    suite(changes)
    with pytest.raises(UserError, match=message):
        PLANNER.entries()


def test_the_recorded_command_does_the_bench_again(suite, tmp_path):
    name = "workload~xsum/stages~4/samples~8"
    suite({"workloads": ["xsum"], "strategies": ["mlora"], "adapters": [2]})
    path = tmp_path / "a folder" / "planner" / "runs" / name / "repeat~1.json"
    PLANNER.run(PLANNER.point("toy", name), 1, path, None)
    before = json.loads(path.read_text())
    path.unlink()
    program, *arguments = shlex.split(before["provenance"]["command"])
    done = lorafusion(*arguments)
    assert (program, done.returncode) == ("lorafusion", 0), done.stderr
    after = json.loads(path.read_text())
    assert after["cell"] == before["cell"]
    for row, other in zip(before["metrics"], after["metrics"], strict=True):
        assert row["metric"] == other["metric"]
        if row["metric"] not in ("solve_time", "time", "peak_memory"):
            assert row == other


def test_the_hash_changes_with_what_a_bench_depends_on(suite):
    name = "workload~xsum/stages~4/samples~8"
    before = PLANNER.key(PLANNER.point("toy", name))
    suite({"adapters": [2]})
    assert PLANNER.key(PLANNER.point("toy", name)) != before


@pytest.mark.parametrize("figure", ["planner_bubble", "planner_fill", "planner_time"])
def test_figures_are_drawn_from_their_csv(measured, tmp_path, figure):
    paths = FIGURES[figure].draw(measured, tmp_path / figure)
    assert [path.suffix for path in paths] == [".pdf", ".png", ".csv"]
    data = pd.read_csv(paths[2])
    assert set(data["system"]) == {"fast", "mlora", "sequential"}
    assert len(data) == (12 if figure == "planner_time" else 6)  # bars: four adapters alone
    first = paths[1].read_bytes()
    FIGURES[figure].draw(measured, tmp_path / figure)
    assert paths[1].read_bytes() == first


def test_a_table_without_strategies_has_no_figure(measured):
    with pytest.raises(MeasurementError, match="no median of bubble of a strategy"):
        FIGURES["planner_bubble"].draw(measured[measured["metric"] == "fill"], "x")
