"""Figures show what the table says, embed their fonts, and are the same bytes for the same table."""

from __future__ import annotations

import os
import subprocess
import sys
from itertools import combinations

import matplotlib
import numpy as np
import pandas as pd
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.text import Annotation
from pypdf import PdfReader

from lorafusion.core.config import read_systems
from lorafusion.lab.report import drawing, style
from lorafusion.lab.report.figures import end_to_end
from lorafusion.lab.report.registry import FIGURES
from lorafusion.lab.table import table as measurements
from lorafusion.lab.table.table import MeasurementError

SUFFIXES = ("pdf", "png", "csv")
END_TO_END = FIGURES["end_to_end"]
PAPERS = ("peft", "megatron-fsdp", "megatron-pp", "mlora", "lorafusion")


def full_grid(make_run, gpu="NVIDIA H200", repeats=3) -> list[dict]:
    """Five workloads, five systems, three numbers of GPUs: the widest figure of the paper's grid."""
    return [
        make_run(system, workload, gpus, repeat, gpu=gpu)
        for repeat in range(1, repeats + 1)
        for workload in style.WORKLOADS
        for gpus in (1, 2, 4)
        for system in PAPERS
        if system != "peft" or gpus == 1
    ]


def one_gpu(make_run) -> list[dict]:
    """Five workloads on one GPU, every system of configs/systems.yaml, one of which is skipped."""
    return [
        make_run(system, workload, 1, repeat, "skipped" if system == "unsloth" else "ok", "NVIDIA H200")
        for repeat in (1, 2, 3)
        for workload in style.WORKLOADS
        for system in read_systems()
    ]


def assert_nothing_overlaps(figure, axes, ratios: int) -> None:
    renderer = figure.canvas.get_renderer()
    legend = figure.legends[0].get_window_extent(renderer)
    assert figure.bbox.x0 <= legend.x0
    assert legend.x1 <= figure.bbox.x1
    for ax in axes:
        labels = [text.get_window_extent(renderer) for text in ax.texts if "×" in text.get_text()]
        bars = [bar.get_window_extent(renderer) for bar in ax.patches]
        assert len(labels) == ratios
        assert not any(first.overlaps(second) for first, second in combinations(labels, 2))
        assert not any(label.overlaps(bar) for label in labels for bar in bars)
        assert not legend.overlaps(ax.get_tightbbox(renderer))
        ticks = [label.get_window_extent(renderer) for label in ax.get_xticklabels() if label.get_visible()]
        assert all(figure.bbox.contains(*corner) for tick in ticks for corner in tick.corners())


def texts(ax) -> list[str]:
    return [text.get_text() for text in ax.texts if isinstance(text, Annotation)]


def places(ax) -> set[float]:
    """Where bars, or texts in their place, stand in their groups."""
    middles = [bar.get_x() + bar.get_width() / 2 for bar in ax.patches]
    middles += [text.xy[0] for text in ax.texts if isinstance(text, Annotation) and "×" not in text.get_text()]
    return {round(middle - round(middle), 3) for middle in middles}


@pytest.fixture
def smoke(smoke_runs, make_table):
    return make_table(smoke_runs)


@pytest.fixture
def draw():
    """Draws a table's figure and lays it out as saving it would; returns the figure and its panels by title."""

    def drawn(table, model="tiny"):
        figure = end_to_end.draw_end_to_end(end_to_end.end_to_end_data(table, model))
        with matplotlib.rc_context(style.PARAMETERS):
            FigureCanvasAgg(figure).draw()
        return figure, figure.axes

    return drawn


def test_writes_pdf_png_and_csv(smoke, tmp_path):
    paths = END_TO_END.draw(smoke, tmp_path / "new" / "end-to-end.v1", "tiny")
    assert [path.name for path in paths] == [f"end-to-end.v1.{suffix}" for suffix in SUFFIXES]
    assert all(path.stat().st_size > 1000 for path in paths)


def test_fonts_are_embedded_as_truetype(smoke, tmp_path):
    pdf, _, _ = END_TO_END.draw(smoke, tmp_path / "figure", "tiny")
    page = PdfReader(pdf).pages[0]
    fonts = [font.get_object() for font in page["/Resources"]["/Font"].values()]
    assert fonts
    for font in fonts:
        assert font["/Subtype"] != "/Type3"
        for descendant in font.get("/DescendantFonts", [font]):
            assert descendant.get_object()["/Subtype"] in ("/CIDFontType2", "/TrueType")
            assert "/FontFile2" in descendant.get_object()["/FontDescriptor"]
    assert float(page.mediabox.width) == pytest.approx(72 * style.TEXT_WIDTH)


