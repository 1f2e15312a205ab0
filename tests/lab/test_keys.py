"""What a file of a cell is made from: nothing that was made from something else is taken."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path

import pytest
import yaml

from lorafusion.core.config import CONFIGS
from lorafusion.core.plan import Plan
from lorafusion.core.schema import LONGEST, UserError
from lorafusion.core.seals import seal
from lorafusion.lab.experiments import EXPERIMENTS
from lorafusion.lab.experiments.end_to_end import cell_files
from lorafusion.lab.experiments.experiment import Inputs
from lorafusion.lab.keys import OutOfDateError, cell_workload, first_difference
from lorafusion.lab.suite import cells, read_suite
from lorafusion.lab.table.result import write_result
from lorafusion.lab.tuned import Tried, Tuned
from lorafusion.lab.tuning import plan_cell, tune_cell
from lorafusion.planning import plan_key, planner_options
from tests.cli.test_cli import lorafusion

BLOCK = {"workloads": ["xsum"], "systems": ["mlora"], "gpus": [1], "samples": 8, "length_scale": 64, "capacity": 128}


class Made:
    """A cell with its files."""

    def __init__(self, folder: Path, tuned: bool) -> None:
        self.suite, self.folder = folder / "suite.yaml", folder
        data = yaml.safe_load((CONFIGS / "suites" / "smoke.yaml").read_text())
        self.data = data | {"name": "keys", "cells": [data["cells"][0] | BLOCK | {"tuned": tuned}]}
        self.write()
        (self.cell,) = cells(read_suite(self.suite))
        self.workload, self.plan, self.tuned = (folder / f"{name}.json" for name in ("workload", "plan", "tuned"))
        self.workload.write_text(self.files.expected_workload.to_json())
        capacity = 96 if tuned else 128
        if tuned:
            self.tuned.write_text(self.tuning(128, 96).to_json())
        self.plan.write_text(plan_cell(self.files.expected_workload, self.files, capacity).to_json())

    def write(self, block: dict | None = None, **changes) -> None:
        settings = self.data | changes | {"cells": [self.data["cells"][0] | (block or {})]}
        self.suite.write_text(yaml.safe_dump(settings))

    @property
    def files(self):
        return cell_files(self.suite, self.cell.name)

    def tuning(self, *capacities: int) -> Tuned:
        """Of which the last is the fastest."""
        trials = tuple(Tried(capacity=size, throughput=float(i + 1)) for i, size in enumerate(capacities))
        return Tuned(suite="keys", cell=self.cell.name, system="mlora", stages=1, data_parallel=1, trials=trials,
                     config_hash=self.files.configuration, workload_hash=self.files.expected_workload.content_hash,
                     gpu_name=None, git_sha=None, git_dirty=None, tree_hash=None)  # fmt: skip

    def run(self, command: str = "run") -> str:
        """What a step says, once it has refused its inputs and left nothing."""
        tuned, out = self.tuned if self.tuned.exists() else None, self.folder / "out"
        tune = partial(tune_cell, self.suite, self.cell.name, self.workload, out)
        point = EXPERIMENTS["end_to_end"].point(str(self.suite), self.cell.name)
        run = partial(EXPERIMENTS["end_to_end"].run, point, 1, out, None, Inputs(self.workload, self.plan, tuned))
        with pytest.raises(UserError) as refused:
            (tune if command == "tune" else run)()
        assert len(str(refused.value)) <= 300
        assert not out.exists()
        return f"error: {refused.value}"


@pytest.fixture
def made(tmp_path):
    return Made(tmp_path, tuned=False)


@pytest.fixture
def made_tuned(tmp_path):
    return Made(tmp_path, tuned=True)


CHANGES = {
    "seed": ({"seed": 7}, {}, "jobs.0.seed: found 1, expected 7"),
    "samples": ({}, {"samples": 16}, "jobs.0.samples: found 8 entries, expected 16"),
    "scale": ({}, {"length_scale": 32}, "jobs.0.samples.0.1: found"),
    "merged": ({}, {"merged_qkv": True}, "jobs.0.target_modules: found 7 entries, expected 5"),
}


@pytest.mark.parametrize("command", ["run", "tune"])
@pytest.mark.parametrize("name", list(CHANGES))
def test_a_workload_of_an_older_suite_is_refused(made, name, command):
    settings, block, difference = CHANGES[name]
    made.write(block, **settings)
    (made.cell,) = cells(read_suite(made.suite))
    line = made.run(command)
    assert line.startswith(f"error: {made.workload}: {difference}")


def test_a_workload_of_another_table_of_lengths_is_refused(made, monkeypatch, tmp_path):
    from lorafusion.data import lengths

    changed = {name: row.model_copy(update={"mean": row.mean * 2}) for name, row in lengths.read_table().items()}
    monkeypatch.setattr(lengths, "read_table", lambda: changed)
    assert "workload.json: jobs.0.samples" in made.run()


def test_a_plan_by_other_options_of_its_planner_is_refused(made, monkeypatch):
    from lorafusion.lab import keys

    systems = keys.read_systems()
    other = systems["mlora"].model_copy(update={"options": {"row_multiple": 16, "batch_lora": True}})
    monkeypatch.setattr(keys, "read_systems", lambda: systems | {"mlora": other})
    assert "plan.json: key: found" in made.run()


def test_a_plan_of_another_capacity_than_the_cells_is_refused(made):
    made.plan.write_text(plan_cell(made.files.expected_workload, made.files, 96).to_json())
    assert "plan.json: capacity: found 96, expected 128" in made.run()


def test_a_plan_that_was_changed_by_hand_is_refused(made):
    """Two microbatches change places, which trains the same."""
    plan = Plan.read(made.plan)
    order = [plan.microbatches[i] for i in (1, 0, *range(2, len(plan.microbatches)))]
    made.plan.write_text(plan.model_copy(update={"microbatches": tuple(order), "key": plan.key}).to_json())
    assert "plan.json: key: found" in made.run()


def test_a_plan_of_a_tuned_cell_has_the_capacity_that_its_tuning_found(made_tuned):
    made = made_tuned
    made.files.plan(made.plan, made.files.tuned(made.tuned))
    made.tuned.write_text(made.tuning(96, 128).to_json())
    assert "plan.json: capacity: found 96, expected 128" in made.run()


@pytest.mark.parametrize("changes", [{"config_hash": "0" * 16}, {"workload_hash": "0" * 16}, {"cell": "another"}])
def test_a_tuning_of_something_else_is_refused(made_tuned, changes):
    ((name, value),) = changes.items()
    made_tuned.tuned.write_text(made_tuned.tuning(128, 96).model_copy(update=changes).to_json())
    assert f"tuned.json: {name}: found {value}, expected" in made_tuned.run()


def test_a_tuning_that_was_changed_by_hand_is_refused(made_tuned):
    text = made_tuned.tuned.read_text()
    made_tuned.tuned.write_text(text.replace('"throughput": 1.0', '"throughput": 9.0'))
    assert "tuned.json: seal: found" in made_tuned.run()


def test_a_tuned_cell_is_not_run_without_its_tuning_nor_another_with_one(made_tuned):
    made_tuned.tuned.rename(made_tuned.folder / "elsewhere.json")
    assert f"cell {made_tuned.cell.name}: found no tuning, expected" in made_tuned.run()
    made_tuned.write({"tuned": False, "capacity": 96})
    shutil.copy(made_tuned.folder / "elsewhere.json", made_tuned.tuned)
    assert "is not tuned" in made_tuned.run()


RESULT = {"version": 1, "status": "ok", "cell": {"suite": "keys", "repeat": 1}, "provenance": {}}


@pytest.mark.parametrize("name", ["config_hash", "workload_hash", "plan_hash"])
def test_a_result_of_another_configuration_workload_or_plan_is_not_this_ones(made, name):
    files, plan = made.files, Plan.read(made.plan)
    origin = {"config_hash": files.configuration, "workload_hash": files.expected_workload.content_hash,
              "plan_hash": plan.content_hash}  # fmt: skip
    cell = {"suite": "keys", "cell": made.cell.name, "repeat": 1}
    path = made.folder / "result.json"
    write_result(path, {"version": 1, "cell": cell, "provenance": origin})
    assert files.result(path, plan, 1)
    with pytest.raises(OutOfDateError, match="repeat: found 1, expected 2"):
        files.result(path, plan, 2)
    write_result(path, {"version": 1, "cell": cell, "provenance": origin | {name: "0" * 16}})
    with pytest.raises(OutOfDateError, match=f"{name}: found 0000000000000000, expected {origin[name]}"):
        files.result(path, plan, 1)
    write_result(path, {"version": 1, "cell": cell, "provenance": None})
    with pytest.raises(UserError, match="provenance: expected a JSON object"):
        files.result(path, plan, 1)


def test_a_result_that_was_changed_by_hand_is_not_this_ones(made):
    origin = {"config_hash": made.files.configuration, "workload_hash": made.files.expected_workload.content_hash,
              "plan_hash": None}  # fmt: skip
    path = made.folder / "result.json"
    write_result(path, {"version": 1, "cell": {"suite": "keys", "cell": made.cell.name, "repeat": 1},
                        "status": "oom", "provenance": origin})  # fmt: skip
    assert made.files.result(path, None, 1)
    path.write_text(path.read_text().replace("oom", "ok"))
    with pytest.raises(UserError, match="seal: found"):
        made.files.result(path, None, 1)


def test_a_profile_that_lost_rows_or_is_of_another_plan_is_not_this_ones(made):
    files, plan, path = made.files, Plan.read(made.plan), made.folder / "profile.csv"
    row = f"{made.cell.name},{files.configuration},{plan.content_hash}\n"
    path.write_text("cell,config_hash,plan_hash\n" + row * 2)
    seal(path)
    assert len(files.profile(path, plan)) == 2
    path.write_text("cell,config_hash,plan_hash\n" + row)
    with pytest.raises(UserError, match="cut or edited since"):
        files.profile(path, plan)
    for text, message in (("", "cell: found None"), (row.replace(plan.content_hash, "x"), "plan_hash: found x")):
        path.write_text("cell,config_hash,plan_hash\n" + text)
        seal(path)
        with pytest.raises(OutOfDateError, match=message):
            files.profile(path, plan)


def test_the_key_of_a_plan_is_no_part_of_its_content(made):
    plan = Plan.read(made.plan)
    options = planner_options(made.files.system, made.files.costs)
    assert plan.key == plan_key(plan, made.files.system.planner, options)
    assert plan.model_copy(update={"key": None}).content_hash == plan.content_hash


def test_a_cells_workload_is_the_one_that_the_command_makes(made):
    done = lorafusion("workload", CONFIGS / "workloads" / "xsum.yaml", "--samples", 8, "--length-scale", 64,
                      "-o", made.folder / "again.json")  # fmt: skip
    assert done.returncode == 0
    assert (made.folder / "again.json").read_text() == cell_workload(read_suite(made.suite), made.cell).to_json()


@pytest.mark.parametrize(
    ("found", "expected", "difference"),
    [
        ({"a": 1}, {"a": 2}, ("a", 1, 2)),
        ({"a": [1, {"b": 2}]}, {"a": [1, {"b": 3}]}, ("a.1.b", 2, 3)),
        ({"a": [1]}, {"a": [1, 2]}, ("a", "1 entries", 2)),
        ({"a": 1, "c": 1}, {"a": 1}, ("c", 1, None)),
        ({"a": []}, {"a": {}}, ("a", [], {})),
    ],
)
def test_the_first_difference(found, expected, difference):
    assert first_difference(found, expected) == difference


def test_an_error_says_what_was_found_and_expected_however_long_the_path_is():
    path = "results/" + "a-long-folder/" * 15 + "workload.json"
    text = str(OutOfDateError(path, "config_hash", "0" * 16, "1" * 16))
    assert len(text) == LONGEST
    assert text.startswith("results/a-long-folder")
    assert ".json: config_hash: found 0000000000000000, expected 1111111111111111; it was made for" in text
