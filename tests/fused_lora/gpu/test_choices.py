"""Launch choices: defaults that any GPU can run, measured ones for the nearest shape, and the files they come from."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fused_lora.gpu.host import choices
from fused_lora.gpu.host.choices import (
    GEMMS,
    MOST_RANKS,
    Shape,
    Target,
    choose,
    defaults,
    draws_while_projecting,
    has_gluon_kernels,
    own_gemm,
    project_registers,
    project_slots,
    rank_block,
)
from fused_lora.gpu.sm90.ring import TILE_COLUMNS, TILE_ROWS
from fused_lora.tools.tune import ORDER as KERNELS

H200 = Target("NVIDIA H200", (9, 0), 132)
A100 = Target("NVIDIA A100-SXM4-80GB", (8, 0), 108)
B200 = Target("NVIDIA B200", (10, 0), 148)
TARGETS = [H200, A100, B200, Target("interpreter", (0, 0), 4)]
SHAPE = Shape(4096, 4096)


@pytest.fixture
def tuned(tmp_path, monkeypatch):
    """A function that writes a GPU's tuned file, in an empty folder of them."""
    monkeypatch.setattr(choices, "TUNED", tmp_path)
    choices._entries.cache_clear()

    def write(*entries, slug=H200.slug):
        choices._entries.cache_clear()
        (tmp_path / f"{slug}.json").write_text(json.dumps({"provenance": {}, "entries": entries}))

    yield write
    choices._entries.cache_clear()


shapes = st.builds(
    Shape,
    tokens=st.integers(0, 2**20),
    columns=st.integers(1, 2**17),
    inner=st.integers(0, 2**17),
    linears=st.integers(1, 3),
    ranks=st.sampled_from(range(16, 257, 16)),
    bits=st.sampled_from([16, 32]),
    masked=st.booleans(),
)


