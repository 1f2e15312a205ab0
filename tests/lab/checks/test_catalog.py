"""The table of checks: every entry can be loaded, and says which figures need it."""

from __future__ import annotations

import inspect
import subprocess
import sys

import pytest

from lorafusion.core.config import CONFIGS
from lorafusion.core.plugins import load
from lorafusion.core.schema import UserError
from lorafusion.lab.checks.catalog import CHECKS, files_of, needed_by, run_check
from lorafusion.lab.checks.verdicts import CheckError, CheckOutcome, Curve, Evidence, Origin
from lorafusion.lab.suite import read_suite

SMOKE = CONFIGS / "suites" / "smoke.yaml"


@pytest.mark.parametrize("name", CHECKS)
def test_an_entry_is_whole(name):
    check, suite = CHECKS[name], read_suite(SMOKE)
    assert list(inspect.signature(load(f"lorafusion.lab.checks.{name}:check_suite", "check")).parameters) == ["suite"]
    assert check.tables
    assert check.processes(suite) >= 1
    assert isinstance(check.depends_on(suite), list)
    assert check.help.endswith(".")


def test_figures_of_runs_need_four_checks():
    assert needed_by("runs") == ("lossless", "systems", "gradients", "learning")
    assert needed_by("steps") == ("gradients", "learning")
    assert needed_by("kernels") == ("kernels",)


def test_the_table_loads_no_torch():
    code = "import sys, lorafusion.lab.checks.catalog; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"


def test_an_unknown_check_is_refused():
    with pytest.raises(UserError, match="check 'lossles'"):
        run_check("lossles", SMOKE)


@pytest.mark.parametrize("value", [0.5, float("nan"), float("inf")])
def test_an_outcome_writes_what_the_table_says(tmp_path, value):
    evidence = Evidence()
    evidence.add("error", value, 1.0)
    curves = [Curve("job-0", "alone", [1.0, 0.5])]
    outcome = CheckOutcome(
        evidence.verdict("lossless", "it holds"), Origin(suite=None, device="cpu", dtype="float64"), curves
    )
    if value == 0.5:
        outcome.write_to(tmp_path)
        assert {path.name for path in tmp_path.iterdir()} == set(files_of("lossless"))
        assert outcome.lines() == ["passed: it holds", "  error: 0.5 (at most 1)"]
    else:
        with pytest.raises(CheckError):
            outcome.write_to(tmp_path)
        assert not (tmp_path / "lossless.json").exists()


def test_a_check_without_figures_has_not_passed():
    assert not Evidence().verdict("systems", "nothing was compared").passed
