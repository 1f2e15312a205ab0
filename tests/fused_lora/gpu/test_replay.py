"""Calls that are done again from a record tell CUDA's driver what they told it the first time: `replayed.py`."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest
import torch

from fused_lora.gpu.host.record import Allocation, Operation, Recorder, stand_in
from tests.fused_lora.gpu.replayed import CASES, MORE_CASES

MODULE = "tests.fused_lora.gpu.replayed"
NEEDS_GCC = pytest.mark.skipif(not shutil.which("gcc"), reason="Triton launches nothing without gcc")


@pytest.fixture(scope="module")
def replayed():
    """A process that answers the name of a case with what is different."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "bufsize": 1}
    with subprocess.Popen([sys.executable, "-m", MODULE], **pipes) as process:

        def ask(name: str) -> list[str]:
            print(name, file=process.stdin)
            return json.loads(process.stdout.readline())

        yield ask
        process.stdin.close()


@NEEDS_GCC
@pytest.mark.parametrize("name", CASES)
def test_the_driver_is_told_the_same(replayed, name):
    assert replayed(name) == []


@NEEDS_GCC
@pytest.mark.slow  # each compiles some kernels
@pytest.mark.parametrize("name", MORE_CASES)
def test_the_driver_is_told_the_same_in_more_cases(replayed, name):
    assert replayed(name) == []


def test_a_record_has_memory_views_and_operations():
    x = stand_in(torch.zeros(4, 6).t())
    with Recorder([x], None) as recorder:
        y = x.new_empty(6, 4)
        y[2:].add_(x[2:])
        z = y.to(torch.float16)
    allocation, addition, cast = recorder.steps
    assert (allocation, cast.result) == (Allocation(recorder.reference(y)), recorder.reference(z).slot)
    target, term = addition.arguments
    assert (target.slot, target.offset, target.strides) == (1, 8, (4, 1))
    assert (term.slot, term.offset, term.strides) == (0, 2, (1, 6))
    assert isinstance(cast, Operation)
    assert cast.arguments == (recorder.reference(y),)
