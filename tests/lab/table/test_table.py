"""The measurement table: from result files to rows, medians, files, and errors that say where they are."""

from __future__ import annotations

import copy
import json
import math

import pandas as pd
import pytest

from lorafusion.core.schema import UserError
from lorafusion.lab.table import table
from lorafusion.lab.table.result import write_result
from lorafusion.lab.table.table import MeasurementError
from lorafusion.lab.table.vocabulary import COLUMNS, METRICS


def result(system="lorafusion", repeat=1, throughput=100.0, status="ok", **cell) -> dict:
    """A result file's content; `cell` changes fields of the cell."""
    metrics = [
        {"metric": "throughput", "value": throughput, "unit": "tok/s", "direction": "higher", "window": "whole"},
        {
            "metric": "time",
            "value": 1e-3,
            "unit": "s",
            "direction": "lower",
            "window": "steady",
            "implementation": "canary-gemm",
            "note": "fastest of\n5",
        },
    ]
    return {
        "version": 1,
        "status": status,
        "note": "" if status == "ok" else "out of\nmemory",
        "cell": {
            "suite": "smoke",
            "kind": "measured",
            "cell": f"model~tiny/workload~xsum/gpus~2/system~{system}",
            "system": system,
            "model": "tiny",
            "workload": "xsum",
            "gpus": 2,
            "repeat": repeat,
            "implementation": "fused",
            "rank": None,
            "dropout": 0.1,
            "seed": 1,
        }
        | cell,
        "expected": [{"metric": "throughput", "window": "whole"}],
        "metrics": metrics if status == "ok" else [],
        "losses": {"adapter-0": [3.2, None]},
        "provenance": {
            "git_sha": "abc",
            "git_dirty": False,
            "config_hash": "c",
            "started_at": f"2025-01-01T00:00:0{repeat}",
            "python": "3.11.2",
            "log": "logs/a.log",
        },
    }


def build(*results: dict) -> pd.DataFrame:
    return table.frame([row for index, one in enumerate(results) for row in table.rows_of_result(one, f"{index}.json")])


def medians(frame: pd.DataFrame) -> pd.DataFrame:
    summary = table.summarise(frame)
    return summary[(summary["statistic"] == "median") & (summary["metric"] == "throughput")].reset_index(drop=True)


def test_columns_are_in_the_designs_order():
    text = (
        "suite kind cell system model workload gpus repeat metric value unit direction statistic n ci_low ci_high "
        "window status note implementation pass tokens in_features out_features rank adapters dropout dtype stages "
        "global_batch capacity merged_qkv samples bench git_sha git_dirty tree_hash config_hash workload_hash "
        "plan_hash gpu_name gpu_uuid driver cuda torch triton clock_mhz power_w seed started_at command result log"
    )
    assert list(COLUMNS) == text.split()
    assert list(build(result()).columns) == list(COLUMNS)


def test_a_run_becomes_a_row_a_number():
    frame = build(result())
    table.validate(frame)
    throughput, canary = frame.to_dict("records")
    assert throughput["value"] == 100.0
    assert (throughput["statistic"], throughput["n"], throughput["status"]) == ("single", 1, "ok")
    assert (throughput["implementation"], canary["implementation"]) == ("fused", "canary-gemm")
    assert (throughput["result"], throughput["log"], throughput["git_sha"]) == ("0.json", "logs/a.log", "abc")
    assert canary["note"] == "fastest of 5"
    assert pd.isna(throughput["rank"])
    assert pd.isna(throughput["note"])


def test_a_failed_run_becomes_rows_without_a_value():
    frame = build(result(status="oom"))
    table.validate(frame)
    (row,) = frame.to_dict("records")
    assert pd.isna(row["value"])
    assert (row["status"], row["unit"], row["direction"]) == ("oom", "tok/s", "higher")
    assert row["note"] == "out of memory"


