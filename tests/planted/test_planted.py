"""Every planted error is noticed by the tests that it names. `make planted` tries all of them, `make test` a sample."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys

import pytest

from tests.planted.plant import CHOSEN, ERRORS, HOOK, MARK, ROOT, Planted, every_error
from tests.planted.table import DOCUMENT, document

EVERY = every_error()
SAMPLE = {
    "plans.the_checker_overlooks_a_missing_sample",
    "plans.masks_begin_again_with_an_epoch",
    "keys.of_two_equal_keys_the_last_counts",
    "runs.tokens_are_what_the_plan_says_of_itself",
}  # of each area one whose tests take seconds
TESTS_FAILED = 1  # pytest's exit status; 2 to 5 are errors of its own
SECONDS = 600
FRAME = re.compile(r"^(\S+\.py:\d+): in ", re.MULTILINE)  # of a short traceback


def has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def caught(error: Planted, test: str, folder) -> str:
    """Empty where the test fails on the error as it should, else what happened instead."""
    mark = folder / "replaced"
    environment = os.environ | {
        CHOSEN: error.name,
        MARK: str(mark),
        "PYTHONPATH": os.pathsep.join([str(HOOK), str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]),
    }
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-n0", "--tb=short", "-p", "no:cacheprovider",
               "-m", "not slurm", test]  # fmt: skip
    environment.pop("PYTEST_ADDOPTS", None)
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=SECONDS,
                          check=False)  # fmt: skip
    tail = done.stdout[-3000:] + done.stderr[-1000:]
    if not mark.exists():
        return f"{error.symbol} was not replaced\n{tail}"
    if done.returncode != TESTS_FAILED:
        return f"{test} did not fail: pytest ended with status {done.returncode}\n{tail}"
    frames = FRAME.findall(done.stdout)
    if frames and frames[-1].startswith("tests/planted/"):
        return f"the replacement itself fails at {frames[-1]}\n{tail}"
    return ""


def marked(error: Planted):
    return pytest.param(error, id=error.name, marks=[] if error.name in SAMPLE else [pytest.mark.planted])


@pytest.mark.timeout(SECONDS)
@pytest.mark.parametrize("error", [marked(error) for error in EVERY.values()])
def test_is_noticed(error, tmp_path):
    if error.gpu and not has_gpu():
        pytest.skip("this machine has no usable NVIDIA GPU")
    for test in error.caught_by:
        missed = caught(error, test, tmp_path)
        assert not missed, f"{error.name}: {missed}"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("nothing_changes", "did not fail: pytest ended with status 0"),
        ("nothing_is_imported", "was not replaced"),
        ("the_error_itself_fails", "the replacement itself fails"),
        ("there_is_no_such_test", "did not fail: pytest ended with status 4"),
    ],
)
def test_what_is_no_proof_is_told(name, said, tmp_path):
    importlib.import_module("tests.planted._controls")
    error = ERRORS[f"_controls.{name}"]
    assert said in caught(error, error.caught_by[0], tmp_path)


def test_the_document_lists_every_error():
    assert DOCUMENT.read_text() == document(EVERY.values()), "write it anew: make planted-table"


def test_the_sample_is_of_known_errors():
    assert set(EVERY) >= SAMPLE
