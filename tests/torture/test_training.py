"""A tenth of what `make torture` does to trainings, in a process without threads, from which others can be forked."""

from __future__ import annotations

import subprocess
import sys

import pytest

from lorafusion.core.source_tree import ROOT


@pytest.mark.slow
@pytest.mark.parametrize(("part", "count"), [("training_kills", 6), ("training_damage", 12)])
def test_a_training_bears_some_of_it(tmp_path, part, count):
    call = f"run({count}, 25, Path({str(tmp_path)!r}))"
    code = f"from pathlib import Path; from tests.torture.{part} import run; print({call})"
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (ended.stdout, ended.returncode) == ("[]\n", 0), ended.stderr[-2000:]