def test_read_results_names_the_file_that_is_wrong(tmp_path):
    with pytest.raises(MeasurementError, match=r"gone\.json: no such file"):
        table.read_results([tmp_path / "gone.json"])
    broken = tmp_path / "broken.json"
    broken.write_text("{")
    with pytest.raises(UserError, match=r"broken\.json: not a result file, as it is not JSON"):
        table.read_results([broken])


@pytest.mark.parametrize("change", [lambda data: data["metrics"][0].update(value=9.0), lambda data: data.pop("seal")])
def test_a_result_that_was_changed_by_hand_is_refused(tmp_path, change):
    path = tmp_path / "run.json"
    write_result(path, result())
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))
    with pytest.raises(UserError, match=r"run\.json: seal: found .*, expected .*; it was changed since, make it again"):
        table.read_results([path])


def test_read_results_does_not_depend_on_the_order_of_the_files(tmp_path):
    paths = []
    for repeat in (1, 2):
        for system in ("mlora", "lorafusion"):
            paths.append(tmp_path / f"{system}-{repeat}.json")
            write_result(paths[-1], result(system, repeat))
    pd.testing.assert_frame_equal(table.read_results(paths), table.read_results(reversed(paths)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "x.json: version: input should be less than or equal to 1"),
        ({"status": "fine"}, "x.json: status: .*'oom'"),
        ({"metrics": []}, "x.json: metrics: expected throughput in window whole"),
        ({"status": "crash"}, "x.json: metrics: expected none with status 'crash', found 2"),
    ],
)
def test_a_result_that_contradicts_itself_is_refused(change, message):
    with pytest.raises(MeasurementError, match=message):
        table.rows_of_result(result() | change, "x.json")


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("metric", "speed", "metrics.0.metric: "),
        ("window", "warm", "metrics.0.window: "),
        ("value", math.nan, "metrics.0.value: .*finite"),
        ("value", None, "metrics.0: .*number"),
        ("value", "OOM", "metrics.0.value: .*number"),
        ("system", "x", "metrics.0.system: unknown key"),
    ],
)
def test_a_wrong_metric_names_file_and_key(field, value, message):
    wrong = copy.deepcopy(result())
    wrong["metrics"][0][field] = value
    with pytest.raises(MeasurementError, match="x.json: " + message):
        table.rows_of_result(wrong, "x.json")


def test_unknown_and_mistyped_columns_of_a_cell_are_refused():
    with pytest.raises(MeasurementError, match=r"x\.json: cell: unknown column 'gpu'"):
        table.rows_of_result(result(gpu=2), "x.json")
    with pytest.raises(MeasurementError, match="gpus: expected a whole number, found 'two'"):
        build(result(gpus="two"))
    with pytest.raises(MeasurementError, match="gpus: expected a whole number, found 1.5"):
        build(result(gpus=1.5))
    with pytest.raises(MeasurementError, match="gpus: expected a whole number, found 10000000000000000000000"):
        build(result(gpus=10**22))


def test_one_line_names_the_mistake():
    with pytest.raises(MeasurementError) as caught:
        table.rows_of_result(result() | {"version": 2}, "x.json")
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("metric", "speed", "metric: expected one of time, .*, found 'speed'"),
        ("unit", "ms", "unit: expected tok/s for throughput, found 'ms'"),
        ("direction", "lower", "direction: expected higher for throughput, found 'lower'"),
        ("kind", "guessed", "kind: expected one of measured, .*, found 'guessed'"),
        ("window", pd.NA, "window: expected a value, found nothing"),
        ("statistic", "mean", "statistic: expected one of single, median, found 'mean'"),
        ("status", "oom", "value: expected none with status oom, found 100.0"),
        ("value", pd.NA, "value: expected a number with status ok, found nothing"),
        ("value", math.inf, "value: expected a finite number, found inf"),
        ("ci_low", 1.0, "ci_low: expected both ends"),
        ("n", 0, "n: expected at least 1, found 0"),
        ("repeat", pd.NA, "repeat: expected the number of the fresh process, found nothing"),
    ],
)
def test_validate_names_file_row_column_and_expectation(column, value, message):
    frame = build(result(), result(repeat=2))
    frame.loc[2, column] = value
    with pytest.raises(MeasurementError, match=r"t\.csv: row 3 \(of 1\.json\): " + message):
        table.validate(frame, "t.csv")


