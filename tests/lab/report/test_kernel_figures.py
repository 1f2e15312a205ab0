"""The kernel suite's figures show what the table says, and say in one line what it lacks."""

from __future__ import annotations

import matplotlib.image
import pandas as pd
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from pypdf import PdfReader

from lorafusion.cli.main import app
from lorafusion.lab.report import drawing, style
from lorafusion.lab.report.figures import kernels
from lorafusion.lab.report.registry import FIGURES as TABLE
from lorafusion.lab.table import table as measurements
from lorafusion.lab.table.table import MeasurementError
from lorafusion.lab.table.vocabulary import METRICS

FIGURES = ("kernel_speed", "layer_speed", "dram_traffic", "roofline")
SLOWNESS = {"frozen": 1.0, "peft": 1.7, "peft-bf16": 1.45, "fused": 1.12, "fused-multi": 1.16}
SHAPES = ((4096, 4096), (5120, 5120), (8192, 8192), (4096, 14336))
MODELS = {"llama-3.1-8b": 1.0, "qwen2.5-32b": 2.0, "llama-3.1-70b": 4.0}
GIB = 2**30


def points():
    for name, slowness in SLOWNESS.items():
        for adapters in (4, 16) if name == "fused-multi" else (int(name != "frozen"),):
            yield name, adapters, slowness + (adapters == 16) * 0.05


def metric(cell: str, name: str, value: float | None, implementation: str, status="ok", **fields) -> dict:
    """A metric of a result file."""
    unit, direction, _ = METRICS[name]
    return {
        "metric": name, "value": value, "unit": unit, "direction": direction, "window": "steady", "status": status,
        "implementation": implementation, "cell": {"cell": cell} | fields,
    }  # fmt: skip


def subject(name: str, work: float, tokens: int, frozen: float, status="ok") -> list[dict]:
    """All that is measured of a linear or a layer at a number of tokens, `frozen` being the frozen one's seconds."""
    out = []
    for implementation, adapters, slowness in points():
        cell = f"{name}/rank~16/dropout~0.1/tokens~{tokens}/implementation~{implementation}/adapters~{adapters}"
        rows = [("saved_memory", slowness * work * tokens, None)]
        for passes in ("forward", "both"):
            rows.append(("time", slowness * frozen, passes))
            if adapters:
                rows.append(("overhead", slowness - 1 + 100 / tokens, passes))
        rows.append(("tflops", 4 * work * tokens / (slowness * frozen) / 1e12, "both"))
        bad = status != "ok" and implementation == "peft"
        for kind, value, passes in rows:
            fields = {"tokens": tokens, "adapters": adapters, "pass": passes}
            if bad:
                value = None
            out.append(metric(cell, kind, value, implementation, status if bad else "ok", **fields))
    return out


def tabulate(groups: list[tuple[dict, list[dict]]], gpu: str | None = "NVIDIA H200", repeats: int = 2) -> pd.DataFrame:
    """The summarised table of result files, each with the fields of its cell."""
    rows = []
    for repeat in range(1, repeats + 1):
        for fields, metrics in groups:
            cell = {"suite": "h200", "kind": "measured", "cell": "x", "gpus": 1, "rank": 16, "dropout": 0.1}
            result = {
                "version": 1, "status": "ok", "cell": cell | fields | {"repeat": repeat}, "expected": [],
                "metrics": metrics, "provenance": {"git_sha": "0123456789abcdef", "git_dirty": False,
                                                   "config_hash": "c", "gpu_name": gpu},
            }  # fmt: skip
            rows += measurements.rows_of_result(result, f"{fields}-{repeat}.json")
    return measurements.summarise(measurements.frame(rows))


def linears(tokens=range(2048, 8193, 2048), **fields) -> list[tuple[dict, list[dict]]]:
    out = []
    for inputs, outputs in SHAPES:
        name, metrics = f"linear~{inputs}x{outputs}", []
        for count in tokens:
            metrics += subject(name, inputs * outputs, count, 4 * inputs * outputs * count / 600e12)
        metrics.append(metric(f"{name}/canary-gemm", "time", 2 * 8192**3 / 700e12, "canary-gemm"))
        metrics.append(metric(f"{name}/canary-copy", "time", 4 * 8192**2 / 4e12, "canary-copy"))
        out.append(({"in_features": inputs, "out_features": outputs} | fields, metrics))
    return out


