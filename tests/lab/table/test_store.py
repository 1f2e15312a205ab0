"""The results behind a table: kept beside it, and the table made of them again."""

from __future__ import annotations

import gzip
import shutil

import pytest

from lorafusion.core.config import CONFIGS
from lorafusion.core.schema import UserError
from lorafusion.core.seals import seal, sealed
from lorafusion.lab.experiments import EXPERIMENTS
from lorafusion.lab.table import table
from lorafusion.lab.table.result import write_result
from lorafusion.lab.table.store import read_store, require_store, store_path, write_store
from tests.cli.test_cli import lorafusion

CELL = "model~tiny/workload~xsum/gpus~1/batch~8/system~{system}"


def result(system="mlora", repeat=1, value=3.25, workload="w", config="c", **changes) -> dict:
    origin = {
        "git_sha": "a" * 40,
        "config_hash": config,
        "workload_hash": workload,
        "plan_hash": system,
        "hostname": "h",
    }
    cell = {"suite": "s", "kind": "measured", "cell": CELL.format(system=system), "system": system, "repeat": repeat,
            "merged_qkv": False}  # fmt: skip
    metric = {"metric": "time", "value": value, "unit": "s", "direction": "lower", "window": "whole"}
    return {"version": 1, "status": "ok", "cell": cell, "expected": [], "metrics": [metric],
            "losses": {"a": [2.1 / 3, 1e-17, None]}, "provenance": origin} | changes  # fmt: skip


@pytest.fixture
def gathered(tmp_path):
    """A folder with a table of four runs and its store; the result files are gone."""
    runs = tmp_path / "runs"
    runs.mkdir()
    paths = []
    for system in ("mlora", "peft"):
        for repeat in (1, 2):
            paths.append(runs / f"{system}-{repeat}.json")
            write_result(paths[-1], result(system, repeat, value=0.1 * repeat))
    done = measured(tmp_path / "out", *paths)
    assert done.returncode == 0, done.stderr
    shutil.rmtree(runs)
    return tmp_path / "out"


def test_a_table_is_made_of_its_store_to_the_last_byte(gathered, tmp_path):
    store = gathered / "measurements.results.jsonl.gz"
    again = tmp_path / "again"
    done = measured(again, store)
    assert done.returncode == 0, done.stderr
    for name in ("measurements.csv", "measurements.csv.sha256", "measurements.parquet", store.name):
        assert (again / name).read_bytes() == (gathered / name).read_bytes(), name


def test_a_store_has_the_losses_and_all_that_a_result_had(gathered):
    contents = read_store(gathered / "measurements.results.jsonl.gz")
    named = set(table.read(gathered / "measurements.csv")["result"].dropna())
    assert named == set(contents)
    assert {name.rpartition("/")[2]: content for name, content in contents.items()}["peft-2.json"] == sealed(
        result("peft", 2, value=0.2)
    )


def test_a_table_that_is_not_its_stores_is_refused(gathered):
    csv = gathered / "measurements.csv"
    csv.write_text(csv.read_text().replace("0.2,s", "0.3,s"))
    seal(csv)
    with pytest.raises(UserError, match=r"measurements.csv: expected the table that .* was written with"):
        require_store(csv, table.read_unsealed(csv))


def test_a_row_without_its_result_is_refused(gathered):
    csv = gathered / "measurements.csv"
    contents = read_store(store_path(csv))
    contents.pop(max(contents))
    write_store(csv, contents)
    with pytest.raises(UserError, match=r"result: found .*peft-2.json, which is not in"):
        table.read(csv)


@pytest.mark.parametrize(
    "text", [b"", b"no gzip", gzip.compress(b"{}\n", mtime=0), gzip.compress(b'{"table": NaN}\n', mtime=0)]
)
def test_a_store_that_is_none_or_cut_is_refused(gathered, text):
    store = gathered / "measurements.results.jsonl.gz"
    for content in (text, store.read_bytes()[:-20]):
        store.write_bytes(content)
        with pytest.raises(UserError, match="measurements.results.jsonl.gz: "):
            table.read(gathered / "measurements.csv")


def test_no_time_and_no_name_is_in_a_store(gathered, tmp_path):
    content = (gathered / "measurements.results.jsonl.gz").read_bytes()
    assert content[3:8] == bytes(5)  # no name, no time: RFC 1952


def measured(folder, *files, suite=None):
    others = [] if suite else ["--any-suite"]
    return lorafusion("lab", "measure", suite or "smoke", "end_to_end", *files, "--out", folder, *others)


def gather(tmp_path, *results, suite=None):
    paths = []
    for index, content in enumerate(results):
        paths.append(tmp_path / f"{index}.json")
        write_result(paths[-1], content)
    return measured(tmp_path / "out", *paths, suite=suite)


def test_systems_that_trained_different_workloads_are_not_compared(tmp_path):
    done = gather(tmp_path, result("mlora"), result("peft", workload="x"))
    assert done.returncode == 2
    assert "1.json: workload_hash: found x, expected w as in " in done.stderr
    assert gather(tmp_path, result("mlora"), result("peft")).returncode == 0


def test_results_of_two_configurations_of_a_cell_are_refused(tmp_path):
    done = gather(tmp_path, result(), result(repeat=2, config="d"))
    assert done.returncode == 2
    assert "its repeats differ in config_hash" in done.stderr


def test_results_of_another_suite_than_the_one_that_is_named_are_refused(tmp_path):
    smoke = CONFIGS / "suites" / "smoke.yaml"
    cell = {"suite": "smoke", "cell": CELL.format(system="mlora")}
    made = result() | {"cell": result()["cell"] | cell}
    done = gather(tmp_path, made, suite=smoke)
    assert (done.returncode, "0.json: config_hash: found c, expected " in done.stderr) == (2, True), done.stderr
    done = gather(tmp_path, result("unsloth"), suite=smoke)
    assert (done.returncode, "system~unsloth, which" in done.stderr) == (2, True), done.stderr


@pytest.mark.parametrize(
    ("bench", "message"),
    [
        (
            ["kernels", "smoke", "linear~none/rank~16/dropout~0.1"],
            "bench: found linear~none/rank~16/dropout~0.1, which",
        ),
        (["planner", "smoke", "workload~mixed/stages~4/samples~128"], "smoke does not have now"),
        (["os", "smoke", "x"], "unknown bench 'os'; known: "),
    ],
)
def test_a_bench_that_is_no_more_is_refused(tmp_path, bench, message):
    made = result()
    made["provenance"]["bench"] = bench
    done = gather(tmp_path, made)
    assert (done.returncode, message in done.stderr) == (2, True), done.stderr


def test_a_bench_of_other_settings_is_refused_and_one_of_these_is_taken(tmp_path):
    steps = EXPERIMENTS["steps"]
    point = steps.points("smoke")[0]
    made = result(config=steps.key(point))
    made["provenance"]["bench"] = ["steps", "smoke", point.name]
    assert gather(tmp_path, made).returncode == 0
    made["provenance"]["config_hash"] = "old"
    assert "0.json: config_hash: found old, expected" in gather(tmp_path, made).stderr