def test_validate_refuses_an_interval_beside_the_value():
    frame = build(result())
    frame.loc[0, ["ci_low", "ci_high"]] = [101.0, 102.0]
    with pytest.raises(MeasurementError, match="ci_low: expected an interval around the value"):
        table.validate(frame)


def test_validate_refuses_duplicates_and_wrong_columns():
    with pytest.raises(MeasurementError, match=r"row 3 \(of 1\.json\): repeat: expected one single row for throughput"):
        table.validate(build(result(), result()))
    with pytest.raises(MeasurementError, match="unknown column 'speed'"):
        table.validate(build(result()).assign(speed=1))
    with pytest.raises(MeasurementError, match="no column 'log'"):
        table.validate(build(result()).drop(columns="log"))


def test_summary_is_the_median_without_an_interval_below_six_repeats():
    frame = build(*(result(repeat=i, throughput=value) for i, value in enumerate((100.0, 130.0, 110.0), 1)))
    (row,) = medians(frame).to_dict("records")
    assert (row["value"], row["n"], row["status"]) == (110.0, 3, "ok")
    assert pd.isna(row["ci_low"])
    assert row["note"] == "no 95 % interval from 3 repeats, it takes 6"
    assert pd.isna(row["repeat"])
    assert pd.isna(row["started_at"])  # the repeats differ in it
    assert row["git_sha"] == "abc"


def test_summary_of_six_repeats_has_their_range_as_its_interval():
    frame = build(*(result(repeat=i, throughput=100.0 + i) for i in range(1, 7)))
    (row,) = medians(frame).to_dict("records")
    assert (row["value"], row["ci_low"], row["ci_high"]) == (103.5, 101.0, 106.0)
    assert pd.isna(row["note"])


def test_one_failed_repeat_fails_every_summary_of_the_cell():
    frame = build(result(), result(repeat=2, status="timeout"), result(repeat=3, status="oom"), result("mlora"))
    summary = table.summarise(frame)
    table.validate(summary)
    failed = summary[(summary["statistic"] == "median") & (summary["system"] == "lorafusion")]
    assert set(failed["metric"]) == {"throughput", "time"}
    assert failed["value"].isna().all()
    assert set(failed["status"]) == {"oom"}
    assert set(failed["note"]) == {"2 of 3 repeats failed (oom: out of memory)"}
    assert (summary["statistic"] == "single").sum() == len(frame)
    assert medians(frame).set_index("system")["value"]["mlora"] == 100.0


def test_summary_says_that_the_repeats_are_of_several_commits_and_refuses_several_settings():
    second = result(repeat=2)
    second["provenance"]["git_sha"] = "def"
    assert "repeats differ in git_sha" in medians(build(result(), second))["note"][0]
    second["provenance"]["config_hash"] = "d"
    with pytest.raises(MeasurementError, match="its repeats differ in config_hash"):
        table.summarise(build(result(), second))


@pytest.mark.parametrize(
    ("company", "note"),
    [
        ({"other_jobs": "8 of alice: 2 CPUs, N/A"}, "beside other Slurm jobs (8 of alice: 2 CPUs, N/A)"),
        ({"other_nodes": [{"other_gpu_processes": ""}, {"other_gpu_processes": "42, /usr/bin/other, 9 MiB"}]},
         "beside other GPU processes (42, /usr/bin/other, 9 MiB)"),
        ({"other_jobs": "", "other_gpu_processes": None, "other_nodes": []}, ""),
    ],
)  # fmt: skip
def test_what_ran_beside_a_run_is_in_its_note_and_in_the_summary(company, note):
    """Also of the nodes after the first. The other repeat ran alone."""
    disturbed = result(repeat=1)
    disturbed["provenance"] |= company
    frame = build(disturbed, result(repeat=2))
    notes = {metric: list(rows["note"].fillna("")) for metric, rows in frame.groupby("metric")}
    assert notes == {
        "throughput": [note, ""],
        "time": ["; ".join(filter(None, ["fastest of 5", note])), "fastest of 5"],
    }
    summary = table.summarise(frame)
    summary = summary[summary["statistic"] == "median"].set_index("metric")["note"]
    few = "no 95 % interval from 2 repeats, it takes 6"
    assert summary["time"] == "; ".join(["fastest of 5", few, *["1 of 2 repeats ran beside others"] * bool(note)])