@given(st.sampled_from(KERNELS), shapes, st.sampled_from(TARGETS))
def test_defaults_are_what_kernels_can_take(kernel, shape, target):
    """Blocks of a power of two; masks of whole words; enough rows and columns for the matrix units; chunks of whole
    blocks; and at least one split, none of which is without columns. That they fit is the compiler's to say."""
    found = defaults(kernel, shape, target)
    if kernel in GEMMS:
        assert found == (own_gemm() if target == H200 and shape.bits == 16 else {"gemm": choices.LIBRARY})
        return
    blocks = {name: found[name] for name in ("rows", "columns", "chunk", "warps") if name in found}
    assert all(value > 0 and value & (value - 1) == 0 for value in blocks.values()), blocks
    assert found["columns"] >= (16 if kernel == "output_pass" else 32)
    assert found["rows"] >= 16
    assert found.get("chunk", found["rows"]) % found["rows"] == 0
    assert 1 <= found.get("splits", 1) <= max(1, shape.columns // found["columns"])
    assert found["warps"] in (4, 8)
    assert found.get("stages", 1) in (1, 2, 3)


def test_few_tokens_are_split_among_more_programs():
    splits = [defaults("project", replace(SHAPE, tokens=tokens), H200)["splits"] for tokens in (1, 512, 4096, 10**6)]
    assert splits == sorted(splits, reverse=True)
    assert splits[-1] == 1 < splits[0]


def test_our_pass_over_x_has_about_a_program_for_each_multiprocessor():
    """And all the shared memory, but half where segments make more tiles: then no second one waits for the first."""
    splits = {tokens: defaults("mask_and_project", replace(SHAPE, tokens=tokens), H200)["splits"]
              for tokens in (0, 1, 2048, 4096, 8192, 8500, 10**6)}  # fmt: skip
    assert splits == {0: 8, 1: 8, 2048: 4, 4096: 2, 8192: 1, 8500: 1, 10**6: 1}
    for linears, ranks in itertools.product((1, 2, 3), (16, 32, 64, 128)):
        if ranks > MOST_RANKS[linears]:
            continue
        alone, more = (project_slots(programs, linears, ranks, H200) for programs in (132, 133))
        registers, drawing = project_registers(linears, ranks)
        multiplying = 3 * registers - drawing - 24
        assert (multiplying % 8, drawing % 8) == (0, 0)
        two = 2 * 12 * 32 * registers <= 65_536
        step = 2 * 128 * (64 + linears * ranks)
        assert 2 <= more <= alone / (1 + two)
        assert 160_000 < alone * step <= 221_184 >= (1 + two) * more * step


def test_masks_are_drawn_once():
    assert [draws_while_projecting(1, rank, 16, H200) for rank in (1, 128, 129)] == [True, True, False]
    assert [draws_while_projecting(3, rank, 16, H200) for rank in (32, 33)] == [True, False]
    assert not draws_while_projecting(1, 16, 32, H200)
    assert not draws_while_projecting(1, 16, 16, B200)


def test_kernels_in_gluon_are_for_16_bits_on_an_sm_90():
    found = [(bits, target.name) for bits in (16, 32) for target in TARGETS if has_gluon_kernels(bits, target)]
    assert found == [(16, "NVIDIA H200")]


TILED = ("project", "output_pass", "input_pass", "expand_output", "expand_input")


@pytest.mark.parametrize("bits", [16, 32])
@pytest.mark.parametrize("ranks", [16, 32, 64, 128, 256])
@pytest.mark.parametrize("kernel", TILED)
def test_tiles_are_smaller_without_a_copy_engine(kernel, ranks, bits):
    """Half as many elements on sm_80, but for those that are as small as a word of masks already."""
    shape = replace(SHAPE, ranks=ranks, bits=bits)
    small, large = (defaults(kernel, shape, target) for target in (A100, H200))
    smallest = kernel == "project" and large["columns"] == 32
    assert small["rows"] * small["columns"] * (1 if smallest else 2) == large["rows"] * large["columns"]
    assert {"rows", "columns", "splits"} >= {name for name in small if small[name] != large[name]}


def test_the_pass_over_dy_has_fewer_warps_on_an_sm_100_at_rank_64():
    """Eight spill, by Triton 3.7.1. Nothing else but the GEMM differs from an sm_90."""
    other = replace(B200, processors=H200.processors)
    kernels = [kernel for kernel in KERNELS if kernel not in GEMMS]
    for kernel, ranks, bits in itertools.product(kernels, (16, 32, 48, 64, 128), (16, 32)):
        shape = replace(SHAPE, ranks=ranks, bits=bits)
        fewer = kernel == "output_pass" and ranks in (48, 64) and bits == 16
        assert defaults(kernel, shape, other) == defaults(kernel, shape, H200) | ({"warps": 4} if fewer else {})


@pytest.mark.parametrize(
    ("max_rank", "most", "expected"),
    [(1, 128, 16), (16, 128, 16), (17, 128, 32), (64, 128, 64), (65, 128, 128), (256, 128, 128), (256, 16, 16)],
)
def test_ranks_at_a_time(max_rank, most, expected):
    assert rank_block(max_rank, most) == expected


@pytest.mark.parametrize(
    ("name", "slug"),
    [
        ("NVIDIA H200", "nvidia-h200"),
        ("NVIDIA A100-SXM4-80GB", "nvidia-a100-sxm4-80gb"),
        ("NVIDIA H100 80GB HBM3", "nvidia-h100-80gb-hbm3"),
        ("  a / b  ", "a-b"),
    ],
)
def test_the_name_of_a_tuned_file(name, slug):
    assert Target(name, (9, 0), 132).slug == slug


def test_our_gemm_takes_any_setting():
    base = own_gemm()
    assert base["gemm"] == choices.OWN
    assert own_gemm(group=4, slices=1) == base | {"group": 4, "slices": 1}


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_gpu_without_a_file_has_the_defaults(tuned, kernel):
    tuned(choices.entry(kernel, SHAPE, {"rows": 99}))
    other = replace(H200, name="NVIDIA B200")
    assert choose(kernel, SHAPE, other) == defaults(kernel, SHAPE, other)


NEAR = {
    "the same": (SHAPE, "base"),
    "other tokens": (replace(SHAPE, tokens=100), "base"),
    "as many columns, other tokens": (Shape(9000, 14000), "wide"),
    "columns count for more than tokens": (Shape(65536, 4096), "base"),
    "tokens decide among entries of one width": (Shape(60000, 14336), "wide, many tokens"),
    "between two widths": (Shape(4096, 5000), "base"),
    "ranks of the same block": (replace(SHAPE, ranks=16), "base"),
    "a wider rank": (replace(SHAPE, ranks=64), "rank 64"),
    "between two ranks": (replace(SHAPE, ranks=48), "rank 64"),
    "without dropout, of no entry": (replace(SHAPE, masked=False), "base"),
    "without dropout, however far": (Shape(10**6, 10**5, masked=False), "wide, many tokens"),
    "without dropout, of its own": (replace(SHAPE, ranks=64, masked=False), "rank 64, no dropout"),
}


@pytest.mark.parametrize("name", list(NEAR))
def test_the_nearest_entry_is_taken(tuned, name):
    tuned(
        choices.entry("output_pass", SHAPE, {"rows": "base"}, microseconds=1.5),
        choices.entry("output_pass", Shape(4096, 14336), {"rows": "wide"}),
        choices.entry("output_pass", Shape(65536, 14336), {"rows": "wide, many tokens"}),
        choices.entry("output_pass", replace(SHAPE, ranks=64), {"rows": "rank 64"}),
        choices.entry("output_pass", Shape(10, 10, ranks=64, masked=False), {"rows": "rank 64, no dropout"}),
        choices.entry("project", SHAPE, {"rows": "another kernel"}),
    )
    shape, expected = NEAR[name]
    assert choose("output_pass", shape, H200) == defaults("output_pass", shape, H200) | {"rows": expected}


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [(0, 1024), (600, 1024), (1024, 1024), (1025, 1152), (1152, 1152), (1153, 2048), (2049, 2048), (4097, 8192),
     (4096, 2048), (4095, 2048), (8192, 8192), (10**6, 8192)],
)  # fmt: skip
def test_the_next_number_of_tokens_above_is_taken(tuned, tokens, expected):
    """Its tiles take as many turns. Where it is twice as many or more, the nearest; columns decide first."""
    counts = (2048, 1024, 8192, 1152)
    tuned(
        *(choices.entry("output", Shape(count, 4096, 4096), {"gemm": count}) for count in counts),
        choices.entry("output", Shape(tokens, 8192, 4096), {"gemm": "of other columns"}),
    )
    assert choose("output", Shape(tokens, 4096, 4096), H200)["gemm"] == expected


