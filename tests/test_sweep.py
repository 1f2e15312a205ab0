"""A suite without Snakemake: the same files, nothing twice, and work that is shared."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import yaml

from lorafusion.config import CONFIGS, cells, read_suite
from lorafusion.errors import UserError
from lorafusion.files import write
from lorafusion.plan import Plan
from lorafusion.sweep import Share, Sweep, _first_ready, shuffled, spread, sweep


@pytest.fixture
def suite(tmp_path) -> Path:
    """Two workloads, one cell tuned, one that cannot run, twice."""
    data = yaml.safe_load((CONFIGS / "suites" / "smoke.yaml").read_text())
    block = data["cells"][0] | {"samples": 8, "length_scale": 64, "gpus": [1], "capacity": 128}
    blocks = [
        block | {"systems": ["peft-bf16", "unsloth"]},
        block | {"systems": ["mlora"], "workloads": ["xsum"], "tuned": True},
    ]
    path = tmp_path / "suite.yaml"
    path.write_text(yaml.safe_dump(data | {"name": "swept", "repeats": 2, "cells": blocks}))
    return path


def files(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def test_it_leaves_what_the_workflow_would_and_does_nothing_twice(suite, tmp_path, capsys):
    from tests import forked

    folder = tmp_path / "results"
    assert sweep(suite, folder, Share(), forked.launch, float("inf")) == 0
    made = files(folder)
    names = [cell.name for cell in cells(read_suite(suite))]
    assert {name for name in made if name.startswith("runs/")} == {
        f"runs/{name}/repeat~{repeat}.json" for name in names for repeat in (1, 2)
    }
    assert [name for name in made if name.startswith("tuned/")] == [f"tuned/{names[-1]}.json"]
    tuned = json.loads((folder / f"tuned/{names[-1]}.json").read_text())
    assert Plan.read(folder / f"plans/{names[-1]}.json").capacity in {one["capacity"] for one in tuned["trials"]}
    statuses = {path.parent.name: json.loads(path.read_text())["status"] for path in folder.rglob("repeat~1.json")}
    assert statuses == {"system~peft-bf16": "ok", "system~mlora": "ok", "system~unsloth": "skipped"}
    capsys.readouterr()
    assert sweep(suite, folder, Share(), forked.launch, float("inf")) == 0
    assert capsys.readouterr().out == ""
    assert files(folder) == made


def test_nothing_is_begun_when_the_time_is_up(suite, tmp_path):
    launch = partial(pytest.fail, "a run was started")
    assert sweep(suite, tmp_path / "results", Share(), launch, -1.0) == 1 + 2 * 5


def test_what_another_share_tunes_is_waited_for_and_not_longer_than_the_time(suite, tmp_path):
    launch = partial(pytest.fail, "a run was started")
    shares = [list(Sweep(suite, tmp_path, Share(index, 2), launch).steps()) for index in range(2)]
    (waits,) = [steps for steps in shares if not [step for step in steps if "tuned" in step.path.parts]]
    waiting = [step for step in waits if step.after]
    assert waiting
    assert not any(step.is_ready for step in waiting)
    assert _first_ready(waits, -1.0) == next(step for step in waits if not step.after)
    assert _first_ready(waiting, -1.0) is None
    write(waiting[0].after, "{}")
    assert _first_ready(waiting, -1.0) == waiting[0]


def test_what_cannot_be_tuned_keeps_neither_the_rest_nor_the_share(suite, tmp_path, capsys, monkeypatch):
    from tests import forked

    monkeypatch.setattr("lorafusion.sweep.tune_cell", raise_an_error)
    monkeypatch.setattr("lorafusion.sweep._first_ready", partial(first_ready_at_once, _first_ready))
    assert sweep(suite, tmp_path / "results", Share(), forked.launch, float("inf")) == 1 + 2
    assert "error: no tuning today" in capsys.readouterr().out
    assert len(list((tmp_path / "results").rglob("repeat*.json"))) == 2 * 4


def first_ready_at_once(real, steps, end):
    found = real(steps, -1.0)
    assert found, "waits for what will not come"
    return found


def raise_an_error(*_, **__):
    raise UserError("no tuning today")


@pytest.mark.parametrize("count", [1, 2, 3])
def test_shares_are_whole_workloads_and_together_everything(suite, tmp_path, count):
    shares = [Sweep(suite, tmp_path, Share(index, count), None) for index in range(count)]
    steps = [[step.path for step in share.steps()] for share in shares]
    every = [step.path for step in Sweep(suite, tmp_path, Share(), None).steps()]
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
    assert shuffled(names, 1) == shuffled(names[::-1], 1) != shuffled(names, 2)
    assert sorted(shuffled(names, 2)) == names


@pytest.mark.parametrize("text", ["1", "2/2", "-1/2", "a/2", "1/2/3", "0/0"])
def test_a_share_that_is_none_is_refused(text):
    with pytest.raises(UserError, match="--share: expected I/N"):
        Share.read(text)


def test_shares():
    assert Share.read("1/2") == Share(1, 2)
