"""The kernel suite: what it refuses, what it measures, and that its verification fails where a kernel is wrong."""

from __future__ import annotations

import json
import shlex
from unittest.mock import patch

import pytest
import torch
import yaml

import fused_lora.cpu
import fused_lora.reference
from lorafusion.core.schema import UserError
from lorafusion.lab.checks import kernels
from lorafusion.lab.experiments import EXPERIMENTS
from lorafusion.lab.experiments.implementations import Builder, Setting
from lorafusion.lab.experiments.kernel_times import measured
from lorafusion.lab.experiments.timing import median_ratio, seconds
from lorafusion.lab.experiments.traffic import summed_bytes
from lorafusion.lab.operators import saved_bytes
from lorafusion.lab.table import table

CPU = torch.device("cpu")
KERNELS = EXPERIMENTS["kernels"]
LINEAR = "linear~64x64/rank~16/dropout~0.1"


@pytest.fixture
def small(tmp_path, monkeypatch):
    """Changes the first block of linears of the smoke entry, in a file of its own."""
    data = yaml.safe_load(KERNELS.config.read_text())["smoke"]
    path = tmp_path / "kernels.yaml"
    monkeypatch.setattr(KERNELS, "config", path)

    def write(**changes):
        data["linears"][0] |= changes
        path.write_text(yaml.safe_dump({"smoke": data}))

    return write


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ranks": [0]}, r"linears\.0\.ranks\.0: input should be greater than or equal to 1 \(found 0\)"),
        ({"dropouts": [1.0]}, r"linears\.0\.dropouts\.0: input should be less than 1 \(found 1\.0\)"),
        ({"tokens": []}, "tokens must be one or more numbers"),
        ({"tokens": {"first": 9, "last": 3, "step": 1}}, "tokens must be one or more"),
        ({"implementations": ["fused"]}, "implementations must begin with frozen"),
        ({"adapters": [0]}, r"linears\.0\.adapters\.0: input should be greater than or equal to 1 \(found 0\)"),
        ({"shapes": [[64, 64], [64, 64]]}, "bench linear~64x64/rank~16/dropout~0.1 is in the suite twice"),
        ({"token": [1]}, "token: unknown key"),
        ({"implementations": ["frozen", "peft-none"]}, "implementations.*peft-none"),
    ],
)
def test_a_bad_entry_is_named(small, change, message):
    small(**change)
    with pytest.raises(UserError, match=message) as caught:
        KERNELS.points("smoke")
    assert str(KERNELS.config) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_unknown_suite_or_point_is_named():
    with pytest.raises(UserError, match="unknown suite of kernels 'nope'; known: h200"):
        KERNELS.entry_of("nope")
    with pytest.raises(UserError, match="unknown point of kernels 'nope'; known: layer~tiny"):
        KERNELS.point("smoke", "nope")
    with pytest.raises(UserError, match="unknown point of kernels 'traffic'"):
        KERNELS.point("smoke", "traffic")


def test_the_papers_points_are_there():
    """25 numbers of tokens for each square shape; one hash for each bench."""
    points = {point.name: point for point in KERNELS.points("h200")}
    for size in (4096, 5120, 8192):
        assert len(points[f"linear~{size}x{size}/rank~16/dropout~0.1"].subject.block.token_counts) == 25
    assert len({KERNELS.key(point) for point in points.values()}) == len(points)
    adapters = [case.adapters for case in points[LINEAR.replace("64", "4096")].subject.cases(2048)]
    assert adapters == [0, 1, 1, 1, 4, 16]
    assert (points["traffic"].repeats, KERNELS.resources(points["traffic"]).minutes) == (1, 20)


def test_a_result_file_becomes_rows_of_the_table(small, tmp_path):
    path = tmp_path / "repeat~1.json"
    small(tokens=[64])
    assert KERNELS.run(KERNELS.point("smoke", LINEAR), 1, path, None) == "40 numbers, 0 failed"
    recorded = json.loads(path.read_text())["provenance"]["command"]
    assert shlex.split(recorded) == ["lorafusion", "lab", "run", "smoke", "--step", str(path)]
    rows = table.summarise(table.read_results([path]))
    table.validate(rows)
    times = rows[(rows["metric"] == "time") & (rows["statistic"] == "median") & (rows["pass"] == "both")]
    assert set(times["implementation"]) == {"frozen", "peft", "peft-bf16", "fused", "fused-multi"}
    assert (times["value"] > 0).all()
    assert set(times["tokens"]) == {64}


