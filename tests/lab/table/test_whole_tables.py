"""A table is read only if it is whole: no row cut off, edited, missing or twice under one key."""

from __future__ import annotations

import pandas as pd
import pytest
from typer.testing import CliRunner

from lorafusion.cli.main import app
from lorafusion.core.config import CONFIGS
from lorafusion.core.schema import UserError
from lorafusion.core.seals import seal
from lorafusion.lab.cell_result import description
from lorafusion.lab.keys import suite_files
from lorafusion.lab.report.pages import measurements_page
from lorafusion.lab.suite import suite_path
from lorafusion.lab.table import table
from lorafusion.lab.table.result import write_result
from lorafusion.lab.table.table import MeasurementError
from lorafusion.lab.table.validation import PLACE
from lorafusion.lab.table.vocabulary import IDENTITY
from tests.lab.table.test_table import build, result

REFERENCE = CONFIGS.parent / "results" / "reference"
TABLES = [
    *("nvidia-h200/end_to_end", "nvidia-h200/kernels", "nvidia-h200/kernels_compiled", "nvidia-h200/steps"),
    "cpu/planner",
]


def runs(systems=("lorafusion", "mlora"), repeats=(1, 2, 3), **cell) -> list[dict]:
    return [
        result(system, repeat, throughput=100.0 + repeat + len(system), **cell)
        for system in systems
        for repeat in repeats
    ]


@pytest.fixture
def written(tmp_path):
    path = tmp_path / "t.csv"
    table.write(table.summarise(build(*runs())), path, tmp_path / "t.parquet")
    return path


