"""A suite without Snakemake: the same files, nothing twice, and work that is shared."""

from __future__ import annotations

import json
import multiprocessing
import shlex
import shutil
import sys
from functools import partial
from pathlib import Path

import pytest
import yaml

from lorafusion.core.files import write
from lorafusion.core.plan import Plan
from lorafusion.core.schema import UserError
from lorafusion.core.workload import Workload
from lorafusion.lab import runner, tuning
from lorafusion.lab.dag import make_step
from lorafusion.lab.measured_steps import shuffled
from lorafusion.lab.runner import Share, first_ready, spread
from lorafusion.lab.suite import cells, read_suite
from lorafusion.lab.tuned import Tuned
from tests.lab.toy_suite import CHECKS, files, instant, reasons, run, small_suite, steps_of, verdict_of

pytestmark = pytest.mark.usefixtures("checked")
FORK = multiprocessing.get_context("fork")


@pytest.fixture(scope="module")
def swept(tmp_path_factory, checked) -> tuple[Path, Path]:
    """The suite and the folder of a sweep that trained."""
    from tests import forked

    folder = tmp_path_factory.mktemp("swept")
    path = small_suite(folder / "suite.yaml")
    assert run(path, folder / "results", Share(), forked.launch, float("inf")) == 0
    return path, folder / "results"


def test_the_checks_come_first_and_one_that_does_not_hold_is_told(suite, origin, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(
        "lorafusion.lab.measured_steps.run_check", lambda name, path: verdict_of(name, path, passed=name != "systems")
    )
    assert run(suite, tmp_path / "results", Share(), instant, float("inf")) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition("checks/")[2].partition(".json")[0] for line in lines[:4]] == list(CHECKS)
    assert "error: check systems does not hold" in lines[1]
    assert not (tmp_path / "results" / "checks" / "systems.json").exists()
    assert (tmp_path / "results" / "checks" / "systems.json.failed").exists()


def test_it_leaves_what_the_workflow_would_and_does_nothing_twice(swept, capsys):
    suite, folder = swept
    made = files(folder)
    names = [cell.name for cell in cells(read_suite(suite))]
    assert {name for name in made if name.startswith("runs/") and not name.endswith(".key")} == {
        f"runs/{name}/repeat~{repeat}.json" for name in names for repeat in (1, 2)
    }
    assert {name for name in made if name.startswith("tuned/")} == {
        f"tuned/{names[-1]}.json{end}" for end in ("", ".key")
    }
    tuned = json.loads((folder / f"tuned/{names[-1]}.json").read_text())
    assert Plan.read(folder / f"plans/{names[-1]}.json").capacity in {one["capacity"] for one in tuned["trials"]}
    statuses = {path.parent.name: json.loads(path.read_text())["status"] for path in folder.rglob("repeat~1.json")}
    assert statuses == {"system~peft-bf16": "ok", "system~mlora": "ok", "system~unsloth": "skipped"}
    capsys.readouterr()
    assert run(suite, folder, Share(), partial(pytest.fail, "a run was started"), float("inf")) == 0
    assert capsys.readouterr().out == ""
    assert files(folder) == made


def hashes(folder: Path) -> dict[str, dict]:
    """What each result says it was made from."""
    return {str(path): json.loads(path.read_text())["provenance"] for path in folder.rglob("repeat*.json")}


def test_an_old_workload_is_not_taken_for_another_seeds(suite, origin, tmp_path, capsys):
    """The suite's seed and samples change, the runs are deleted, the workloads, tunings and plans are not."""
    folder, read = tmp_path / "results", partial(Workload.read)
    assert run(suite, folder, Share(), instant, float("inf")) == 0
    before = {path: read(path).content_hash for path in (folder / "workloads").rglob("*.json")}
    shutil.rmtree(folder / "runs")
    data = yaml.safe_load(suite.read_text())
    for block in data["cells"]:
        block["samples"] = 16
    suite.write_text(yaml.safe_dump(data | {"seed": 7}))
    capsys.readouterr()
    assert run(suite, folder, Share(), instant, float("inf")) == 0
    said = capsys.readouterr().out
    for path, old in before.items():
        assert f"{path.relative_to(folder)}: made anew: jobs.0.seed: found 1, expected 7\n" in said
        assert read(path).content_hash != old
        assert [(len(job.samples), job.seed) for job in read(path).jobs][0] == (16, 7)
    made = hashes(folder)
    assert {origin["workload_hash"] for origin in made.values()}.isdisjoint(before.values())
    assert run(suite, folder, Share(), instant, float("inf")) == 0
    assert hashes(folder) == made


CHANGES = {
    "seed": {"seed": 2},
    "dtype": {"dtype": "bfloat16"},
    "adapter_dtype": {"adapter_dtype": "bfloat16"},
    "samples": {"cells": {"samples": 9}},
    "length_scale": {"cells": {"length_scale": 65}},
    "capacity": {"cells": {"capacity": 144}},
    "checkpointing": {"cells": {"checkpointing": True}},
}


