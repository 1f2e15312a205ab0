"""The table of figures: complete, read without heavy libraries, and enough to add a figure by one entry."""

from __future__ import annotations

import subprocess
import sys
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest

from lorafusion.core.config import CONFIGS
from lorafusion.core.schema import UserError
from lorafusion.lab.checks.catalog import needed_by
from lorafusion.lab.report import figures, registry, style
from lorafusion.lab.report.registry import FIGURES, FORMATS, SOURCES, Figure, draw
from lorafusion.lab.table import table as measurements

CAPTIONS = CONFIGS.parent / "workflow" / "report"


@pytest.mark.parametrize("name", FIGURES)
def test_an_entry_is_whole(name):
    figure = FIGURES[name]
    assert figure.name == name
    module = import_module(f"lorafusion.lab.report.figures.{figure.module}")
    assert callable(getattr(module, f"{name}_data"))
    assert callable(getattr(module, f"draw_{name}"))
    assert figure.source in SOURCES
    assert (CAPTIONS / figure.caption).is_file()
    assert set(figure.shown) <= set(FORMATS)
    assert ("{model}" in figure.label) == figure.per_model


def test_the_table_loads_neither_torch_nor_matplotlib():
    heavy = ("torch", "matplotlib", "lorafusion.launch")
    code = f"import sys; import lorafusion.lab.report.registry; print([n for n in {heavy} if n in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"


def test_the_classes_of_kernels_are_those_of_the_profiler():
    from lorafusion.lab.profiler import ORDER

    assert tuple(style.CLASSES) == ORDER


def test_no_figure_loads_torch_or_the_launcher():
    names = [f"lorafusion.lab.report.{path.stem}" for path in Path(registry.__file__).parent.glob("[a-z]*.py")]
    names += [f"lorafusion.lab.report.figures.{path.stem}" for path in Path(figures.__file__).parent.glob("[a-z]*.py")]
    heavy = ("torch", "lorafusion.launch.launch")
    code = f"import sys, {', '.join(names)}; print([n for n in {heavy} if n in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"


def _dots_data(table: pd.DataFrame, model: str) -> pd.DataFrame:
    """A row for each single run."""
    return table.loc[table["statistic"] == "single", ["system", "value"]]


def _draw_dots(data: pd.DataFrame):
    from matplotlib.figure import Figure as Picture

    figure = Picture()
    figure.subplots().plot(data["system"], data["value"], "o")
    return figure


@pytest.fixture
def table(smoke_runs, make_table, passed_checks, tmp_path):
    """The file of a table with its checks beside it."""
    frame = make_table(smoke_runs)
    measurements.write(frame, tmp_path / "table.csv", tmp_path / "table.parquet")
    passed_checks(tmp_path / "checks", frame)
    return tmp_path / "table.csv"


RUNS = needed_by("runs")


@pytest.fixture
def dots(monkeypatch):
    """A figure more: a module with two functions, and an entry."""
    module = SimpleNamespace(dots_data=_dots_data, draw_dots=_draw_dots)
    monkeypatch.setitem(sys.modules, "lorafusion.lab.report.figures.marks", module)
    figure = Figure("dots", "marks", "table", "end_to_end", "end_to_end.rst", "dots of {model}", RUNS, per_model=True)
    monkeypatch.setitem(registry.FIGURES, "dots", figure)


def test_one_entry_adds_a_figure(dots, table, tmp_path):
    paths = draw("dots", [table], tmp_path / "out" / "dots", "tiny")
    assert [path.name for path in paths] == ["dots.pdf", "dots.png", "dots.csv"]
    assert list(pd.read_csv(paths[2])) == ["system", "value"]


@pytest.mark.parametrize(
    ("name", "model", "files", "message"),
    [
        ("dot", "tiny", 1, "unknown figure 'dot'; known: contributions, "),
        ("dots", None, 1, "figure dots: --model: expected a model"),
        ("kernel_speed", "tiny", 1, "figure kernel_speed: --model: it takes none"),
        ("dots", "tiny", 2, "expected one file, a measurement table; found 2"),
    ],
)
def test_what_does_not_fit_a_figure_is_refused(dots, table, tmp_path, name, model, files, message):
    with pytest.raises(UserError, match=message):
        draw(name, files * [table], tmp_path / "dots", model)


def test_a_check_that_is_missing_stops_a_new_figure_too(dots, table, tmp_path):
    (tmp_path / "checks" / "systems.json").unlink()
    with pytest.raises(UserError, match="systems.json"):
        draw("dots", [table], tmp_path / "dots", "tiny")
    with pytest.raises(UserError, match="figure tunings: --checks: it rests on none"):
        draw("tunings", [table], tmp_path / "dots", "tiny", tmp_path / "checks")
