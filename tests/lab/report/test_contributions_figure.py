"""The figure of contributions shows the parts of the speedup, and says what it cannot show."""

from __future__ import annotations

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
from lorafusion.lab.report.ratios import COLUMNS
from lorafusion.lab.report.registry import FIGURES
from lorafusion.lab.table import table as measurements
from lorafusion.lab.table.table import MeasurementError
from tests.lab.report.speeds import MERGED, SPEEDS


@pytest.fixture
def whole_suite(measure, make_table):
    """Five workloads, all systems, separate and merged; some capacities differ."""
    runs = []
    for index, workload in enumerate(style.WORKLOADS):
        speeds = SPEEDS | {"lorafusion": 900.0 - 90 * index}
        runs += measure(speeds, [workload], (1.0, 1.02, 0.99), gpu="NVIDIA H200", capacity=8192 - 4096 * (index == 2))
    return make_table(runs + measure(MERGED, style.WORKLOADS, qkv="/qkv~merged", gpu="NVIDIA H200"))


def drawn(table):
    figure = figure_of.draw_contributions(figure_of.contributions_data(table, "tiny"))
    with matplotlib.rc_context(style.PARAMETERS):
        FigureCanvasAgg(figure).draw()
    return figure, figure.axes


def texts(ax) -> list[str]:
    return [text.get_text() for text in ax.texts]


def test_the_csv_alone_redraws_the_figure_and_equal_tables_give_equal_bytes(whole_suite, tmp_path, passed_checks):
    pdf, png, csv = FIGURES["contributions"].draw(whole_suite, tmp_path / "figure", "tiny")
    again = drawing.save(figure_of.draw_contributions(drawing.read_data(csv)), tmp_path / "again")
    assert [path.read_bytes() for path in again] == [pdf.read_bytes(), png.read_bytes()]
    assert pd.read_csv(csv).columns.tolist()[: len(COLUMNS)] == COLUMNS

    measurements.write(whole_suite, tmp_path / "table.csv", tmp_path / "table.parquet")
    passed_checks(tmp_path / "checks", whole_suite)
    table = str(tmp_path / "table.csv")
    command = ["lab", "figure", "smoke", "contributions", table, "--model", "tiny", "--out", str(tmp_path / "b")]
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
    table = str(tmp_path / "table.csv")
    command = ["lab", "figure", "smoke", "contributions", table, "--model", "tiny", "--out", str(tmp_path / "f")]
    assert "no cells of unfused-sequential" in str(CliRunner().invoke(app, command).exception)
    assert not list(tmp_path.glob("f.*"))
