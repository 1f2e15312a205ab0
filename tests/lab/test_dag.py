"""The keys of steps: what changes with the settings of a suite, in both drivers."""

from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter
from contextlib import nullcontext
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

from lorafusion.core.config import CONFIGS
from lorafusion.lab import commands
from lorafusion.lab.dag import FIRST, make_step
from lorafusion.lab.keys import OutOfDateError, suite_files
from lorafusion.lab.runner import Share
from lorafusion.lab.steps import BUILD, TUNE, SuiteSteps, dag_of, step_at
from lorafusion.lab.suite import suite_path
from tests.lab.toy_suite import files, instant, run

pytestmark = pytest.mark.usefixtures("checked")


def of_another_system(suite: Path, monkeypatch) -> None:
    from lorafusion.lab import keys

    systems = keys.read_systems()
    other = systems["mlora"].model_copy(update={"options": {"row_multiple": 16, "batch_lora": True}})
    monkeypatch.setattr(keys, "read_systems", lambda: systems | {"mlora": other})


def of_another_capacity(suite: Path, monkeypatch) -> None:
    data = yaml.safe_load(suite.read_text())
    data["cells"][1]["capacity"] = 144
    suite.write_text(yaml.safe_dump(data))


def of_more_samples(suite: Path, monkeypatch) -> None:
    data = yaml.safe_load(suite.read_text())
    data["cells"] = [block | {"samples": 9} for block in data["cells"]]
    suite.write_text(yaml.safe_dump(data))


TUNED = {"tune_cell": 1, "plan": 1, "run": 2}
AGAIN = {
    of_another_capacity: TUNED,
    of_another_system: TUNED,
    of_more_samples: {"workload": 2, "tune_cell": 1, "plan": 3, "run": 10},
}


@pytest.mark.parametrize("change", list(AGAIN))
def test_steps_whose_settings_change_and_no_others_are_made_again(suite, origin, tmp_path, capsys, monkeypatch, change):
    folder = tmp_path / "results"
    assert run(suite, folder, Share(), instant, float("inf")) == 0
    keys = {step.relative: step.key for step in dag_of(suite, folder).steps}
    made = files(folder)
    change(suite, monkeypatch)
    stale = [step for step in dag_of(suite, folder).steps if step.is_stale]
    assert Counter(step.kind.name for step in stale) == AGAIN[change]
    assert all(step.key != keys[step.relative] for step in stale)
    if change == of_another_system:  # is in force for this module alone, not for the planner
        return
    assert run(suite, folder, Share(), instant, float("inf")) == 0
    again = {name for name, time in files(folder).items() if time != made[name] and not name.startswith("logs/")}
    assert again == {f"{step.relative}{end}" for step in stale for end in ("", ".key")}


@pytest.mark.parametrize("change", [of_another_capacity, of_more_samples])
def test_snakemake_makes_the_same_steps_again(suite, origin, tmp_path, monkeypatch, change):
    """Of what the runner made, of which Snakemake has no record."""
    monkeypatch.chdir(tmp_path)
    folder = Path("results/swept")
    assert run(suite, folder, Share(), instant, float("inf")) == 0
    targets = [str(step.path) for step in dag_of(suite, folder).steps if step.kind.name == "run"]
    assert "Nothing to be done" in dry_run(suite, tmp_path, targets)
    change(suite, monkeypatch)
    jobs = re.findall(r"^(\w+) +(\d+)$", dry_run(suite, tmp_path, targets), re.MULTILINE)
    assert {name: int(count) for name, count in jobs if name != "total"} == AGAIN[change]


def dry_run(suite: Path, folder: Path, targets: list[str]) -> str:
    command = ["--snakefile", CONFIGS.parent / "Snakefile", "--directory", folder, "--cores", 1, "--dry-run", "--quiet",
               "rules", "--config", f"suite={suite}", "--", *targets]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "snakemake", *map(str, command)], text=True, capture_output=True, cwd=folder
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_a_step_refuses_inputs_of_other_settings(suite, origin, tmp_path):
    folder = tmp_path / "results"
    assert run(suite, folder, Share(), instant, float("inf")) == 0
    of_more_samples(suite, None)
    step = next(step for step in dag_of(suite, folder).steps if step.kind.name == "run")
    with pytest.raises(OutOfDateError, match=r"workloads/.*json: key: found [0-9a-f]+, expected [0-9a-f]+; it"):
        make_step(step, partial(pytest.fail, "a run was started"))


@pytest.mark.parametrize("module", [BUILD, TUNE])
def test_the_tools_that_steps_run_are_there(module):
    """A step runs its tool in a process of its own, so that no import says that the module was moved."""
    assert find_spec(module)


@pytest.mark.parametrize("folder", [None, Path("elsewhere/results")])
def test_the_step_of_a_file_is_that_of_its_folder(suite, folder):
    dag = dag_of(suite, folder)
    for step in (dag.steps[0], *sorted(dag.runs, key=lambda run: run.relative)):
        for path in step.outputs:
            same, found = step_at(suite, path)
            assert (same.folder, found.path, found.key) == (dag.folder, step.path, step.key)


def test_the_steps_are_built_once_for_the_step_of_a_file(suite, monkeypatch):
    built, dag = [], SuiteSteps.dag
    monkeypatch.setattr(SuiteSteps, "dag", lambda steps: built.append(steps) or dag(steps))
    step_at(suite, dag_of(suite).steps[-1].path)
    assert len(built) == 1 + 1


def test_a_kind_of_steps_is_no_part_of_a_path():
    steps = dag_of("smoke").select(["workload"])
    assert {step.kind.name for step in steps} == {"workload"}
    assert {step.kind.name for step in dag_of("smoke").select(["workload~xsum*"])} > {"workload", "run"}


def test_only_the_first_node_of_a_run_says_that_it_is_made(suite, origin, tmp_path, monkeypatch):
    """A node that comes late takes no key away."""
    folder = tmp_path / "results"
    assert run(suite, folder, Share(), instant, float("inf")) == 0
    step = next(step for step in dag_of(suite, folder).steps if step.kind.name == "run")
    before = step.key_path.stat().st_mtime_ns, step.path.stat().st_mtime_ns
    monkeypatch.setenv("SLURM_NODEID", "1")
    assert make_step(step, instant) == "node 1: its processes have ended; the first node judges"
    assert (step.key_path.stat().st_mtime_ns, step.path.stat().st_mtime_ns) == before


def test_blocks_of_a_higher_priority_are_tuned_and_run_first(monkeypatch):
    """With all their repeats; a process that ends early has made what matters."""
    order: list = []
    monkeypatch.setattr(commands, "run_steps", lambda steps, *_: order.extend(steps) or 0)
    monkeypatch.setattr(commands, "driving", lambda *_: nullcontext())
    commands.run_here("h200x2", "0/1", 0.0, [], None, again=False)
    dag = dag_of("h200x2")
    runs = [step for step in order if step in dag.runs]
    assert [step.priority for step in runs] == sorted((step.priority for step in runs), reverse=True)
    cells = suite_files(suite_path("h200x2"))
    tiers = [cells[step.name.partition("/repeat~")[0]].cell.grid.priority for step in order if step.tier < FIRST]
    assert tiers == sorted(tiers, reverse=True)
    first = [step for step in runs if step.tier == 5]
    assert len(first) == 3 * len({step.name.partition("/repeat~")[0] for step in first})
    place = {step: index for index, step in enumerate(order)}
    assert all(place[source] < place[step] for step in runs for source in step.inputs if source in place)