def layers(status="ok") -> list[tuple[dict, list[dict]]]:
    out = []
    for model, size in MODELS.items():
        metrics = []
        for tokens in range(2048, 9729, 1536):
            bad = status if (model, tokens) == ("llama-3.1-70b", 9728) else "ok"
            metrics += subject(f"layer~{model}", 4e5 * size, tokens, 1e-6 * size * tokens, bad)
        out.append(({"model": model}, metrics))
    return out


def traffic() -> list[tuple[dict, list[dict]]]:
    metrics = []
    for inputs, outputs in SHAPES[:3]:
        for implementation, adapters, slowness in points():
            if implementation != "peft" and adapters != 16:
                name = f"traffic~{inputs}x{outputs}"
                cell = f"{name}/rank~16/dropout~0.1/tokens~8192/implementation~{implementation}/adapters~{adapters}"
                fields = {"tokens": 8192, "adapters": adapters, "pass": "both"}
                value = slowness * inputs / 4096 * 1.1 * GIB
                shape = {"in_features": inputs, "out_features": outputs}
                metrics.append(metric(cell, "dram_traffic", value, implementation, **fields, **shape))
    return [({}, metrics)]


@pytest.fixture(scope="module")
def full():
    return tabulate([*linears(), *layers(), *traffic()])


@pytest.fixture
def drawn(monkeypatch):
    """Calls a figure's function; returns the figure it saved, and its CSV."""
    kept = []

    def call(name, table, stem):
        save = drawing.save
        monkeypatch.setattr(drawing, "save", lambda figure, path: kept.append(figure) or save(figure, path))
        paths = TABLE[name].draw(table, stem)
        monkeypatch.setattr(drawing, "save", save)
        return kept[-1], pd.read_csv(paths[-1])

    return call


@pytest.mark.parametrize("name", FIGURES)
def test_writes_pdf_png_and_csv_the_same_for_the_same_table(full, name, tmp_path):
    paths = TABLE[name].draw(full, tmp_path / "new" / "figure")
    assert [path.name for path in paths] == ["figure.pdf", "figure.png", "figure.csv"]
    again = TABLE[name].draw(full.sample(frac=1, random_state=5), tmp_path / "again")
    assert [path.read_bytes() for path in paths] == [path.read_bytes() for path in again]
    page = PdfReader(paths[0]).pages[0]
    assert "suite h200 · commit 0123456789 · NVIDIA H200" in page.extract_text()


@pytest.mark.parametrize("name", FIGURES)
def test_no_text_is_cut_off_or_under_the_legend(full, name, drawn, tmp_path):
    figure, _ = drawn(name, full, tmp_path / "figure")
    image = matplotlib.image.imread(tmp_path / "figure.png")
    assert all((edge == 1).all() for edge in (image[0], image[-1], image[:, 0], image[:, -1]))
    canvas = FigureCanvasAgg(figure)
    with matplotlib.rc_context(style.PARAMETERS):
        canvas.draw()
    renderer = canvas.get_renderer()
    legend = figure.legends[0].get_window_extent(renderer)
    assert not any(legend.overlaps(ax.get_tightbbox(renderer)) for ax in figure.axes)


def test_kernel_speed_shows_time_over_the_frozen_linear_of_square_shapes(full, drawn, tmp_path):
    figure, data = drawn("kernel_speed", full, tmp_path / "figure")
    assert [ax.get_title() for ax in figure.axes[:3]] == ["4096×4096", "5120×5120", "8192×8192"]
    assert len(figure.axes) == 6
    row = data[(data["implementation"] == "fused") & (data["tokens"] == 2048) & (data["pass"] == "both")]
    assert row["value"].tolist() == pytest.approx([1.12 + 100 / 2048] * 3)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        "frozen", "peft", "peft-bf16", "fused", "fused-multi, 4 adapters", "fused-multi, 16 adapters",
    ]  # fmt: skip


