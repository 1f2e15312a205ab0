"""The tuner without a GPU: what it would measure, and the file that it writes."""

from __future__ import annotations

import json
from argparse import Namespace

import pytest
import torch

from fused_lora import tune
from fused_lora.gpu import choices
from fused_lora.gpu.choices import Shape, Target

H200 = Target("NVIDIA H200", (9, 0), 132)
ARGUMENTS = Namespace(tokens=[2048, 8192], ranks=[16, 64])


@pytest.mark.parametrize("kernel", tune.ORDER)
def test_candidates_are_settings_of_their_kernel(kernel):
    for candidate in tune.CANDIDATES[kernel]:
        known = (
            choices.own_gemm() if candidate.get("gemm") == choices.OWN else choices.defaults(kernel, Shape(1, 1), H200)
        )
        assert set(candidate) <= set(known)
    assert len({json.dumps(one) for one in tune.CANDIDATES[kernel]}) == len(tune.CANDIDATES[kernel])


def test_the_library_comes_first_among_the_gemms():
    """The entry's `library_microseconds` are those of the first."""
    assert all(tune.CANDIDATES[kernel][0] == {"gemm": choices.LIBRARY} for kernel in choices.GEMMS)


@pytest.mark.parametrize("kernel", tune.ORDER)
def test_every_shape_is_measured_once(kernel):
    shapes = [shape for _, shape, _ in tune.shapes(kernel, ARGUMENTS)]
    assert len(set(shapes)) == len(shapes) > 0
    assert {shape.tokens for shape in shapes} == {2048, 8192}
    assert {shape.ranks for shape in shapes} == ({16} if kernel in choices.OF_ANY_RANK else {16, 64})
    grouped = kernel in ("project", "input_pass", "expand_input", "input")
    assert {shape.linears for shape in shapes} == ({1, 2, 3} if grouped else {1})


@pytest.mark.parametrize("rank", [16, 128])
def test_adapters_are_whole_where_the_rank_exceeds_the_input(rank):
    """They were slices of x and the weights once: at rank 128 the kernels read beyond B, whose input was 64 wide."""
    adapters = tune.random_adapters(rank, 64, (4096, 1024), torch.device("cpu"))
    assert [[tuple(one.a.shape) for one in linear] for linear in adapters] == [[(rank, 64)]] * 2
    assert [tuple(linear[0].b.shape) for linear in adapters] == [(4096, rank), (1024, rank)]


def entry(kernel, tokens, microseconds):
    return choices.entry(kernel, Shape(tokens, 64), {"rows": 16}, microseconds=microseconds)


def test_what_is_measured_anew_takes_the_place_of_the_old():
    old = [entry("masks", 1, 1.0), entry("project", 1, 2.0), entry("project", 2, 3.0)]
    new = [entry("project", 2, 4.0), entry("project", 3, 5.0)]
    assert tune._replaced(old, new) == [old[0], old[1], new[0], new[1]]
    assert tune._replaced([], new) == new


def test_the_file_is_read_back(tmp_path):
    path, entries = tmp_path / "gpu.json", [entry("masks", 1, 1.5)]
    path.write_text(tune._text(entries, H200))
    assert tune._entries(path) == entries
    assert json.loads(path.read_text())["provenance"]["gpu"] == "NVIDIA H200"
    assert tune._entries(tmp_path / "none.json") == []
