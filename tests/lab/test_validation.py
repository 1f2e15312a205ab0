"""What is said of a run before it is made, and how far that is from what it took."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest
import yaml

from lorafusion.core.config import CONFIGS, read_model
from lorafusion.core.schema import UserError
from lorafusion.lab import cost_profile
from lorafusion.lab.cell_result import BY_FLOP, predicted_row
from lorafusion.lab.keys import OutOfDateError, suite_files
from lorafusion.lab.report import drawing
from lorafusion.lab.report.figures.validation import draw_validation, errors, validation_data
from lorafusion.lab.table.table import MeasurementError, frame, read, summarise
from lorafusion.lab.validation import (
    FITTED,
    _Cell,
    read_plans,
    with_predictions,
)
from lorafusion.planning import plan_system
from lorafusion.planning.simulator.costs import GRADIENT_BYTES, HIDDEN_BYTES, adapter_parameters
from lorafusion.planning.simulator.profile import dimensions_of

RECORD = CONFIGS.parent / "results" / "reference" / "nvidia-h200"
TRUE = {"fused": {"token": 1.2, "host": 0.8}, "looped": {"token": 1.4, "adapter": 3.0, "host": 1.1, "host_adapter": 40}}


@pytest.fixture(scope="module")
def suite(tmp_path_factory) -> Path:
    grid = {"models": ["llama-3.1-8b"], "gpus": [1], "workloads": ["xsum", "mixed", "wikisum"], "samples": 4,
            "systems": ["lorafusion", "fused-mlora", "fused-sequential", "mlora-packed", "unfused-ours"],
            "global_batch": 2, "capacity": 8192, "minutes": 3}  # fmt: skip
    path = tmp_path_factory.mktemp("suite") / "known.yaml"
    text = {"name": "known", "description": "known costs", "device": "cuda", "dtype": "bfloat16",
            "adapter_dtype": "bfloat16", "repeats": 1, "cells": [grid]}  # fmt: skip
    path.write_text(yaml.safe_dump(text))
    return path


@pytest.fixture(scope="module")
def cells(suite):
    """Files, plans, and a table of runs that took just what known costs say."""
    files = suite_files(suite)
    plans = {name: plan_system(of.expected_workload, of.cell.system, stages=1, capacity=8192)
             for name, of in files.items()}  # fmt: skip
    rows = []
    for name, of in files.items():
        kind = of.system.lora.rpartition(":")[2]
        known = _Cell(of, plans[name], None).predicted({"host_adapter": 0.0} | TRUE[kind])
        cell = of.cell
        rows.append({
            "metric": "time", "value": known, "unit": "s", "direction": "lower", "window": "whole", "status": "ok",
            "suite": "known", "kind": "measured", "cell": name, "repeat": 1, "statistic": "single", "n": 1,
            "system": cell.system, "model": cell.model, "workload": cell.workload, "gpus": 1, "implementation": kind,
            "merged_qkv": False, "global_batch": 2, "gpu_name": "known", "git_sha": "0" * 40,
            "workload_hash": of.expected_workload.content_hash, "plan_hash": plans[name].content_hash,
        })  # fmt: skip
    return files, plans, frame(rows)


def test_costs_that_fit_the_other_workloads_predict_a_run(cells):
    """The runs took what costs of the fitted form say: each is predicted, without having been looked at."""
    files, plans, table = cells
    data = validation_data(with_predictions(table, files, plans))
    assert len(data) == len(files) == 15
    assert set(data["costs"]) == {FITTED}
    found = errors(data)
    assert found["count"].to_dict() == {(1, "fused"): 9, (1, "looped"): 6}
    assert found["max"][1, "fused"] < 0.001
    assert (data["ratio"] - 1).abs().median() < 0.001  # of `looped` one cell waits for its host, as no other does


def test_a_run_is_not_predicted_by_itself(cells):
    """A workload whose runs took twice as long is predicted as before, half as long, by the others."""
    files, plans, table = cells
    of_xsum = table["workload"] == "xsum"
    slow = table.assign(value=table["value"].where(~of_xsum, 2 * table["value"]))
    data = validation_data(with_predictions(slow, files, plans)).set_index("cell")
    assert data.loc[data["workload"] == "xsum", "ratio"].to_numpy(float) == pytest.approx(0.5, rel=0.02)


def test_what_ran_on_one_workload_alone_is_not_predicted(cells):
    files, plans, table = cells
    one = table[(table["workload"] == "xsum") | (table["implementation"] == "fused")]
    assert set(validation_data(with_predictions(one, files, plans))["implementation"]) == {"fused"}
    with pytest.raises(MeasurementError, match="no run of the table has a predicted time"):
        validation_data(with_predictions(one[one["workload"] == "xsum"], files, plans))


def test_a_plan_that_was_not_run_is_refused(cells):
    files, plans, table = cells
    first, second = sorted(plans)[:2]
    with pytest.raises(OutOfDateError, match="plan_hash"):
        with_predictions(table, files, plans | {first: plans[second]})
    with pytest.raises(MeasurementError, match="no plan of it"):
        with_predictions(table, files, {first: plans[first]})


def test_the_predicted_row_stands_beside_the_measured_one(cells):
    files, plans, _ = cells
    name = sorted(plans)[0]
    predicted = predicted_row(files[name], plans[name], files[name].expected_workload)
    assert (predicted["metric"], predicted["window"], predicted["cell"]) == ("time", "whole", {"kind": "simulated"})
    assert 0.1 < predicted["value"] < 100
    assert predicted["note"] == BY_FLOP


def test_the_figure_shows_ratios_and_errors(cells):
    files, plans, table = cells
    data = validation_data(summarise(with_predictions(table, files, plans)))
    data.loc[data["implementation"] == "fused", "ratio"] = [1.1] + [0.95] * 8
    figure = draw_validation(data)
    [ax] = figure.axes
    drawn = sorted(float(y) for line in ax.lines if line.get_marker() in "os" for y in line.get_ydata())
    assert drawn == pytest.approx(sorted(data["ratio"].astype(float)))
    assert "fused: 5.6%, 10.0% of 9" in ax.get_title()


def test_a_profile_predicts_what_it_has(cells, tmp_path):
    """Of the LoRA operations the profile has one; its time of a token gives that of a run."""
    files, plans, table = cells
    model = read_model("llama-3.1-8b")
    costs = {"token": 1e-4, "backward": 2.0}
    profile = {"version": 1, "device": "cuda", "gpu_name": "known", "dtype": "bfloat16", "fits": [{
        "model": "llama-3.1-8b", "dimensions": dimensions_of(model), "implementation": "looped", "costs": costs,
        "points": 1, "mean_error": 0.0, "worst_error": 0.0}]}  # fmt: skip
    path = tmp_path / "known.yaml"
    path.write_text(yaml.safe_dump(profile))
    data = validation_data(with_predictions(table, files, plans, path)).set_index("cell")
    assert set(data["implementation"]) == {"looped"}
    assert set(data["costs"]) == {"costs: known.yaml"}
    expected = {name: 3 * 1e-4 * model.num_hidden_layers * files[name].expected_workload.tokens for name in data.index}
    assert data["predicted"].to_dict() == pytest.approx(expected)


def test_a_profile_counts_the_sums_of_replicas(cells, suite, tmp_path):
    """Where replicas do the same work, the sums of their gradients are all that they take longer."""
    text = yaml.safe_load(suite.read_text())
    text["cells"][0] |= {"gpus": [2], "data_parallel": 2, "workloads": ["xsum"], "systems": ["unfused-ours"]}
    path = tmp_path / "pairs.yaml"
    path.write_text(yaml.safe_dump(text))
    ((name, files),) = suite_files(path).items()
    plan = plan_system(files.expected_workload, files.cell.system, stages=1, capacity=8192, data_parallel=2)
    hashes = {"workload_hash": files.expected_workload.content_hash, "plan_hash": plan.content_hash}
    row = cells[2].iloc[:1].assign(cell=name, gpus=2, implementation="looped", **hashes)
    model, predicted = read_model("llama-3.1-8b"), []
    for transfer in (1e-12, 1e-6):
        profile = {
            "version": 1,
            "device": "cuda",
            "gpu_name": "known",
            "dtype": "bfloat16",
            "fits": [
                {
                    "model": "llama-3.1-8b",
                    "dimensions": dimensions_of(model),
                    "implementation": "looped",
                    "costs": {"token": 1e-9, "transfer": transfer},
                    "points": 1,
                    "mean_error": 0.0,
                    "worst_error": 0.0,
                }
            ],
        }
        (tmp_path / "known.yaml").write_text(yaml.safe_dump(profile))
        table = with_predictions(row, {name: files}, {name: plan}, tmp_path / "known.yaml")
        predicted.append(validation_data(table)["predicted"].item())
    parameters = sum(adapter_parameters(model, job) * len(job.batches) for job in files.expected_workload.jobs)
    bytes_of_hidden = HIDDEN_BYTES * model.hidden_size
    sent = GRADIENT_BYTES * parameters * model.num_hidden_layers  # of a ring of two, each replica sends them once
    assert predicted[1] - predicted[0] == pytest.approx(sent * 1e-6 / bytes_of_hidden, rel=0.01)


def test_a_suites_folder_of_plans_is_read(cells, tmp_path):
    _, plans, _ = cells
    for name, plan in plans.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / f"{name}.json").write_text(plan.to_json())
    assert read_plans(tmp_path) == plans


# --- The record


def test_the_plans_of_record_are_those_that_were_run():
    plans = read_plans(RECORD / "end_to_end.plans.jsonl.gz")
    table = read(RECORD / "end_to_end.parquet")
    ran = table[table["plan_hash"].notna()].drop_duplicates("cell").set_index("cell")["plan_hash"]
    assert {cell: plan.content_hash for cell, plan in plans.items()} == ran.to_dict()
    assert len(plans) == 93


def test_the_validation_of_record_is_of_the_times_of_record():
    data = drawing.read_data(RECORD / "validation.csv").set_index("cell")
    table = read(RECORD / "end_to_end.parquet")
    times = table[(table["metric"] == "time") & (table["window"] == "whole") & (table["statistic"] == "median")]
    assert data["measured"].to_dict() == times.set_index("cell")["value"][data.index].to_dict()
    assert (data["predicted"] / data["measured"]).to_numpy() == pytest.approx(data["ratio"].to_numpy())
    assert set(data["costs"]) == {FITTED}
    assert len(data) == 91  # two arms ran on one workload alone


def test_the_validation_of_record_of_a_cpu_is_what_its_tables_give(tmp_path):
    record = RECORD.parent / "cpu"
    profile = cost_profile.profile_of(read(record / "costs.parquet"))
    (tmp_path / "profile.yaml").write_text(yaml.safe_dump(profile.model_dump(mode="json", exclude_defaults=True)
                                                          | {"version": profile.version}))  # fmt: skip
    files, plans = suite_files(CONFIGS / "suites" / "cpu-tiny.yaml"), read_plans(record / "runs.plans.jsonl.gz")
    data = validation_data(with_predictions(read(record / "runs.parquet"), files, plans, tmp_path / "profile.yaml"))
    recorded = drawing.read_data(record / "validation.csv").set_index("cell")
    assert set(recorded["gpus"]) == {1, 2, 4}
    data = data.set_index("cell")
    assert data["measured"].to_dict() == pytest.approx(recorded["measured"].to_dict())
    assert data["predicted"].to_dict() == pytest.approx(recorded["predicted"].to_dict(), rel=1e-3)


@pytest.mark.parametrize("content", [b"", b"no gzip", *(
    gzip.compress(line, mtime=0) for line in (b"[]\n", b'{"cell": "a"}\n', b'{"cell": "a", "plan": {}}'))])  # fmt: skip
def test_a_file_of_no_plans_is_refused(tmp_path, content):
    (tmp_path / "x.plans.jsonl.gz").write_bytes(content)
    with pytest.raises(UserError, match=r"x\.plans\.jsonl\.gz: expected a cell and its plan in each line"):
        read_plans(tmp_path / "x.plans.jsonl.gz")