def test_whose_gemm_is_faster_does_not_depend_on_ranks(tuned):
    tuned(choices.entry("output", SHAPE, {"gemm": choices.LIBRARY}))
    assert choose("output", replace(SHAPE, ranks=128), H200)["gemm"] == choices.LIBRARY
    assert choose("output", replace(SHAPE, linears=2), H200) == own_gemm()


@pytest.mark.parametrize(
    ("tokens", "columns", "programs"),
    [
        (8192, 4096, 128),  # 8 turns of 1024 tiles: four multiprocessors are left
        (8192, 5120, 128),
        (4352, 5120, 114),
        (128, 256, 1),
        (1, 1, 1),
        (132 * 128, 256, 132),
        (133 * 128, 256, 67),
    ],
)
def test_our_gemm_has_as_few_programs_as_take_no_longer(tokens, columns, programs):
    assert choices.gemm_programs(tokens, columns, H200) == programs


@given(st.integers(1, 2**18), st.integers(1, 2**17))
def test_the_programs_of_our_gemm_take_no_more_turns(tokens, columns):
    tiles = -(-tokens // TILE_ROWS) * -(-columns // TILE_COLUMNS)
    programs = choices.gemm_programs(tokens, columns, H200)
    assert 1 <= programs <= H200.processors
    assert -(-tiles // programs) == -(-tiles // H200.processors)


@pytest.mark.parametrize("change", [{"linears": 2}, {"ranks": 32}, {"bits": 32}], ids=lambda one: next(iter(one)))
def test_an_entry_does_not_stand_for_other_kinds_of_shapes(tuned, change):
    """Its tiles might not fit: those have the defaults."""
    tuned(choices.entry("project", SHAPE, {"rows": 99}))
    shape = replace(SHAPE, **change)
    assert choose("project", shape, H200) == defaults("project", shape, H200)


def test_what_an_entry_does_not_say_is_the_default(tuned):
    tuned(choices.entry("project", SHAPE, {"rows": 64}))
    assert choose("project", SHAPE, H200) == defaults("project", SHAPE, H200) | {"rows": 64}


@pytest.mark.parametrize("path", sorted(choices.TUNED.glob("*.json")), ids=lambda path: path.stem)
def test_the_files_that_come_with_the_package_are_sound(path):
    """Each entry is found again by its own shape, has the settings of its kernel, and says where it was measured."""
    content = json.loads(path.read_text())
    assert {"gpu", "torch", "triton", "cuda"} <= set(content["provenance"])
    target = replace(H200, name=content["provenance"]["gpu"])
    assert path.stem == target.slug
    choices._entries.cache_clear()
    seen = set()
    for item in content["entries"]:
        shape = Shape(**item["shape"])
        assert (item["kernel"], shape) not in seen
        seen.add((item["kernel"], shape))
        assert choose(item["kernel"], shape, target) == defaults(item["kernel"], shape, target) | item["choice"]
        known = own_gemm() if item["kernel"] in GEMMS else defaults(item["kernel"], shape, target)
        assert set(item["choice"]) <= set(known)
        assert item["microseconds"] > 0
        assert item.get("commit") or item.get("sources")
        assert item["measured_at"]