def test_summarise_twice_is_summarise_once():
    once = table.summarise(build(result(), result(repeat=2)))
    pd.testing.assert_frame_equal(once, table.summarise(once))


def test_csv_and_parquet_hold_the_same_table(tmp_path):
    frame = table.summarise(
        build(
            result(throughput=0.1 + 0.2),
            result("mlora", throughput=1e-300),
            result("peft", status="nan"),
            result("a,b", throughput=1 / 3),
        )
    )
    table.write(frame, tmp_path / "a" / "t.csv", tmp_path / "t.parquet")
    from_csv, from_parquet = table.read(tmp_path / "a" / "t.csv"), table.read(tmp_path / "t.parquet")
    pd.testing.assert_frame_equal(from_csv, from_parquet)
    pd.testing.assert_frame_equal(from_csv, frame)
    assert set(from_csv[from_csv["system"] == "peft"]["status"]) == {"nan"}


def test_equal_tables_give_equal_bytes_whatever_their_order(tmp_path):
    frame = table.summarise(build(result(), result("mlora"), result("mlora", repeat=2)))
    shuffled = frame.sample(frac=1, random_state=3)
    table.write(frame, tmp_path / "1.csv", tmp_path / "1.parquet")
    table.write(shuffled, tmp_path / "2.csv", tmp_path / "2.parquet")
    for suffix in ("csv", "parquet"):
        assert (tmp_path / f"1.{suffix}").read_bytes() == (tmp_path / f"2.{suffix}").read_bytes()
    assert len(list(tmp_path.iterdir())) == 8  # four seals and no temporary files


def test_a_wrong_table_is_not_written(tmp_path):
    frame = build(result()).assign(unit="ms")
    with pytest.raises(MeasurementError, match="unit: expected tok/s"):
        table.write(frame, tmp_path / "t.csv", tmp_path / "t.parquet")
    assert list(tmp_path.iterdir()) == []


def test_read_names_the_row_of_an_edited_file(tmp_path):
    path = tmp_path / "t.csv"
    table.write(build(result()), path, tmp_path / "t.parquet")
    text = path.read_text()
    unit = r"t\.csv: row 1 .*: unit: expected tok/s for throughput, found 'tok/min'"
    path.write_text(text.replace("tok/s", "tok/min"))
    with pytest.raises(MeasurementError, match=unit):
        table.read_unsealed(path)
    path.write_text(text.replace(",100.0,", ",OOM,"))
    with pytest.raises(MeasurementError, match=r"t\.csv: value: expected a number, found 'OOM'"):
        table.read_unsealed(path)
    with pytest.raises(MeasurementError, match="ends in .csv or .parquet"):
        table.read(tmp_path / "t.json")


def test_json_schema_accepts_the_rows_and_refuses_wrong_ones(tmp_path):
    jsonschema = pytest.importorskip("jsonschema")
    table.write_json_schema(tmp_path / "row.schema.json")
    schema = json.loads((tmp_path / "row.schema.json").read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    frame = table.summarise(build(result(), result("mlora", status="oom")))
    rows = json.loads(frame.to_json(orient="records"))
    for row in rows:
        validator.validate(row)
        for wrong in ({"unit": "ms"}, {"value": None, "status": "ok"}, {"value": 1.0, "status": "oom"}, {"more": 1}):
            assert not validator.is_valid(row | wrong)


def test_every_metric_of_the_vocabulary_has_unit_and_direction():
    assert {metric.direction for metric in METRICS.values()} == {"lower", "higher"}
    assert METRICS["throughput"].unit == "tok/s"
    assert METRICS["peak_memory"].unit == "B"
