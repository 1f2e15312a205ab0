"""A job's name is one that its files can have, or the jobs file is refused at the start."""

from __future__ import annotations

import os
import re

import pytest
import torch

from lorafusion.core.schema import UserError
from lorafusion.train import run as training
from lorafusion.train.ownership import DECORATION, RESERVED, require_names
from lorafusion.train.run import DONE, train
from tests import forked
from tests.train.playback import jobs_file

JOB_NAME = re.compile("[A-Za-z0-9][A-Za-z0-9_-]*")


def named(tmp_path, *names: str):
    return jobs_file(tmp_path, jobs=[{"name": name, "steps": 1} for name in names])


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["x" * 240], "name: it has 240 bytes, the most is "),
        (["x" * 5000], "name: it has 5000 bytes, the most is "),
        (["same", "Same"], "jobs.Same: name: it differs from 'same' only in case"),
        (["training"], "jobs.training: name: torch's modules have an attribute of this name"),
        (["keys"], "jobs.keys: name: torch's modules have an attribute of this name"),
    ],
)
def test_a_name_that_no_file_can_have_is_refused_at_the_start(tmp_path, names, message):
    path = named(tmp_path, "fine", *names)
    with pytest.raises(UserError, match=message) as caught:
        train(path)
    assert str(caught.value).startswith(f"{path}: jobs.")
    assert len(str(caught.value)) <= 300
    assert not (tmp_path / "out").exists()


def test_the_names_that_torch_has_are_known():
    """They are written down, as torch takes seconds to import."""
    names = [name for name in dir(torch.nn.ModuleDict()) if JOB_NAME.fullmatch(name)]
    assert len(names) > 50
    assert [name for name in names if not RESERVED.fullmatch(name)] == []


def test_the_longest_name_trains_to_the_end(tmp_path, monkeypatch):
    """And another one is exported beside it."""
    monkeypatch.setattr(training, "launch", forked.launch)
    longest = "x" * (os.pathconf(tmp_path, "PC_NAME_MAX") - DECORATION)
    assert train(named(tmp_path, longest, "y")) == DONE
    assert {path.name for path in (tmp_path / "out/adapters").iterdir()} == {longest, "y"}
    assert train(named(tmp_path, longest, "y", "z")) == DONE


def test_the_limit_is_that_of_the_folders_file_system(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "pathconf", lambda path, name: 143 if path == tmp_path else 255)
    require_names(tmp_path / "out", ["x" * 111], tmp_path)
    with pytest.raises(UserError, match="it has 112 bytes, the most is 111"):
        require_names(tmp_path / "out", ["x" * 112], tmp_path)