def test_a_table_that_was_cut_is_neither_drawn_nor_published_nor_read(written, tmp_path):
    lines = written.read_text().splitlines(keepends=True)
    written.write_text("".join(lines[: len(lines) // 2]))
    with pytest.raises(UserError, match=r"t\.csv: cut or edited since it was written: expected 16 rows .* found 7"):
        table.read(written)
    figure = ["lab", "figure", "smoke", "end_to_end", str(written), "--model", "tiny", "--out", str(tmp_path / "f")]
    run, drawn = tmp_path / "run.json", tmp_path / "drawn.png"
    write_result(run, result())
    drawn.touch()
    publish = [
        "lab",
        "publish",
        "smoke",
        str(written),
        str(run),
        "--figure",
        str(drawn),
        "--out",
        str(tmp_path / "wandb"),
    ]
    for command in (figure, publish):
        done = CliRunner().invoke(app, command)
        assert done.exit_code != 0
        assert isinstance(done.exception, UserError)
    assert not list(tmp_path.glob("f.*"))


def test_an_edited_number_is_seen_in_either_form(written, tmp_path):
    text = written.read_text()
    written.write_text(text.replace(",111.0,", ",119.0,"))
    assert written.read_text() != text
    with pytest.raises(UserError, match="cut or edited"):
        table.read(written)
    parquet = tmp_path / "t.parquet"
    pd.read_parquet(parquet).assign(value=1.0).to_parquet(parquet)
    with pytest.raises(UserError, match="cut or edited"):
        table.read(parquet)


@pytest.mark.parametrize("factor", [1.02, 0.5])
def test_a_median_that_is_not_that_of_its_runs_is_refused(written, factor):
    """Also under a seal of its own."""
    frame = table.read_unsealed(written)
    medians = frame["statistic"] == "median"
    ours = medians & (frame["system"] == "lorafusion")
    frame.loc[ours, "value"] *= factor
    written.write_text(table.csv_text(frame))
    seal(written)
    with pytest.raises(MeasurementError, match="the median of .* is not that of its single rows"):
        table.read(written)


@pytest.mark.parametrize("statistic", ["single", "median"])
def test_a_row_without_its_counterpart_is_refused(written, statistic):
    frame = table.read_unsealed(written)
    gone = (frame["statistic"] == statistic) & (frame["system"] == "lorafusion") & (frame["metric"] == "time")
    written.write_text(table.csv_text(frame[~gone]))
    seal(written)
    with pytest.raises(MeasurementError, match="is not that of its single rows"):
        table.read(written)


def test_a_missing_repeat_is_told_and_refused_unless_the_seal_says_so(tmp_path):
    kept = [one for one in runs() if (one["cell"]["system"], one["cell"]["repeat"]) != ("mlora", 2)]
    frame = table.summarise(build(*kept))
    said = "1 run of a cell is missing, first repeat 2 of 'model~tiny/workload~xsum/gpus~2/system~mlora'"
    assert table.gaps(frame) == said
    assert table.gaps(table.summarise(build(*runs()))) == ""
    path = tmp_path / "t.csv"
    table.write(frame, path, tmp_path / "t.parquet")
    pd.testing.assert_frame_equal(table.read(path), frame)
    seal(path)
    with pytest.raises(MeasurementError, match="expected, as its seal says: no run is missing; found: 1 run"):
        table.read(path)


def test_a_cell_of_the_suite_that_was_never_run_is_missing():
    frame = table.summarise(build(*runs()))
    names = [f"model~tiny/workload~xsum/gpus~2/system~{system}" for system in ("lorafusion", "mlora", "peft")]
    assert table.gaps(frame, dict.fromkeys(names[:2], 3)) == ""
    assert table.gaps(frame, dict.fromkeys(names, 3)) == f"3 runs of cells are missing, first repeat 1 of {names[2]!r}"
    assert table.gaps(frame, dict.fromkeys(names[:2], 4)).startswith("2 runs of cells are missing, first repeat 4")


def test_a_run_that_failed_is_not_missing_and_one_metric_less_is():
    failed = [*runs(("lorafusion",)), *runs(("mlora",), (1, 2)), result("mlora", 3, status="oom")]
    assert table.gaps(build(*failed)) == ""
    frame = build(*runs())
    gone = (frame["system"] == "mlora") & (frame["repeat"] == 2) & (frame["metric"] == "time")
    assert "repeat 2" in table.gaps(frame[~gone])


def test_a_run_whose_cost_is_unknown_is_not_missing():
    frame = build(*runs())
    cost = frame[frame["metric"] == "time"].assign(metric="operators", unit="1/ktok", direction="lower")
    known = pd.concat([frame, cost[cost["repeat"] != 2]])
    table.validate(known)
    assert table.gaps(known) == ""


def test_measurements_needs_all_runs_or_to_be_told(tmp_path):
    paths = []
    for index, one in enumerate(runs()[:-1]):
        paths.append(tmp_path / f"{index}.json")
        write_result(paths[-1], one)
    command = ["lab", "measure", "smoke", "end_to_end", *map(str, paths), "--out", str(tmp_path / "out"), "--any-suite"]
    done = CliRunner().invoke(app, command)
    assert isinstance(done.exception, UserError)
    assert "1 run of a cell is missing, first repeat 3 of" in str(done.exception)
    assert not (tmp_path / "out").exists()
    assert CliRunner().invoke(app, [*command, "--incomplete"]).exit_code == 0
    assert len(table.read(tmp_path / "out" / "measurements.csv")) == 14


def test_cells_that_only_their_names_tell_apart_are_refused():
    name = "model~tiny/workload~xsum/gpus~2/qkv~merged/system~lorafusion"
    apart = build(*runs(("lorafusion",), merged_qkv=False), *runs(("lorafusion",), cell=name, merged_qkv=True))
    table.validate(table.summarise(apart))
    same = build(*runs(("lorafusion",)), *runs(("lorafusion",), cell=name))
    with pytest.raises(MeasurementError, match=r"cell: expected other columns than those of cell .*system~lorafusion"):
        table.validate(same)


@pytest.mark.parametrize("name", ["smoke", "h200", "paper-grid"])
def test_the_columns_of_a_suites_cells_tell_them_apart(make_workload, name):
    places = {}
    for cell, files in suite_files(suite_path(name)).items():
        columns = description(files, make_workload(), None, 1)
        places.setdefault(tuple(columns.get(column) for column in IDENTITY), []).append(cell)
    assert [names for names in places.values() if len(names) > 1] == []


@pytest.mark.parametrize("name", TABLES)
def test_the_tables_of_record_are_whole_and_their_columns_tell_all_rows_apart(name):
    frame = table.read(REFERENCE / f"{name}.parquet")
    assert not frame.duplicated(list(PLACE)).any()


def test_the_page_of_measurements_shows_what_tells_its_rows_apart():
    name = "model~tiny/workload~xsum/gpus~2/qkv~merged/system~lorafusion"
    both = [*runs(("lorafusion",), merged_qkv=False), *runs(("lorafusion",), cell=name, merged_qkv=True)]
    page = measurements_page(table.summarise(build(*both)))
    assert "<th>merged_qkv</th>" in page