def test_equal_tables_give_equal_bytes_in_any_process(smoke, tmp_path):
    measurements.write(smoke, tmp_path / "table.csv", tmp_path / "table.parquet")
    np.random.seed(1)  # the state of the global generator must not matter
    END_TO_END.draw(smoke.sample(frac=1, random_state=5), tmp_path / "here", "tiny")
    script = (
        "import sys; from lorafusion.lab.table import table; from lorafusion.lab.report.registry import FIGURES;"
        "FIGURES['end_to_end'].draw(table.read(sys.argv[1]), sys.argv[2], 'tiny')"
    )
    environment = os.environ | {"PYTHONHASHSEED": "12345"}
    command = [sys.executable, "-c", script, str(tmp_path / "table.csv"), str(tmp_path / "there")]
    subprocess.run(command, check=True, env=environment)
    for suffix in SUFFIXES:
        here, there = ((tmp_path / f"{name}.{suffix}").read_bytes() for name in ("here", "there"))
        assert here == there, suffix


def test_the_csv_alone_redraws_the_figure(smoke, tmp_path):
    pdf, png, csv = END_TO_END.draw(smoke, tmp_path / "figure", "tiny")
    again = drawing.save(end_to_end.draw_end_to_end(drawing.read_data(csv)), tmp_path / "again")
    assert [path.read_bytes() for path in again] == [pdf.read_bytes(), png.read_bytes()]


def test_csv_has_the_medians_points_and_ratios(make_run, make_table, tmp_path):
    runs = [make_run(system, repeat=repeat) for repeat in (1, 2, 3) for system in ("mlora", "peft", "lorafusion")]
    _, _, csv = END_TO_END.draw(make_table(runs), tmp_path / "figure", "tiny")
    data = pd.read_csv(csv)
    whole = data[(data["window"] == "whole") & (data["element"] == "bar")].set_index("system")
    assert whole["value"].to_dict() == {"peft": 818.0, "mlora": 1118.0, "lorafusion": 1448.0}
    assert whole["ratio"]["lorafusion"] == pytest.approx(1448 / 1118)
    assert whole["ratio"].drop("lorafusion").isna().all()
    points = data[(data["window"] == "whole") & (data["element"] == "point") & (data["system"] == "mlora")]
    assert points["value"].tolist() == [1111.0, 1118.0, 1125.0]


def test_bars_begin_at_zero_and_stand_for_the_medians(smoke, draw):
    _, axes = draw(smoke)
    for ax in axes:
        assert ax.get_ylim()[0] == 0
        assert all(bar.get_y() == 0 for bar in ax.patches)
    data = end_to_end.end_to_end_data(smoke, "tiny")
    bars = data[(data["element"] == "bar") & (data["window"] == "whole") & (data["gpus"] == 4)]
    expected = {style.SYSTEMS[bar.system].colour.lower(): pytest.approx(bar.value) for bar in bars.itertuples()}
    assert len(expected) == 2
    assert {to_hex(bar.get_facecolor()): bar.get_height() for bar in axes[2].patches} == expected


def test_failed_cells_are_text_and_never_a_bar(smoke, draw, tmp_path):
    _, axes = draw(smoke)
    one, two, four = axes[:3]
    assert texts(one).count("OOM") == 1
    assert sorted(label for label in texts(two) if "×" not in label) == ["n/a", "timeout", "timeout"]
    assert all("×" in label for label in texts(four))
    assert sum(len(container) for container in one.containers) == 7
    assert sum(len(container) for container in two.containers) == 3
    # The repeats that survived a failed cell are not shown either: no point without a bar.
    data = end_to_end.end_to_end_data(smoke, "tiny")
    timed_out = data[(data["system"] == "mlora") & (data["gpus"] == 2)]
    assert set(timed_out["element"]) == {"text"}
    pdf, _, _ = END_TO_END.draw(smoke, tmp_path / "figure", "tiny")
    assert "OOM" in PdfReader(pdf).pages[0].extract_text()


def test_a_panel_has_no_place_for_systems_that_were_not_asked_for(smoke, draw):
    _, axes = draw(smoke)
    assert [ax.get_title() for ax in axes[:3]] == ["1 process", "2 processes", "4 processes"]
    assert [len(places(ax)) for ax in axes[:3]] == [4, 3, 2]
    assert [label.get_text() for label in axes[5].get_xticklabels()] == ["heterogeneous"]


def test_a_figure_of_failures_only_can_be_drawn(make_run, make_table, draw):
    _, axes = draw(make_table([make_run(system, status="crash") for system in ("mlora", "lorafusion")]))
    assert [texts(ax) for ax in axes] == [["crash", "crash"]] * 2


def test_cpu_numbers_say_what_they_are(make_run, make_table, draw):
    on_cpu, _ = draw(make_table([make_run()]))
    assert style.CPU_WARNING in on_cpu.legends[0].get_title().get_text()
    assert "suite smoke · commit 0123456789 · CPU" in on_cpu.get_supxlabel()
    on_gpu, axes = draw(make_table([make_run(gpu="NVIDIA H200", gpus=2)]))
    assert "CPU" not in on_gpu.legends[0].get_title().get_text() + on_gpu.get_supxlabel()
    assert "NVIDIA H200" in on_gpu.get_supxlabel()
    assert axes[0].get_title() == "2 GPUs"


