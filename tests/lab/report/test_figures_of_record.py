"""The figures of results/reference show what their tables say: their CSVs, made again, are the same text."""

from __future__ import annotations

import pytest

from lorafusion.cli.main import app
from lorafusion.core.config import CONFIGS
from lorafusion.core.seals import require_seal
from lorafusion.lab.report.registry import FIGURES
from lorafusion.lab.table.table import MeasurementError, read

REFERENCE = CONFIGS.parent / "results" / "reference"
MODEL = "llama-3.1-8b"
# By figure of record: the table, which of its suites, and the entry of the table of figures.
DRAWN = {
    "nvidia-h200/end_to_end_throughput": ("end_to_end", "h200", "end_to_end"),
    "nvidia-h200/end_to_end_contributions": ("end_to_end", "h200", "contributions"),
    **{
        f"nvidia-h200/{name}": ("kernels", "h200", name)
        for name in ("kernel_speed", "layer_speed", "dram_traffic", "roofline")
    },
    "nvidia-h200/cost_fit": ("costs", "h200", "cost_fit"),
    "nvidia-h200/steps_speed": ("steps", "h200", "steps_speed"),
    **{f"cpu/planner_{name}": ("planner", "cpu", f"planner_{name}") for name in ("bubble", "fill", "time")},
}
# Drawn from files of single runs, which were not kept; two from predictions (tests/lab/test_validation.py).
WITHOUT_A_TABLE = {f"nvidia-h200/{name}" for name in ("end_to_end_profile", "end_to_end_tunings", "steps_profile",
                                                      "validation")} | {"cpu/validation"}  # fmt: skip


@pytest.fixture(scope="module")
def tables():
    names = {(figure.partition("/")[0], table) for figure, (table, _, _) in DRAWN.items()}
    return {name: read(REFERENCE / name[0] / f"{name[1]}.parquet") for name in names}


def test_every_figure_of_record_is_looked_at():
    pictures = {str(path.relative_to(REFERENCE).with_suffix("")) for path in REFERENCE.rglob("*.png")}
    assert pictures == DRAWN.keys() | WITHOUT_A_TABLE


@pytest.mark.parametrize("figure", DRAWN)
def test_a_figures_csv_is_what_its_table_gives(tables, figure):
    name, suite, entry = DRAWN[figure]
    table = tables[figure.partition("/")[0], name]
    model = [MODEL] if FIGURES[entry].per_model else []
    data, _ = FIGURES[entry].make(table[table["suite"] == suite], *model)
    made = data.to_csv(index=False, lineterminator="\n")
    assert made == (REFERENCE / f"{figure}.csv").read_text()


@pytest.mark.parametrize("figure", sorted(DRAWN.keys() | WITHOUT_A_TABLE))
def test_a_figures_csv_is_whole(figure):
    require_seal(REFERENCE / f"{figure}.csv")


@pytest.mark.parametrize("suite", ["cpu", "configs/suites/cpu.yaml"])
def test_the_command_draws_a_suite_of_a_table_of_several(suite, tmp_path):
    command = ["lab", "figure", suite, "planner_bubble", str(REFERENCE / "cpu" / "planner.parquet")]
    app([*command, "--out", str(tmp_path / "bubble")], standalone_mode=False)
    for form in ("csv", "png"):
        expected = (REFERENCE / "cpu" / f"planner_bubble.{form}").read_bytes()
        assert (tmp_path / f"bubble.{form}").read_bytes() == expected


def test_suites_do_not_share_a_bar(tables):
    with pytest.raises(
        MeasurementError, match="one bar for several suites: cpu, cpu-even, cpu-growth; draw them from separate"
    ):
        FIGURES["planner_bubble"].make(tables["cpu", "planner"])
