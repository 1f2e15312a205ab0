"""The figures of results/reference show what their tables say: their CSVs, made again, are the same text."""

from __future__ import annotations

from collections.abc import Callable

import pandas as pd
import pytest

from lorafusion.core.config import CONFIGS
from lorafusion.core.seals import require_seal
from lorafusion.lab.report import figures, kernel_data, scheduler_figures, training_figures
from lorafusion.lab.report.contributions_figure import contributions_data
from lorafusion.lab.table.table import MeasurementError, read

REFERENCE = CONFIGS.parent / "results" / "reference"
MODEL = "llama-3.1-8b"
# By figure: the table, which of its suites, and what is drawn of it.
DRAWN: dict[str, tuple[str, str, Callable[[pd.DataFrame], pd.DataFrame]]] = {
    "nvidia-h200/end_to_end_throughput": ("end_to_end", "h200", lambda t: figures.end_to_end_data(t, MODEL)),
    "nvidia-h200/end_to_end_contributions": ("end_to_end", "h200", lambda t: contributions_data(t, MODEL)),
    "nvidia-h200/kernel_speed": ("kernels", "h200", kernel_data.kernel_speed_data),
    "nvidia-h200/layer_speed": ("kernels", "h200", kernel_data.layer_speed_data),
    "nvidia-h200/dram_traffic": ("kernels", "h200", kernel_data.dram_traffic_data),
    "nvidia-h200/roofline": ("kernels", "h200", kernel_data.roofline_data),
    "nvidia-h200/training_speed": ("training", "h200", training_figures.speed_data),
    "cpu/scheduler_bubble": ("scheduler", "cpu", lambda t: scheduler_figures.bars(t, "bubble", "steady")),
    "cpu/scheduler_fill": ("scheduler", "cpu", lambda t: scheduler_figures.bars(t, "microbatch_ratio", "whole")),
    "cpu/scheduler_time": ("scheduler", "cpu", lambda t: scheduler_figures.medians(t, "solve_time", "whole")),
}
# Drawn from files of single runs, which were not kept.
WITHOUT_A_TABLE = {f"nvidia-h200/{name}" for name in ("end_to_end_profile", "end_to_end_tunings", "training_profile")}


@pytest.fixture(scope="module")
def tables():
    names = {(figure.partition("/")[0], table) for figure, (table, _, _) in DRAWN.items()}
    return {name: read(REFERENCE / name[0] / f"{name[1]}.parquet") for name in names}


def test_every_figure_of_record_is_looked_at():
    pictures = {str(path.relative_to(REFERENCE).with_suffix("")) for path in REFERENCE.rglob("*.png")}
    assert pictures == DRAWN.keys() | WITHOUT_A_TABLE


@pytest.mark.parametrize("figure", DRAWN)
def test_a_figures_csv_is_what_its_table_gives(tables, figure):
    name, suite, data = DRAWN[figure]
    table = tables[figure.partition("/")[0], name]
    made = data(table[table["suite"] == suite]).to_csv(index=False, lineterminator="\n")
    assert made == (REFERENCE / f"{figure}.csv").read_text()


@pytest.mark.parametrize("figure", sorted(DRAWN.keys() | WITHOUT_A_TABLE))
def test_a_figures_csv_is_whole(figure):
    require_seal(REFERENCE / f"{figure}.csv")


def test_suites_do_not_share_a_bar(tables):
    with pytest.raises(
        MeasurementError, match="one bar for several suites: cpu, cpu-even, cpu-growth; draw them from separate"
    ):
        scheduler_figures.bars(tables["cpu", "scheduler"], "bubble", "steady")
