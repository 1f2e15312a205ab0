"""The Triton kernels themselves, without a GPU: in Triton's interpreter, by a process that runs `interpreted.py`."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("interpreted.py")
INTERPRETED = runpy.run_path(str(SCRIPT))
CASES, ISOLATION, EMPTY = (INTERPRETED[name] for name in ("CASES", "ISOLATION", "EMPTY"))


@pytest.fixture(scope="module")
def kernels():
    """A process that answers the name of a case with what is wrong with it."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "bufsize": 1}
    with subprocess.Popen([sys.executable, SCRIPT], **pipes) as process:
        yield process
        process.stdin.close()


@pytest.mark.parametrize("name", list(CASES))
def test_kernels_equal_the_reference(kernels, name):
    assert problems(kernels, name) == []


@pytest.mark.parametrize("seed", range(4))
def test_kernels_equal_the_reference_in_a_case_by_chance(kernels, seed):
    assert problems(kernels, seed) == []


@pytest.mark.parametrize(
    "name",
    [
        "mixed ranks and segments",
        "two linears",
        "an adapter in two segments",
        "gated, mixed ranks and segments, float16",
    ],
)
def test_rows_that_are_no_numbers_stay_with_their_adapter(kernels, name):
    """NaN and infinity in the rows of neighbours, which lie in the same tiles, change no bit of the others."""
    assert problems(kernels, f"{ISOLATION}{name}") == []


@pytest.mark.parametrize("name", ["one adapter", "two linears", "gated, mixed ranks and segments, float16"])
def test_segments_without_tokens_change_nothing(kernels, name):
    """A CUDA graph has as many as any microbatch that it is replayed for."""
    assert problems(kernels, f"{EMPTY}{name}") == []


def problems(kernels, name):
    print(name, file=kernels.stdin)
    answer = kernels.stdout.readline()
    assert answer, f"the process ended with {kernels.wait()}"
    return json.loads(answer)