def test_a_case_without_memory_is_a_row_without_a_value():
    point = KERNELS.point("smoke", LINEAR)
    suite, bench = point.settings, point.subject
    builder = Builder(bench, Setting(CPU, torch.float32, 1))
    build = builder.build

    def failing(point):
        if point.implementation == "peft":
            raise torch.OutOfMemoryError("too large")
        return build(point)

    with patch.object(builder, "build", failing):
        rows = measured(bench, 64, builder, suite, repeat=1)
    failed = [row for row in rows if row["status"] != "ok"]
    assert {row["implementation"] for row in failed} == {"peft"}
    assert {row["metric"] for row in failed} == {row["metric"] for row in rows}
    assert all(row["status"] == "oom" and row["value"] is None for row in failed)
    json.dumps(rows)


def test_times_are_of_all_functions_in_turns():
    calls = []
    found = seconds({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, CPU, replays=5)
    assert [len(times) for times in found.values()] == [5, 5]
    assert all(set(calls[i : i + 2]) == {"a", "b"} for i in range(0, 10, 2))


def test_ratios_are_of_each_round():
    """The clock changes after the second round, for both: the medians' ratio would be 2.2."""
    assert median_ratio([1.1, 1.1, 2.2, 2.2, 2.2], [1.0, 1.0, 2.0, 2.0, 1.0]) == pytest.approx(1.1)


def test_saved_bytes_counts_each_storage_once():
    x, w = torch.ones(10, 4, requires_grad=True), torch.ones(4, 4)

    def forward():
        hidden = x @ w
        return hidden * hidden.exp()

    # hidden, saved by the product and by exp, and exp's result.
    assert saved_bytes(forward, {x.data_ptr(), w.data_ptr()}) == 2 * 10 * 4 * 4


def test_bytes_of_ncus_table_are_summed_in_their_units():
    table = [
        ("ID", "Kernel Name", "dram__bytes_read.sum", "dram__bytes_write.sum"),
        ("", "", "Mbyte", "Kbyte"),
        ("0", "at::cuda::spin_kernel(long)", "7", "7"),
        ("1", "gemm", "1,000.5", "2"),
        ("2", "pass", "1", "0"),
        ("3", "at::cuda::spin_kernel(long)", "7", "7"),
        ("4", "gemm", "3", "0"),
    ]
    text = "==PROF== x\n" + "".join(",".join(f'"{value}"' for value in row) + "\n" for row in table)
    assert summed_bytes(text, 2) == [1_001_502_000, 3_000_000]
    for wrong in (text, "==ERROR== no permission"):
        with pytest.raises(UserError, match="expected a table with the kernels of 3 implementations, found"):
            summed_bytes(wrong, 3)


@pytest.mark.parametrize("mixed", [False, True])
def test_verification_sees_a_wrong_scale_and_a_wrong_gradient(mixed):
    problem = kernels.random_problem(48, 40, 70, 8, mixed, CPU, torch.float32, seed=1)
    found = kernels.errors(problem)
    assert found.pop("LoRA term") < 1e-6
    assert max(found.values()) <= 1.5
    original = kernels.kernels

    def scaled(problem):
        return original(problem) | {"y": original(problem)["y"] * (1 + 1e-4)}

    def shifted(problem):
        out = original(problem)
        out["da"][0, 0] += 1e-2
        return out

    with patch.object(kernels, "kernels", scaled):
        assert kernels.errors(problem)["LoRA term"] > kernels.MOST_SCALE_ERROR[torch.float32]
    with patch.object(kernels, "kernels", shifted):
        assert kernels.errors(problem)["da"] > kernels.MOST_ERROR[torch.float32]


@pytest.mark.parametrize(
    ("module", "name", "change"),
    [
        (fused_lora.reference, "_factor", lambda original: lambda *a: original(*a) * 1.01),
        (fused_lora.cpu, "words_of_threshold", lambda original: lambda key, *rest: original(key ^ 1, *rest)),
        (fused_lora.cpu, "lora_backward", lambda original: lambda dy, *rest: original(dy * 1.01, *rest)),
    ],
    ids=["scale", "masks", "backward"],
)
def test_verification_takes_nothing_from_what_it_verifies(monkeypatch, module, name, change):
    """On a CPU the kernels are the reference: what is wrong in it must not be on both sides."""
    assert kernels.verify(KERNELS.entry_of("smoke"), "smoke").passed
    monkeypatch.setattr(module, name, change(getattr(module, name)))
    assert not kernels.verify(KERNELS.entry_of("smoke"), "smoke").passed


def test_masks_are_compared_element_by_element(monkeypatch):
    problem = kernels.random_problem(48, 40, 70, 8, True, CPU, torch.float32, seed=1)
    assert kernels.wrong_mask_elements(problem) == 0
    original = fused_lora.cpu.words_of_threshold
    monkeypatch.setattr(fused_lora.cpu, "words_of_threshold", lambda *arguments: original(*arguments) ^ 1)
    assert kernels.wrong_mask_elements(problem) > 0