def test_what_was_not_measured_is_hatched_without_fill_and_in_the_legend(make_run, make_table, draw):
    runs = [make_run(system, gpu="NVIDIA H200") for system in ("mlora", "lorafusion")]
    runs += [make_run(system, kind="simulated", speed=500.0) for system in ("mlora", "lorafusion")]
    runs += [make_run("lorafusion", kind="published", gpu="H100-80GB", speed=600.0)]
    runs += [make_run("mlora", kind="published", gpu="H100-80GB", status="oom")]
    figure, axes = draw(make_table(runs))
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        "mlora", "lorafusion", "simulated", "published", "one repeat",
    ]  # fmt: skip
    filled = [container for container in axes[0].containers if len(container)]
    fills = [to_hex(container[0].get_facecolor()) for container in filled]
    assert (
        fills == [style.SYSTEMS["mlora"].colour.lower(), style.SYSTEMS["lorafusion"].colour.lower()] + ["#ffffff"] * 3
    )
    hatches = [container[0].get_hatch() for container in filled]
    assert hatches[2:] == [style.KINDS["simulated"]] * 2 + [style.KINDS["published"]]
    # A ratio compares within a kind: published lorafusion has no other published system beside it that finished.
    assert len([label for label in texts(axes[0]) if "×" in label]) == 2
    # Repeats are those of measured cells, and another kind's failure hides none of them.
    assert len(axes[0].lines) == 2


def test_several_batch_sizes_of_a_workload_are_groups_of_their_own(make_run, make_table, draw):
    runs = [make_run(system, global_batch=batch) for system in ("mlora", "lorafusion") for batch in (16, 8)]
    _, axes = draw(make_table(runs))
    assert [label.get_text() for label in axes[1].get_xticklabels()] == ["xsum, batch 8", "xsum, batch 16"]


def test_two_cells_for_one_bar_are_refused(make_run, make_table):
    with pytest.raises(MeasurementError, match="one bar for two numbers: throughput of 'a' and 'b'"):
        end_to_end.end_to_end_data(make_table([make_run(cell="a"), make_run(cell="b")]), "tiny")


def test_an_unknown_model_is_named_with_those_that_are_there(smoke):
    with pytest.raises(MeasurementError, match="no summary of throughput of model 'huge'; models in the table: tiny"):
        end_to_end.end_to_end_data(smoke, "huge")


@pytest.mark.parametrize("repeats", [2, 7])
def test_nothing_overlaps_in_the_widest_figure(make_run, make_table, draw, repeats):
    figure, axes = draw(make_table(full_grid(make_run, repeats=repeats)))
    assert_nothing_overlaps(figure, axes, ratios=5)


def test_nothing_overlaps_with_every_system_on_one_gpu(make_run, make_table, draw):
    figure, axes = draw(make_table(one_gpu(make_run)))
    systems = [name for name, system in read_systems().items() if not system.ablation]
    assert len(systems) >= 8
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [*style.looks(systems), "one repeat"]
    assert_nothing_overlaps(figure, axes, ratios=5)


def test_ablations_and_merged_cells_are_not_compared(make_run, make_table, draw):
    runs = [make_run("mlora", speed=1000.0), make_run("lorafusion", speed=2000.0)]
    runs += [make_run("unfused-ours", speed=1900.0), make_run("fused-sequential", speed=1800.0)]
    plain = end_to_end.end_to_end_data(make_table(runs[:2]), "tiny")
    for system in ("lorafusion", "mlora"):
        name = f"model~tiny/workload~xsum/gpus~1/batch~8/qkv~merged/system~{system}"
        runs.append(make_run(system, speed=5000.0, cell=name, merged_qkv=True))
    pd.testing.assert_frame_equal(end_to_end.end_to_end_data(make_table(runs), "tiny"), plain)
    assert plain["ratio"].max() == pytest.approx(2011 / 1011)


def test_a_system_that_is_no_entry_is_a_baseline(make_run, make_table):
    runs = [make_run(system, speed=speed) for system, speed in (("theirs", 1000.0), ("lorafusion", 2000.0))]
    assert end_to_end.end_to_end_data(make_table(runs), "tiny")["ratio"].max() == pytest.approx(2011 / 1011)


def test_every_system_has_a_look_of_its_own():
    assert set(read_systems()) <= set(style.SYSTEMS)
    assert len(set(style.SYSTEMS.values())) == len(style.SYSTEMS)


def test_every_system_looks_the_same_in_every_figure():
    assert style.looks(["lorafusion", "ours"])["lorafusion"] == style.looks(["lorafusion"])["lorafusion"]
    assert style.looks(["mlora", "ours"])["ours"] == style.looks(["peft", "ours"])["ours"]
    many = style.looks([*style.SYSTEMS, "a", "b", "c", "d"])
    assert len(set(many.values())) == len(many)
    assert list(style.looks(["lorafusion", "peft", "mlora"])) == ["peft", "mlora", "lorafusion"]


def test_runs_without_a_commit_can_be_drawn(make_run, make_table, tmp_path):
    """A checkout that was downloaded and not cloned: every commit of the table is empty."""
    result = make_run()
    result["provenance"] |= {"git_sha": None, "git_dirty": None}
    pdf, _, _ = END_TO_END.draw(make_table([result]), tmp_path / "figure", "tiny")
    assert "commit unknown" in PdfReader(pdf).pages[0].extract_text()