@pytest.mark.parametrize("change", list(CHANGES))
def test_a_result_of_an_older_suite_is_made_anew(suite, origin, tmp_path, change):
    folder, changes = tmp_path / "results", CHANGES[change]
    assert run(suite, folder, Share(), instant, float("inf")) == 0
    before = hashes(folder)
    data = yaml.safe_load(suite.read_text())
    blocks = [block | changes.get("cells", {}) for block in data["cells"]]
    suite.write_text(yaml.safe_dump(data | changes | {"cells": blocks}))
    assert run(suite, folder, Share(), instant, float("inf")) == 0
    after = hashes(folder)
    assert after.keys() == before.keys()
    for name, origin in after.items():
        assert origin["config_hash"] != before[name]["config_hash"]
    assert reasons(suite, folder) == [""] * (len(CHECKS) + 1 + 2 * 5)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def edited(path: Path) -> None:
    """A length, a capacity or a plan's order is changed by hand, and the file is still sound in itself."""
    data = json.loads(path.read_text())
    if "jobs" in data:
        data["jobs"][0]["samples"][0][1] += 1
    elif "trials" in data:
        data["trials"][0]["throughput"] *= 9
    elif "microbatches" in data:
        data["flush"] = not data.get("flush", False)
    else:
        data["provenance"]["plan_hash"] = "0" * 16
    path.write_text(json.dumps(data))


@pytest.mark.parametrize("kind", ["workloads", "tuned", "plans", "runs"])
@pytest.mark.parametrize("damage", [cut, edited])
def test_a_damaged_file_is_made_anew(suite, origin, tmp_path, kind, damage, capsys):
    folder = tmp_path / "results"
    assert run(suite, folder, Share(), instant, float("inf")) == 0
    whole = {path: path.read_text() for path in (folder / kind).rglob("system~mlora/*.json")}
    whole |= {path: path.read_text() for path in (folder / kind).rglob("*system~mlora.json")}
    whole |= {path: path.read_text() for path in (folder / kind).rglob("*batch~8.json")}
    assert whole
    for path in whole:
        damage(path)
    capsys.readouterr()
    assert run(suite, folder, Share(), instant, float("inf")) == 0
    said = capsys.readouterr().out
    for path, text in whole.items():
        assert f"{path.relative_to(folder)}: made anew: " in said
        assert json.loads(path.read_text()).keys() == json.loads(text).keys()
    assert not any(reasons(suite, folder))


def test_a_plan_has_the_capacity_that_the_tuning_of_its_workload_found(suite, origin, tmp_path):
    """A tuning that finds another capacity has the cell planned and run again."""
    folder = tmp_path / "results"
    assert run(suite, folder, Share(), instant, float("inf")) == 0
    (path,) = (folder / "tuned").rglob("*.json")
    first, plan = Tuned.read(path), folder / "plans" / path.relative_to(folder / "tuned")
    assert Plan.read(plan).capacity == first.capacity
    trials = tuple(one.model_copy(update={"throughput": 1e9 - one.throughput}) for one in first.trials)
    other = first.model_copy(update={"trials": trials})
    assert other.capacity != first.capacity
    path.write_text(other.to_json())
    before = hashes(folder)
    assert run(suite, folder, Share(), instant, float("inf")) == 0
    assert Plan.read(plan).capacity == other.capacity
    changed = {name for name, origin in hashes(folder).items() if origin["plan_hash"] != before[name]["plan_hash"]}
    assert {Path(name).parent.name for name in changed} == {"system~mlora"}


@pytest.mark.slow
def test_each_run_has_a_log_and_a_command_of_its_own(swept, monkeypatch, tmp_path):
    """The command does the same run again, alone, and its losses are the same."""
    from tests import forked
    from tests.cli.test_cli import lorafusion

    folder = shutil.copytree(swept[1], tmp_path / "results")
    for path in swept[1].rglob("repeat*.json"):
        origin = json.loads(path.read_text())["provenance"]
        log = swept[1] / "logs" / "run" / path.relative_to(swept[1] / "runs").with_suffix(".log")
        assert Path(origin["log"]) == log
        assert log.exists()
        assert str(path) in shlex.split(origin["command"])
    monkeypatch.setattr("lorafusion.launch.launch.launch", forked.launch)
    for path in (path for path in folder.rglob("repeat~2.json") if "unsloth" not in path.parent.name):
        before = json.loads(path.read_text())
        path.unlink()
        command = before["provenance"]["command"].replace(str(swept[1]), str(folder))
        program, *arguments = shlex.split(command)
        assert program == "lorafusion"
        done = lorafusion(*arguments)
        assert done.returncode == 0, done.stderr
        after = json.loads(path.read_text())
        assert after["losses"] == before["losses"] != {}
        assert (after["cell"], after["provenance"]["command"]) == (before["cell"], command)


