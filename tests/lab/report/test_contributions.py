"""The parts of the speedup are the ratios that can be worked out by hand, or a reason; and the figure shows them."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from itertools import combinations

import matplotlib
import pandas as pd
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from pypdf import PdfReader
from typer.testing import CliRunner

from lorafusion.cli.main import app
from lorafusion.lab.report import drawing, style
from lorafusion.lab.report.figures import contributions as figure_of
from lorafusion.lab.report.ratios import COLUMNS, CORNERS, FACTORS, contributions, lacking
from lorafusion.lab.report.registry import FIGURES
from lorafusion.lab.table import table as measurements
from lorafusion.lab.table.table import MeasurementError

# tokens/s: schedule 500/400, schedule and packing 600/320, kernels 900/600; mlora-packed is the best baseline, 900/650.
SPEEDS = {
    "peft": 300.0,
    "peft-bf16": 400.0,
    "megatron-fsdp": 380.0,
    "megatron-pp": 450.0,
    "mlora": 520.0,
    "mlora-packed": 650.0,
    "mlora-paper-setting": 500.0,
    "unfused-sequential": 320.0,
    "fused-sequential": 440.0,
    "fused-mlora": 800.0,
    "unfused-ours": 600.0,
    "lorafusion": 900.0,
}
MERGED = {system: 2 * SPEEDS[system] for system in CORNERS.values()} | {"lorafusion": 2000.0}


@pytest.fixture
def measure(make_run):
    """Runs with exactly the given speeds, in tokens/s.

    drift: factors of the repeats. failed: status by (workload, system, repeat).
    """

    def runs(speeds=SPEEDS, workloads=("xsum",), drift=(1.0, 1.0, 1.0), failed=None, qkv="", **cell) -> list[dict]:
        out = []
        for workload in workloads:
            for system, speed in speeds.items():
                for repeat, factor in enumerate(drift, start=1):
                    status = (failed or {}).get((workload, system, repeat), "ok")
                    name = f"model~tiny/workload~{workload}/gpus~{cell.get('gpus', 1)}/batch~8{qkv}/system~{system}"
                    result = make_run(
                        system, workload, repeat=repeat, status=status, **{"cell": name, "merged_qkv": bool(qkv)} | cell
                    )
                    for metric, value in zip(result["metrics"], (speed * factor, 10 * speed), strict=False):
                        metric["value"] = value
                    out.append(result)
        return out

    return runs


@pytest.fixture
def factors(make_table):
    """The rows of `contributions` of one window, by workload and factor."""

    def of(runs, window="whole", qkv="separate") -> pd.DataFrame:
        rows = contributions(make_table(runs))
        rows = rows[(rows["window"] == window) & (rows["qkv"] == qkv)]
        return rows.set_index(["workload", "factor"])

    return of


def test_the_factors_are_those_worked_out_by_hand(measure, factors):
    rows = factors(measure()).loc["xsum"]
    assert list(rows.index) == list(FACTORS)
    assert rows["value"].to_dict() == pytest.approx(
        {
            "speedup": 18 / 13,
            "baseline": 32 / 65,
            "schedule": 5 / 4,
            "packing": 3 / 2,
            "schedule_and_packing": 15 / 8,
            "kernels": 3 / 2,
            "product": 45 / 16,
            "padding": 5 / 4,
            "unfused-sequential": 1,
            "fused-sequential": 11 / 8,
            "unfused-mlora": 65 / 32,
            "fused-mlora": 5 / 2,
            "unfused-ours": 15 / 8,
            "fused-ours": 45 / 16,
        }
    )
    assert rows["over"].to_dict() == {
        "speedup": "mlora-packed",
        "baseline": "mlora-packed",
        "schedule": "peft-bf16",
        "packing": "schedule",
        "schedule_and_packing": "unfused-sequential",
        "kernels": "unfused-ours",
        "product": "unfused-sequential",
        "padding": "mlora",
    } | dict.fromkeys(CORNERS, "unfused-sequential")
    notes = rows["note"].dropna().to_dict()
    assert notes == {
        "packing": "derived: schedule_and_packing over schedule",
        "unfused-sequential": "1 by definition",
    }


def test_ratios_are_paired_by_repeat_and_have_a_range(measure, factors):
    """A drift that both systems have leaves no trace; one that only one has is the range."""
    rows = factors(measure(drift=(1.0, 0.5, 2.0))).loc["xsum"]
    assert rows["low"].to_dict() == pytest.approx(rows["value"].to_dict())
    slow = {"lorafusion": 900.0}
    others = {name: speed for name, speed in SPEEDS.items() if name not in slow}
    rows = factors(measure(others) + measure(slow, drift=(1.0, 1.21, 1.1))).loc["xsum"]
    speedup = rows.loc["speedup"]
    assert speedup["value"] == pytest.approx(18 / 13 * 1.1)
    assert (speedup["low"], speedup["high"]) == pytest.approx((18 / 13, 18 / 13 * 1.21))
    assert (speedup["bounds"], speedup["n"]) == ("range", 3)


def test_the_parts_multiply_to_the_whole_in_every_row(measure, factors):
    runs = []
    for index, (system, speed) in enumerate(SPEEDS.items()):
        drift = [1 + 0.01 * ((7 * index + 3 * repeat) % 5) for repeat in range(3)]
        runs += measure({system: speed}, style.WORKLOADS, drift)
    values = factors(runs)["value"].unstack()
    assert len(values) == 6
    parts = values["schedule"] * values["packing"] * values["kernels"]
    assert parts.to_dict() == pytest.approx(values["product"].to_dict())
    assert (values["baseline"] * values["product"]).to_dict() == pytest.approx(values["speedup"].to_dict())
    together = values["schedule"] * values["packing"]
    assert together.to_dict() == pytest.approx(values["schedule_and_packing"].to_dict())


def test_packing_is_paired_by_the_repeats_of_four_systems(measure, factors):
    """(600/320) / (500/400) = 3/2 in the first repeat; in the others two systems are slower, on either side."""
    slower = {"mlora-paper-setting": (1.0, 0.5, 1.0), "unfused-sequential": (1.0, 1.0, 0.75)}
    runs = [
        run for name, speed in SPEEDS.items() for run in measure({name: speed}, drift=slower.get(name, (1.0, 1.0, 1.0)))
    ]
    packing = factors(runs).loc[("xsum", "packing")]
    assert (packing["low"], packing["high"], packing["n"]) == pytest.approx((3 / 2, 3, 3))
    assert packing["value"] == pytest.approx((3 / 2 * 3 * 2) ** (1 / 3))
    short = {"peft-bf16": (1.0, 1.0)}
    runs = [
        run for name, speed in SPEEDS.items() for run in measure({name: speed}, drift=short.get(name, (1.0, 1.0, 1.0)))
    ]
    packing = factors(runs).loc[("xsum", "packing")]
    assert packing["n"] == 2
    assert packing["note"].endswith("; only repeats 1, 2 are in all")


def test_megatron_stands_in_where_peft_has_no_cell(measure, factors):
    """500/450 in place of 500/400; the product is the same, so packing is (600/320) / (500/450)."""
    speeds = {name: speed for name, speed in SPEEDS.items() if not name.startswith("peft")}
    rows = factors(measure(speeds, gpus=2)).loc["xsum"]
    assert rows["value"]["schedule"] == pytest.approx(10 / 9)
    assert rows["value"]["packing"] == pytest.approx(27 / 16)
    assert rows["value"]["product"] == pytest.approx(45 / 16)
    assert rows.loc["schedule", "over"] == "megatron-pp"
    remark = "another executor: megatron-pp, as peft-bf16 has no cell"
    assert rows.loc["schedule", "note"] == remark
    assert rows.loc["packing", "note"] == f"derived: schedule_and_packing over schedule; {remark}"
    both = factors(measure() + measure(speeds, ["mixed"]))
    assert both.loc[("all", "schedule"), "over"] == "peft-bf16 or megatron-pp"
    assert f"mixed: {remark}" in both.loc[("all", "packing"), "note"]
    assert "; derived: schedule_and_packing over schedule;" in both.loc[("all", "packing"), "note"]


def test_a_peft_that_failed_is_a_reason_and_not_replaced(measure, factors):
    rows = factors(measure(failed={("xsum", "peft-bf16", 1): "oom"})).loc["xsum"]
    assert set(rows.loc[["schedule", "packing"], "note"]) == {"peft-bf16: OOM (1 of 3 repeats)"}
    assert rows.loc[["schedule", "packing"], "value"].isna().all()
    assert rows.loc["schedule_and_packing", "value"] == pytest.approx(15 / 8)


def test_the_systems_that_the_parts_cannot_do_without():
    assert lacking(SPEEDS) == lacking(set(SPEEDS) - {"peft-bf16"}) == lacking(set(SPEEDS) - {"megatron-pp"}) == []
    assert lacking(set(SPEEDS) - {"peft-bf16", "megatron-pp"}) == ["peft-bf16 or megatron-pp"]
    assert lacking(["lorafusion", "megatron-pp", "unfused-ours"]) == ["unfused-sequential", "mlora-paper-setting"]


def test_over_all_workloads_are_the_geometric_mean_and_its_interval(measure, factors):
    """Kernels give 1.5 and 6 in two workloads: that they differ is no uncertainty, only that their repeats do."""
    others = {name: speed for name, speed in SPEEDS.items() if name != "lorafusion"}
    runs = measure(others, ["xsum", "mixed"])
    runs += measure({"lorafusion": 900.0}, ["xsum"], drift=(1.0, math.exp(0.2), math.exp(-0.2)))
    runs += measure({"lorafusion": 3600.0}, ["mixed"], drift=(1.0, 1.0, 1.0))
    kernels = factors(runs).loc[("all", "kernels")]
    assert kernels["value"] == pytest.approx(3)
    assert (kernels["bounds"], kernels["n"], kernels["note"]) == ("interval", 6, "95 % interval from 3 repeats")
    # The repeats' means are 3, 3 e^0.1 and 3 e^-0.1; Student's t of two degrees of freedom is 4.3027.
    reach = 4.3027 * 0.1 / math.sqrt(3)
    assert (kernels["low"], kernels["high"]) == pytest.approx((3 * math.exp(-reach), 3 * math.exp(reach)), rel=1e-4)


def test_a_product_over_all_workloads_is_that_of_its_parts(measure, factors):
    runs = []
    for factor, workload in enumerate(style.WORKLOADS, start=1):
        runs += measure(SPEEDS | {"lorafusion": 600.0 * factor}, [workload])
    rows = factors(runs).loc["all"]
    assert rows.loc["kernels", "value"] == pytest.approx(math.factorial(5) ** (1 / 5))
    assert rows.loc["kernels", "n"] == 15
    parts = rows.loc[["baseline", "schedule", "packing", "kernels"], "value"]
    assert parts.prod() == pytest.approx(rows.loc["speedup", "value"])


def test_too_few_repeats_have_a_range_and_say_so(measure, factors):
    speedup = factors(measure(workloads=["xsum", "mixed"], drift=(1.0, 1.0))).loc[("all", "speedup")]
    assert (speedup["bounds"], speedup["n"]) == ("range", 4)
    assert "no 95 % interval from 2 repeats, it takes 3" in speedup["note"]
    alone = factors(measure(drift=(1.0,)))
    assert "all" not in alone.index
    assert alone.loc[("xsum", "speedup")][["low", "high", "bounds"]].isna().all()


def test_workloads_of_different_repeats_have_a_range_and_say_so(measure, factors):
    runs = measure(workloads=["xsum"]) + measure(workloads=["mixed"], drift=(1.0,) * 4)
    kernels = factors(runs).loc[("all", "kernels")]
    assert (kernels["bounds"], kernels["n"]) == ("range", 7)
    assert "no 95 % interval, as the workloads have different repeats" in kernels["note"]


def test_windows_are_apart(measure, factors):
    runs = measure()
    for run in runs:
        if run["cell"]["system"] == "lorafusion":
            run["metrics"][1]["value"] = 18000.0
    assert factors(runs, "steady").loc[("xsum", "kernels"), "value"] == pytest.approx(3)
    assert factors(runs, "whole").loc[("xsum", "kernels"), "value"] == pytest.approx(1.5)


def test_merged_cells_have_their_own_corners_over_their_own_first(measure, factors):
    runs = measure() + measure(MERGED, qkv="/qkv~merged")
    merged = factors(runs, qkv="merged").loc["xsum"]
    assert sorted(merged.index) == sorted(["kernels", *CORNERS])
    assert merged["value"]["fused-ours"] == pytest.approx(2000 / 640)
    assert merged["value"]["unfused-ours"] == pytest.approx(15 / 8)
    assert merged["value"]["unfused-sequential"] == 1
    pd.testing.assert_frame_equal(factors(runs), factors(measure()))


def test_the_best_baseline_is_neither_an_ablation_nor_one_that_failed(measure, factors):
    """fused-mlora is faster than any baseline; mlora-packed failed in one repeat."""
    rows = factors(measure(failed={("xsum", "mlora-packed", 2): "oom"})).loc["xsum"]
    assert rows.loc["speedup", "over"] == "mlora"
    assert rows.loc["speedup", "value"] == pytest.approx(900 / 520)
    assert rows.loc["speedup", "note"] == "without mlora-packed: OOM (1 of 3 repeats)"
    failed = rows.loc[["padding", "unfused-mlora"]]
    assert failed[["value", "low", "high", "bounds"]].isna().all(axis=None)
    assert set(failed["note"]) == {"mlora-packed: OOM (1 of 3 repeats)"}


def test_workloads_may_have_different_best_baselines(measure, factors):
    runs = measure() + measure(SPEEDS | {"peft": 800.0}, ["mixed"])
    speedup = factors(runs).loc[("all", "speedup")]
    assert speedup["over"] == "best baseline"
    assert speedup["value"] == pytest.approx(math.sqrt(18 / 13 * 9 / 8))
    assert "xsum: over mlora-packed; mixed: over peft" in speedup["note"]


def test_a_failure_in_one_workload_leaves_no_number_over_all(measure, factors):
    rows = factors(measure(workloads=["xsum", "mixed"], failed={("mixed", "unfused-ours", 1): "timeout"}))
    assert pd.isna(rows.loc[("all", "packing"), "value"])
    assert rows.loc[("all", "packing"), "note"] == "mixed: unfused-ours: timeout (1 of 3 repeats)"
    assert rows.loc[("all", "schedule"), "value"] == pytest.approx(5 / 4)
    assert rows.loc[("all", "product"), "value"] == pytest.approx(45 / 16)


def test_missing_and_skipped_systems_are_reasons(measure, factors):
    skipped = {("xsum", "mlora", repeat): "skipped" for repeat in (1, 2, 3)}
    speeds = {name: speed for name, speed in SPEEDS.items() if name != "unfused-ours"}
    rows = factors(measure(speeds, failed=skipped)).loc["xsum"]
    assert rows.loc["kernels", "note"] == "unfused-ours: no such cell"
    assert rows.loc["padding", "note"] == "mlora: skipped"
    assert rows.loc[["kernels", "packing", "schedule_and_packing"], "value"].isna().all()
    only = factors(measure({"lorafusion": 900.0})).loc["xsum"]
    assert only.loc["speedup", "note"] == "no baseline finished"
    assert only["value"].isna().all()
    assert contributions(measurements.frame([])).columns.tolist() == COLUMNS


def test_repeats_that_only_one_has_are_not_paired(measure, factors):
    others = {name: speed for name, speed in SPEEDS.items() if name != "lorafusion"}
    speedup = factors(measure(others) + measure({"lorafusion": 900.0}, drift=(1.0, 1.0))).loc[("xsum", "speedup")]
    assert speedup["n"] == 2
    assert speedup["note"] == "only repeats 1, 2 are in both"


def test_a_part_between_two_capacities_says_so(measure, factors):
    others = {name: speed for name, speed in SPEEDS.items() if name != "lorafusion"}
    rows = factors(measure(others, capacity=4096) + measure({"lorafusion": 900.0}, capacity=8192)).loc["xsum"]
    assert rows.loc["kernels", "note"] == "capacity 8192 over 4096"
    assert pd.isna(rows.loc["schedule", "note"])


def test_packing_says_where_any_of_its_four_systems_has_another_capacity(measure, factors):
    others = {name: speed for name, speed in SPEEDS.items() if name != "peft-bf16"}
    rows = factors(measure(others, capacity=8192) + measure({"peft-bf16": 400.0}, capacity=4096)).loc["xsum"]
    assert rows.loc["schedule", "note"] == "capacity 8192 over 4096"
    assert rows.loc["packing", "note"].endswith("; capacity 8192 over 8192, divided by 8192 over 4096")
    assert pd.isna(rows.loc["schedule_and_packing", "note"])


def test_two_cells_for_one_place_are_refused(measure, make_table):
    with pytest.raises(MeasurementError, match="one bar for two numbers"):
        contributions(make_table(measure() + measure(cell="another")))


# --- the figure


@pytest.fixture
def whole_suite(measure, make_table):
    """Five workloads, all systems, separate and merged; some capacities differ."""
    runs = []
    for index, workload in enumerate(style.WORKLOADS):
        speeds = SPEEDS | {"lorafusion": 900.0 - 90 * index}
        runs += measure(speeds, [workload], (1.0, 1.02, 0.99), gpu="NVIDIA H200", capacity=8192 - 4096 * (index == 2))
    return make_table(runs + measure(MERGED, style.WORKLOADS, qkv="/qkv~merged", gpu="NVIDIA H200"))


def drawn(table):
    figure = figure_of.draw(figure_of.contributions_data(table, "tiny"))
    with matplotlib.rc_context(style.PARAMETERS):
        FigureCanvasAgg(figure).draw()
    return figure, figure.axes


def texts(ax) -> list[str]:
    return [text.get_text() for text in ax.texts]


def test_the_csv_alone_redraws_the_figure_and_equal_tables_give_equal_bytes(whole_suite, tmp_path, passed_checks):
    pdf, png, csv = FIGURES["contributions"].draw(whole_suite, tmp_path / "figure", "tiny")
    again = drawing.save(figure_of.draw(drawing.read_data(csv)), tmp_path / "again")
    assert [path.read_bytes() for path in again] == [pdf.read_bytes(), png.read_bytes()]
    assert pd.read_csv(csv).columns.tolist()[: len(COLUMNS)] == COLUMNS

    measurements.write(whole_suite, tmp_path / "table.csv", tmp_path / "table.parquet")
    passed_checks(tmp_path / "checks", whole_suite)
    command = ["figure", "contributions", str(tmp_path / "table.csv"), "--model", "tiny", "--out", str(tmp_path / "b")]
    shell = [sys.executable, "-m", "lorafusion.cli.main", *command]
    subprocess.run(shell, check=True, env=os.environ | {"PYTHONHASHSEED": "12345"})
    for path in (pdf, png, csv):
        assert path.read_bytes() == (tmp_path / "b").with_suffix(path.suffix).read_bytes()
    text = PdfReader(pdf).pages[0].extract_text()
    assert "commit 0123456789" in text
    assert "1.38×" in text


def test_bars_lead_from_unfused_sequential_to_lorafusion(measure, make_table):
    _, (parts, corners, *_) = drawn(make_table(measure()))
    spans = [(bar.get_x(), bar.get_x() + bar.get_width()) for bar in parts.patches]
    ends = [(1, 5 / 4), (5 / 4, 15 / 8), (15 / 8, 45 / 16), (65 / 32, 45 / 16)]
    assert spans == [pytest.approx(span) for span in ends]
    assert texts(parts) == ["×1.25", "×1.50", "×1.50", "1.38×"]
    assert [bar.get_width() for bar in corners.patches] == pytest.approx([1, 11 / 8, 65 / 32, 5 / 2, 15 / 8, 45 / 16])
    assert parts.get_title() == "from unfused-sequential (1) to lorafusion"
    assert parts.get_yticklabels()[0].get_text() == "xsum\nvs. mlora-packed"


def test_nothing_overlaps_or_leaves_the_figure(whole_suite):
    figure, axes = drawn(whole_suite)
    assert len(axes) == 4
    renderer = figure.canvas.get_renderer()
    legend = figure.legends[0].get_window_extent(renderer)
    for ax in axes:
        numbers = [text.get_window_extent(renderer) for text in ax.texts if text.get_rotation() == 0]
        assert len(numbers) == (24 if ax in axes[::2] else 12)
        assert not any(first.overlaps(second) for first, second in combinations(numbers, 2))
        assert all(ax.bbox.x1 >= number.x1 for number in numbers)
        names = [label.get_window_extent(renderer) for label in ax.get_yticklabels()]
        assert not any(first.overlaps(second) for first, second in combinations(names, 2))
        assert all(figure.bbox.contains(*corner) for name in names for corner in name.corners())
        assert not legend.overlaps(ax.get_tightbbox(renderer))
    assert figure.get_figheight() < 8


def test_the_speedup_over_all_has_its_interval_and_other_capacities_a_star(whole_suite):
    figure, (parts, *_) = drawn(whole_suite)
    assert len([text for text in texts(parts) if "[" in text]) == 1
    assert "95 % interval of the geometric mean" in figure.get_supxlabel()
    assert not [text for text in texts(parts) if text.endswith("*")]


def test_nothing_is_explained_that_is_not_drawn(measure, make_table, whole_suite):
    """Merged cells of one of two workloads have no bar, nor have their capacities."""
    others = {name: speed for name, speed in MERGED.items() if name != "lorafusion"}
    runs = measure(workloads=["xsum", "mixed"]) + measure(others, capacity=4096, qkv="/qkv~merged")
    some, _ = drawn(make_table(runs + measure({"lorafusion": 900.0}, qkv="/qkv~merged")))
    every, _ = drawn(whole_suite)
    for figure, shown in ((some, False), (every, True)):
        assert ("merged q, k, v" in figure.get_supxlabel()) == shown
        labels = [text.get_text() for text in figure.legends[0].get_texts()]
        assert ("with merged q, k, v" in labels) == shown
    assert "*" not in some.get_supxlabel()


def test_parts_between_two_capacities_have_a_star(measure, make_table):
    others = {name: speed for name, speed in SPEEDS.items() if name != "lorafusion"}
    figure, (parts, *_) = drawn(make_table(measure(others, capacity=4096) + measure({"lorafusion": 900.0})))
    assert texts(parts) == ["×1.25", "×1.50", "×1.50*", "1.38×"]
    assert "*: also at another capacity" in figure.get_supxlabel()


def test_parts_with_another_executor_have_a_dagger(measure, make_table):
    speeds = {name: speed for name, speed in SPEEDS.items() if not name.startswith("peft")}
    figure, (parts, *_) = drawn(make_table(measure(speeds, gpus=2)))
    assert texts(parts) == ["×1.11†", "×1.69†", "×1.50", "1.38×"]
    assert "†: order over megatron-pp, another executor, as peft-bf16 has no cell" in figure.get_supxlabel()
    assert "*" not in figure.get_supxlabel()


def test_a_range_among_intervals_has_a_double_dagger(measure, make_table, whole_suite):
    others = {name: speed for name, speed in SPEEDS.items() if name != "lorafusion"}
    runs = measure(others, ["xsum", "mixed"]) + measure({"lorafusion": 900.0}, ["mixed"])
    figure, (_, corners, *_) = drawn(make_table(runs + measure({"lorafusion": 900.0}, drift=(1.0, 1.0))))
    assert [text for text in texts(corners) if "‡" in text] == ["2.81‡"]
    assert "‡: range of all ratios, as a repeat is missing" in figure.get_supxlabel()
    assert "‡" not in drawn(whole_suite)[0].get_supxlabel()


@pytest.mark.parametrize("base", [320.0, 650.0, 850.0])
def test_ticks_are_at_least_three_and_apart(measure, make_table, base):
    figure, axes = drawn(make_table(measure(SPEEDS | {"unfused-sequential": base})))
    renderer, ax = figure.canvas.get_renderer(), axes[-2]
    labels = [label.get_window_extent(renderer) for label in ax.get_xticklabels() if label.get_text()]
    assert len(labels) >= 3
    assert not any(first.overlaps(second) for first, second in combinations(labels, 2))


def test_failures_are_text_in_place_of_bars(measure, make_table):
    failed = {("xsum", "unfused-sequential", 1): "oom", ("mixed", "unfused-ours", 2): "crash"}
    _, (parts, corners, *_) = drawn(make_table(measure(workloads=["xsum", "mixed"], failed=failed)))
    assert texts(parts) == [
        *("×1.25", "unfused-sequential: OOM", "×1.50 (no unfused-sequential)", "1.38× (no unfused-sequential)"),
        *("×1.25", "unfused-ours: crash", "unfused-ours: crash", "1.38×"),
        *("×1.25", "xsum: unfused-sequential: OOM", "mixed: unfused-ours: crash"),
        "1.385× [1.385, 1.385] (no unfused-sequential)",
    ]
    assert not corners.patches


def test_without_the_schedule_the_other_parts_keep_their_places(measure, make_table):
    _, (parts, *_) = drawn(make_table(measure(failed={("xsum", "peft-bf16", 1): "oom"})))
    assert texts(parts) == ["peft-bf16: OOM", "peft-bf16: OOM", "×1.50", "1.38×"]
    spans = [(bar.get_x(), bar.get_x() + bar.get_width()) for bar in parts.patches]
    assert spans == [pytest.approx(span) for span in [(15 / 8, 45 / 16), (65 / 32, 45 / 16)]]


def test_a_figure_of_failures_only_can_be_drawn(measure, make_table):
    failed = {("xsum", system, 1): "oom" for system in SPEEDS}
    _, axes = drawn(make_table(measure(failed=failed)))
    assert not any(ax.patches for ax in axes)


def test_cpu_numbers_say_what_they_are(measure, make_table):
    figure, _ = drawn(make_table(measure()))
    assert style.CPU_WARNING in figure.legends[0].get_title().get_text()


def test_a_panel_for_each_number_of_gpus_with_all_systems(measure, make_table):
    runs = measure(gpu="NVIDIA H200") + measure(workloads=["mixed", "xsum"], gpus=2, gpu="NVIDIA H200")
    runs += measure({"lorafusion": 900.0}, gpus=4, gpu="NVIDIA H200")
    figure, axes = drawn(make_table(runs))
    assert len(axes) == 2 * 4
    assert [ax.texts[-1].get_text() for ax in axes[1::2]] == [
        "whole run, 1 GPU", "steady state, 1 GPU", "whole run, 2 GPUs", "steady state, 2 GPUs",
    ]  # fmt: skip
    assert [len(ax.get_yticklabels()) for ax in axes[::2]] == [1, 1, 3, 3]


def test_a_table_without_the_systems_is_refused_in_one_line(measure, make_table, tmp_path, passed_checks):
    table = make_table(measure({"lorafusion": 900.0, "megatron-pp": 400.0}))
    with pytest.raises(MeasurementError, match="no cells of unfused-sequential, unfused-ours, mlora-paper-setting$"):
        FIGURES["contributions"].draw(table, tmp_path / "figure", "tiny")
    with pytest.raises(MeasurementError, match="contributions of model 'huge'"):
        FIGURES["contributions"].draw(table, tmp_path / "figure", "huge")
    measurements.write(table, tmp_path / "table.csv", tmp_path / "table.parquet")
    passed_checks(tmp_path / "checks", table)
    command = ["figure", "contributions", str(tmp_path / "table.csv"), "--model", "tiny", "--out", str(tmp_path / "f")]
    assert "no cells of unfused-sequential" in str(CliRunner().invoke(app, command).exception)
    assert not list(tmp_path.glob("f.*"))
