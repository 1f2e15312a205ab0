"""The program under hostile inputs: a sample of them, and that the harness finds what it looks for."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace

import pytest

from lorafusion.cli.main import app
from tests.cli.test_outputs import commands
from tests.torture import inputs, valid
from tests.torture.case import Case, Server, run

COMMANDS = [" ".join(words) for words, _ in commands(app)]
SHOW = Case("show", "plan show", ("plan.json",), {"plan.json": b"{}"}, light=True)
# What the harness says of each error of tests/torture/plants.py.
PLANTS = {
    "traceback": r"traceback: AttributeError",
    "long_line": r"a line of 301 characters",
    "control_character": r"control characters",
    "file_written": r"written: 'work/written'",
    "file_changed": r"changed: 'work/plan.json'",
    "file_written_outside": r"outside: open '.*/outside'",
    "hang": r"hangs: still running after 2 s",
    "loop": r"2\.\d s of CPU",
    "memory": r"1\.\d GiB of memory",
    "torch_imported": r"import torch",
    "process_left": r"left processes: sleep",
    "other_status": r"status 1, expected 2",
    "nothing_said": r"says no error",
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_has_hostile_inputs(command):
    """A new command needs some: in `tests/torture/files.py` or `calls.py`."""
    assert sum(" ".join(case.line).startswith(command) for case in inputs.cases()) >= 8


def test_there_are_enough_inputs_and_each_has_a_name():
    names = [case.name for case in inputs.cases()]
    assert len(names) >= 400
    assert [name for name, count in Counter(names).items() if count > 1] == []


@pytest.mark.parametrize("plant", PLANTS)
def test_a_planted_error_is_found(plant, tmp_path):
    server = Server(tmp_path, tmp_path / "caches", [f"tests.torture.plants:{plant}"])
    _, wrong = run(replace(SHOW, wall=2.0 if plant == "hang" else SHOW.wall), server, tmp_path / "place", 0.0)
    server.close()
    assert any(re.match(PLANTS[plant], line) for line in wrong), wrong


def test_without_a_planted_error_nothing_is_found(tmp_path):
    server = Server(tmp_path, tmp_path / "caches")
    for fresh in (False, True):
        ended, wrong = run(replace(SHOW, fresh=fresh), server, tmp_path / "place", inputs.start_of(server, tmp_path))
        assert (ended.status, wrong) == (2, [])
    server.close()


def test_a_good_plan_is_shown(tmp_path):
    """What the hostile inputs are made of is right: else they would be refused for another reason."""
    server = Server(tmp_path, tmp_path / "caches")
    good = replace(SHOW, files={"plan.json": valid.text(valid.plan())}, statuses=frozenset({0}))
    assert run(good, server, tmp_path / "place", 0.0)[1] == []
    server.close()


@pytest.mark.slow
def test_a_sample_of_the_hostile_inputs_is_refused():
    """A tenth; `make torture` tries all of them."""
    sample = inputs.sample()
    assert len(sample) >= len(inputs.cases()) / 10
    wrong = inputs.run(sample, servers=1, warm=True)
    assert {name: lines for name, lines in wrong.items() if lines} == {}
