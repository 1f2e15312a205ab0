"""The tuner without a GPU: what it would measure, and the file that it writes."""

from __future__ import annotations

import json
from argparse import Namespace
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch

from fused_lora.gpu.host import choices
from fused_lora.gpu.host.calls import launch
from fused_lora.gpu.host.choices import Shape, Target
from fused_lora.tools import tune

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


@pytest.mark.parametrize("kernel", tune.ORDER)
def test_no_number_of_tokens_is_far_below_the_next_that_is_tuned(kernel):
    """A lookup takes the next one above, where that is less than twice as many; for GEMMs also just above a turn."""
    shapes = [shape for _, shape, _ in tune.shapes(kernel, Namespace(tokens=None, ranks=[16]))]
    tokens = sorted({shape.tokens for shape in shapes})
    assert len(shapes) == len(tokens) * len({replace(shape, tokens=0) for shape in shapes})
    assert all(after <= 4 * before for before, after in pairwise(tokens))
    if kernel in choices.GEMMS:
        assert all(after <= 2 * before for before, after in pairwise(tokens))
        assert all(after - before <= 512 for before, after in pairwise(tokens) if 512 <= after <= 4096)
        assert {1152, 2304} <= set(tokens)


@pytest.mark.parametrize("rank", [16, 128])
def test_adapters_are_whole_where_the_rank_exceeds_the_input(rank):
    """They were slices of x and the weights once: at rank 128 the kernels read beyond B, whose input was 64 wide."""
    adapters = tune.random_adapters(rank, 64, (4096, 1024), torch.device("cpu"))
    assert [[tuple(one.a.shape) for one in linear] for linear in adapters] == [[(rank, 64)]] * 2
    assert [tuple(linear[0].b.shape) for linear in adapters] == [(4096, rank), (1024, rank)]


def entry(kernel, tokens, microseconds, ranks=16):
    return choices.entry(kernel, Shape(tokens, 64, ranks=ranks), {"rows": 16}, microseconds=microseconds)


def test_what_is_measured_anew_takes_the_place_of_the_old():
    old = [entry("masks", 1, 1.0), entry("project", 1, 2.0), entry("project", 2, 3.0)]
    new = entry("project", 1, 4.0)
    assert tune.replaced(old, new) == [old[0], new, old[2]]
    assert tune.replaced(old, entry("project", 3, 5.0)) == [*old, entry("project", 3, 5.0)]


def test_masks_of_any_rank_have_one_entry():
    """Their choice is no matter of ranks: of two entries the first would be read, which was the old one."""
    new = entry("masks", 1, 4.0, ranks=64)
    assert tune.replaced([entry("masks", 1, 1.0), entry("masks", 2, 1.0)], new) == [new, entry("masks", 2, 1.0)]
    assert len(tune.replaced([entry("project", 1, 1.0)], entry("project", 1, 1.0, ranks=64))) == 2


@pytest.fixture
def measured(monkeypatch):
    """`tuned` without a GPU: what a candidate's launch does, by its index; the last to be captured is the fastest."""
    results = {}

    def spills(launches, choose):
        found = results.get(launches(), False)
        if isinstance(found, Exception):
            raise found
        return found

    running = iter(range(1000))
    monkeypatch.setattr(tune, "runner", lambda *_: lambda: next(running))
    monkeypatch.setattr(tune, "spills", spills)
    monkeypatch.setattr(tune, "captured", lambda launches, choose: None)
    monkeypatch.setattr(tune, "microseconds", lambda graphs: {index: 1000.0 - index for index in graphs})
    return results


def test_the_fastest_candidate_that_runs_and_does_not_spill(measured):
    count = len(tune.CANDIDATES["output"])
    measured |= {0: RuntimeError("no memory"), count - 1: True}
    found = tune.tuned("output", Shape(8192, 64, 64), (64,), [])
    assert found["choice"] == tune.CANDIDATES["output"][count - 2]
    assert (found["candidates"], found["failed"], found["spilled"]) == (count - 2, 1, 1)
    assert "library_microseconds" not in found  # the first, which failed
    assert found["sources"] == tune.sources_hash()


def test_nothing_but_spills_is_no_entry_and_nothing_but_errors_is_an_error(measured):
    measured |= dict.fromkeys(range(1000), True)
    assert tune.tuned("masks", Shape(8192, 64), (64,), []) is None
    measured |= dict.fromkeys(range(1000), MemoryError("all gone"))
    with pytest.raises(MemoryError, match="all gone"):
        tune.tuned("masks", Shape(8192, 64), (64,), [])


@pytest.mark.parametrize("counts", [(0, 0), (0, 2)])
def test_a_spill_of_any_launched_kernel_counts(counts):
    compiled = iter([SimpleNamespace(n_spills=count) for count in counts])
    kernel = SimpleNamespace(run=lambda *_, **__: next(compiled))
    assert tune.spills(lambda: [launch(kernel, (1,)) for _ in counts], choices.choose) == any(counts)


def test_a_part_measured_anew_leaves_the_rest_of_the_file(tmp_path, monkeypatch):
    path = tmp_path / "gpu.json"
    old = [entry("masks", 2048, 1.0), entry("masks", 8192, 2.0), entry("project", 8192, 3.0)]
    path.write_text(tune._text(old, H200))
    answers = iter([entry("masks", 2048, 9.0), None])
    monkeypatch.setattr(tune, "tuned", lambda *_: next(answers))
    tasks = [("masks", Shape(2048, 64), (64,)), ("project", Shape(8192, 64), (64,))]
    entries = tune.measure_all(tasks, path, H200)
    assert entries == [entry("masks", 2048, 9.0), *old[1:]]
    assert json.loads(path.read_text())["entries"] == entries
    assert json.loads(path.read_text())["provenance"]["gpu"] == "NVIDIA H200"
