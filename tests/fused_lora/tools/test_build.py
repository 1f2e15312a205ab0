"""Ahead-of-time compiling, which needs no GPU: what is launched, what is made of it, and what counts as a problem."""

from __future__ import annotations

import csv
import sys
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
import triton
import triton.language as tl

from fused_lora.gpu.host import choices
from fused_lora.gpu.portable import masks
from fused_lora.tools import build

SOUND = {
    "registers": 128, "spill_bytes": 0, "shared_bytes": 200_000, "instructions": 900, "wgmma": 4, "bulk_loads": 6,
    "float64": 0,
}  # fmt: skip
LIBRARY_KERNELS = {
    "draw_masks_kernel", "project_kernel", "finish_project_kernel", "expand_output_kernel", "output_pass_kernel",
    "finish_output_kernel", "expand_input_kernel", "input_pass_kernel", "finish_input_kernel",
}  # fmt: skip
GATING = {"gate_kernel", "gate_backward_kernel"}
# With 512 tokens, which are few: the columns are split.
H100_KERNELS = LIBRARY_KERNELS - {"project_kernel"} | {"mask_and_project_kernel"}
OWN_KERNELS = H100_KERNELS - {"expand_output_kernel", "expand_input_kernel"} | set(build.GLUON_KERNELS)


def expected_kernels(case, target):
    kernels = H100_KERNELS if target == 90 and case.dtype != torch.float32 else LIBRARY_KERNELS
    kernels = OWN_KERNELS if case.gemm["gemm"] == choices.OWN else kernels
    kernels = kernels | GATING if case.gated else kernels
    if case.gemm["gemm"] == choices.OWN and case.rank % 16:
        kernels = kernels | {"pad_kernel"}
    if target == 90 and case.rank > choices.MOST_RANKS[case.linears]:
        kernels = kernels - {"mask_and_project_kernel"} | {"project_kernel"}
    elif target == 90 and case.dtype != torch.float32 and case.tokens == 8192:
        kernels = kernels - {"finish_project_kernel"}
    return kernels if case.masked else kernels - {"draw_masks_kernel"}


@pytest.fixture(autouse=True)
def _no_builds_from_before(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))


@pytest.mark.parametrize(
    ("case", "kernels"),
    [
        (build.Case("library, gated", gated=True, tokens=512), H100_KERNELS | GATING),
        (build.Case("own", gemm=choices.own_gemm(), tokens=512), OWN_KERNELS),
    ],
    ids=["library", "own"],
)
def test_the_kernels_of_a_case_compile_for_an_h100(case, kernels):
    rows = build.build([90], 1, (case,))
    assert {row["kernel"] for row in rows} == kernels
    assert len(rows) == len(kernels)
    assert {row["kernel"]: row["problem"] for row in rows if row["problem"]} == {}
    assert all(row["registers"] > 0 and row["instructions"] > 100 for row in rows)
    for row in rows:
        assert (row["wgmma"] > 0 and row["bulk_loads"] > 0) or row["kernel"] not in build.GLUON_KERNELS


@pytest.mark.parametrize("target", sorted(build.SHARED_LIMIT))
def test_every_case_launches_all_the_kernels_that_it_needs(target):
    for case in build.CASES:
        if case.gemm["gemm"] in build.gemms_of(target):
            kernels = {one.kernel for one in build.launches(case, target)}
            assert kernels == expected_kernels(case, target), case.name


def test_our_gemm_is_compiled_where_it_may_be_launched(monkeypatch):
    assert {target: build.gemms_of(target) for target in build.SHARED_LIMIT} == {
        80: {choices.LIBRARY},
        90: {choices.LIBRARY, choices.OWN},
        100: {choices.LIBRARY},
    }
    compiled = []
    monkeypatch.setattr(build, "ProcessPoolExecutor", lambda jobs: nullcontext(SimpleNamespace(map=map)))
    monkeypatch.setattr(build, "_compile", lambda target, case, one: compiled.append((target, one.kernel)))
    build.build([80, 90, 100])
    assert {target for target, kernel in compiled if kernel in build.GLUON_KERNELS} == {90}
    assert {target for target, kernel in compiled if kernel == "expand_output_kernel"} == {80, 90, 100}


def test_no_launch_is_compiled_twice():
    cases = (build.Case("first"), build.Case("second"), build.Case("no masks", masked=False))
    (_, first), (_, second), (_, third) = build.distinct(cases, 90)
    assert (len(first), len(second)) == (len(H100_KERNELS) - 1, 0)
    assert {one.kernel for one in third} == {"mask_and_project_kernel", "expand_input_kernel", "input_pass_kernel"}