def test_layer_speed_shows_times_and_memory_and_names_failures(drawn, tmp_path):
    figure, data = drawn("layer_speed", tabulate(layers("oom")), tmp_path / "figure")
    assert [ax.get_title() for ax in figure.axes[:3]] == list(MODELS)
    saved = data[(data["shown"] == kernels.SAVED) & (data["implementation"] == "frozen")]
    assert saved["value"].max() == pytest.approx(4e5 * 4 * 9728 / GIB)
    assert [text.get_text() for text in figure.axes[2].texts + figure.axes[5].texts] == ["OOM", "OOM"]
    assert "2 failed points have no value" in figure.get_supxlabel()


def test_dram_traffic_hatches_the_published_values(full, drawn, tmp_path):
    figure, data = drawn("dram_traffic", full, tmp_path / "figure")
    published = data[data["kind"] == "published"].set_index(["in_features", "implementation"])["value"]
    assert published[8192, "peft-bf16"] == 5.289
    assert len(published) == 9
    hatched = [bar for bar in figure.axes[0].patches if bar.get_hatch() == style.KINDS["published"]]
    assert sorted(bar.get_height() for bar in hatched) == sorted(published)
    assert figure.legends[0].get_texts()[-1].get_text() == "published"
    fused = style.IMPLEMENTATIONS["fused"].colour.lower()
    assert sum(to_hex(bar.get_facecolor()) == fused for bar in figure.axes[0].patches) == 3


def test_dram_traffic_without_the_published_file(full, drawn, tmp_path, monkeypatch):
    monkeypatch.setattr(kernels, "PUBLISHED_TRAFFIC", tmp_path / "none.csv")
    _, data = drawn("dram_traffic", full, tmp_path / "figure")
    assert set(data["kind"]) == {"measured"}


def test_roofline_has_the_canaries_ceilings_and_the_operations_per_byte(full, drawn, tmp_path):
    _, data = drawn("roofline", full, tmp_path / "figure")
    ceilings = data.set_index("shown")["value"]
    assert ceilings[kernels.COMPUTE] == pytest.approx(700)
    assert ceilings[kernels.BANDWIDTH] == pytest.approx(4)
    frozen = data[(data["implementation"] == "frozen") & (data["in_features"] == 4096)]
    assert frozen["value"].item() == pytest.approx(600)
    assert frozen["flop_per_byte"].item() == pytest.approx(4 * 8192 * 4096**2 / (1.1 * GIB))
    assert (data["shown"] == kernels.TFLOPS).sum() == 12


def test_cpu_numbers_say_what_they_are(drawn, tmp_path):
    figure, _ = drawn("kernel_speed", tabulate(linears((64, 128)), gpu=None), tmp_path / "figure")
    assert style.CPU_WARNING in figure.legends[0].get_title().get_text()
    assert figure.get_supxlabel().splitlines()[0].endswith("CPU")


@pytest.mark.parametrize(
    ("name", "groups", "message"),
    [
        ("kernel_speed", layers(), "no median of overhead of a square linear"),
        ("layer_speed", linears(), "no median of overhead of a layer"),
        ("dram_traffic", linears(), "no median of dram_traffic"),
        ("roofline", linears(), "no median of dram_traffic"),
        ("roofline", traffic(), "no median of tflops and time of the linears whose dram_traffic"),
    ],
)
def test_what_the_table_lacks_is_said(name, groups, message, tmp_path):
    with pytest.raises(MeasurementError, match=message):
        TABLE[name].draw(tabulate(groups), tmp_path / "figure")


def test_a_roofline_needs_canaries_of_a_gpu(tmp_path):
    with pytest.raises(MeasurementError, match="no median time of canary-gemm on a GPU"):
        TABLE["roofline"].draw(tabulate([*linears(), *traffic()], gpu=None), tmp_path / "figure")


def test_two_numbers_for_one_point_are_refused(tmp_path):
    table = tabulate([*linears(), *linears(suite="other")])
    with pytest.raises(MeasurementError, match="two numbers for one point of peft .suites: h200, other"):
        TABLE["kernel_speed"].draw(table, tmp_path / "figure")


@pytest.mark.parametrize("name", FIGURES)
def test_command(full, name, tmp_path, passed_checks):
    measurements.write(full, tmp_path / "t.csv", tmp_path / "t.parquet")
    passed_checks(tmp_path / "checks", full)
    app(
        ["lab", "figure", "smoke", name, str(tmp_path / "t.csv"), "--out", str(tmp_path / "figure")],
        standalone_mode=False,
    )
    assert (tmp_path / "figure.png").is_file()