def share_of(suite: Path, folder: Path, index: int) -> None:
    sys.exit(run(suite, folder, Share(index, 2), instant, 60.0))


def test_shares_that_work_at_once_leave_nothing_old(suite, origin, tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "LOOK_SECONDS", 0.01)
    folder = tmp_path / "results"
    for seed in (1, 2):
        suite.write_text(yaml.safe_dump(yaml.safe_load(suite.read_text()) | {"seed": seed}))
        shares = [FORK.Process(target=share_of, args=(suite, folder, index)) for index in range(2)]
        for share in shares:
            share.start()
        for share in shares:
            share.join()
        assert [share.exitcode for share in shares] == [0, 0]
        assert not any(reasons(suite, folder))


def test_nothing_is_begun_when_the_time_is_up(suite, tmp_path):
    launch = partial(pytest.fail, "a run was started")
    assert run(suite, tmp_path / "results", Share(), launch, -1.0) == len(CHECKS) + 1 + 2 * 5


def test_what_another_share_tunes_is_waited_for_and_not_longer_than_the_time(suite, tmp_path):
    shares = [steps_of(suite, tmp_path, Share(index, 2)) for index in range(2)]
    (waits,) = [steps for steps in shares if not [step for step in steps if step.kind.name == "tune_cell"]]
    waiting = [step for step in waits if any(source.kind.name == "tune_cell" for source in step.inputs)]
    assert waiting
    assert first_ready(waits, -1.0) == next(step for step in waits if step not in waiting)
    assert first_ready(waiting, -1.0, 2) is None
    (tuning,) = {source for step in waiting for source in step.inputs if source.kind.name == "tune_cell"}
    write(tuning.path, "{}")
    assert first_ready(waiting, -1.0, 2) is None, "a file that is no tuning of this cell"
    runner.make_quick(tuning, instant)
    with open(tmp_path / "log", "w") as log:
        make_step(tuning, partial(instant, log=log))
    assert first_ready(waiting, -1.0, 2) == waiting[0]


def test_what_cannot_be_tuned_keeps_neither_the_rest_nor_the_share(suite, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(tuning, "tune_cell", raise_an_error)
    monkeypatch.setattr(runner, "first_ready", partial(first_ready_at_once, first_ready))
    assert run(suite, tmp_path / "results", Share(), instant, float("inf")) == 1 + 2
    assert "error: no tuning today" in capsys.readouterr().out
    assert len(list((tmp_path / "results").rglob("repeat*.json"))) == 2 * 4


def first_ready_at_once(real, steps, end, shares):
    found = real(steps, -1.0, shares)
    assert found, "waits for what will not come"
    return found


def raise_an_error(*_, **__):
    raise UserError("no tuning today")


@pytest.mark.parametrize("count", [1, 2, 3])
def test_shares_are_whole_workloads_and_together_everything(suite, tmp_path, count):
    steps = [[step.path for step in steps_of(suite, tmp_path, Share(index, count))] for index in range(count)]
    every = [step.path for step in steps_of(suite, tmp_path)]
    assert sorted(sum(steps, [])) == sorted(every)
    for one in steps:
        runs = [path for path in one if path.name.startswith("repeat")]
        for repeat in (1, 2):
            mine = {path for path in runs if path.name == f"repeat~{repeat}.json"}
            workloads = {path.parent.parent for path in mine}
            assert mine == {path for path in every if path.name == f"repeat~{repeat}.json"
                            and path.parent.parent in workloads}  # fmt: skip


@pytest.mark.parametrize(
    ("costs", "shares", "expected"),
    [
        ({"a": 5, "b": 9, "c": 4}, 2, {"b": 0, "a": 1, "c": 1}),
        ({"a": 1, "b": 1, "c": 1}, 2, {"a": 0, "b": 1, "c": 0}),
        ({"a": 1}, 3, {"a": 0}),
        ({}, 2, {}),
    ],
)
def test_workloads_are_spread_by_what_they_cost(costs, shares, expected):
    assert spread(costs, shares) == expected


def test_a_repeat_has_an_order_of_its_own_which_is_always_the_same():
    names = list("abcdefgh")
    assert shuffled(names, 1) == shuffled(names, 1) != shuffled(names, 2)
    assert sorted(shuffled(names, 2)) == names
    renamed = dict(zip(names, "zyxwvuts", strict=True))
    assert shuffled(list(renamed.values()), 1) == [renamed[name] for name in shuffled(names, 1)]


@pytest.mark.parametrize("text", ["1", "2/2", "-1/2", "a/2", "1/2/3", "0/0"])
def test_a_share_that_is_none_is_refused(text):
    with pytest.raises(UserError, match="--share: expected I/N"):
        Share.read(text)


def test_shares():
    assert Share.read("1/2") == Share(1, 2)