def test_launches_overlap_where_the_gpu_can():
    case = build.Case("one adapter")
    overlapped = {target: [dict(one.options) for one in build.launches(case, target)] for target in (80, 90)}
    assert all("launch_pdl" not in options for options in overlapped[80])
    assert all(options["launch_pdl"] for options in overlapped[90])


PROBLEMS = {
    "nothing": ({}, {}, ""),
    "spills": ({"spill_bytes": 8}, {}, "spills 8 bytes"),
    "shared memory": (
        {"shared_bytes": 232_449},
        {},
        "232449 bytes of shared memory, at most 232448",
    ),
    "shared memory of an older GPU": ({}, {"target": 80}, "200000 bytes of shared memory, at most 166912"),
    "registers": ({"registers": 256}, {"warps": 16}, "256 registers in each of 512 threads"),
    "as many registers as there are": ({"registers": 255}, {"warps": 8}, ""),
    "float64": ({"float64": 3}, {}, "3 instructions in float64"),
    "a GEMM without wgmma": ({"wgmma": 0}, {"kernel": "output_gemm_kernel"}, "0 wgmma and 6 bulk loads"),
    "a GEMM without the copy engine": ({"bulk_loads": 0}, {"kernel": "input_gemm_kernel"}, "4 wgmma and 0 bulk loads"),
    "a pass without wgmma": ({"wgmma": 0, "bulk_loads": 0}, {}, ""),
    "our pass without wgmma": ({"wgmma": 0}, {"kernel": "mask_and_project_kernel"}, "0 wgmma and 6 bulk loads"),
    "two problems": ({"spill_bytes": 8, "float64": 1}, {}, "spills 8 bytes; 1 instructions in float64"),
}


@pytest.mark.parametrize("name", list(PROBLEMS))
def test_a_problem_is_named(name):
    measured, change, expected = PROBLEMS[name]
    given = {"kernel": "project_kernel", "target": 90, "measured": SOUND | measured, "warps": 8}
    assert build._problem(**(given | change)) == expected


@triton.jit
def promoted_kernel(x, factor: tl.constexpr):
    place = x + tl.arange(0, 128)
    tl.store(place, (tl.load(place).to(tl.float64) * factor).to(tl.float32))


@triton.jit
def broken_kernel(x, size: tl.constexpr):
    tl.store(x + tl.arange(0, size), 0.0)


@pytest.mark.parametrize(
    ("kernel", "constants", "problem"),
    [
        (promoted_kernel, (("factor", 1.1),), "instructions in float64"),
        (broken_kernel, (("size", 3),), "does not compile: "),  # not a power of two
    ],
)
def test_a_bad_kernel_is_found(monkeypatch, kernel, constants, problem):
    """Compiled, not only judged; a kernel that does not compile is a row of the table, too."""
    name = kernel.fn.__name__
    monkeypatch.setattr(masks, name, kernel, raising=False)
    signature = (("x", "*fp32"), *((constant, "constexpr") for constant, _ in constants))
    row = build._compile(90, "a case", build.Launch(name, signature, constants, ("x",), ()))
    assert problem in row["problem"]
    assert (row["kernel"], row["case"], row["target"]) == (name, "a case", 90)


def test_an_unknown_target_is_named_in_one_line(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["build", "--targets", "90", "70"])
    with pytest.raises(SystemExit, match=r"^error: --targets: expected some of \[80, 90, 100\], found 70$"):
        build.main()


@pytest.mark.parametrize("problem", ["", "spills 8 bytes"])
def test_the_table_is_written_and_a_problem_makes_the_command_fail(monkeypatch, tmp_path, capsys, problem):
    rows = [
        {"kernel": "first_kernel", "case": "c", "target": 90, **SOUND, "problem": ""},
        {"kernel": "second_kernel", "case": "c", "target": 90, **SOUND, "problem": problem},
    ]
    monkeypatch.setattr(build, "build", lambda targets, jobs: rows)
    path = tmp_path / "folder" / "builds.csv"
    monkeypatch.setattr(sys, "argv", ["build", "--out", str(path)])
    with pytest.raises(SystemExit) as caught:
        build.main()
    assert caught.value.code == bool(problem)
    with path.open(newline="") as file:
        assert [row["problem"] for row in csv.DictReader(file)] == ["", problem]
    out, err = capsys.readouterr()
    assert out == f"2 builds of 2 kernels, {int(bool(problem))} with a problem\n"
    assert err == (f"error: second_kernel for sm_90 (c): {problem}\n" if problem else "")


def test_no_case_repeats_a_name():
    assert len({case.name for case in build.CASES}) == len(build.CASES)
    assert {case.dtype for case in build.CASES} == {torch.bfloat16, torch.float16, torch.float32}
