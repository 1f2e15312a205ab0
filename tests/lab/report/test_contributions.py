"""The parts of the speedup are the ratios that can be worked out by hand, or a reason."""

from __future__ import annotations

import math

import pandas as pd
import pytest

from lorafusion.lab.report import style
from lorafusion.lab.report.ratios import COLUMNS, CORNERS, FACTORS, contributions, lacking
from lorafusion.lab.table import table as measurements
from lorafusion.lab.table.table import MeasurementError
from tests.lab.report.speeds import MERGED, SPEEDS


@pytest.fixture
def factors(make_table):
    """The rows of `contributions` of one window, by workload and factor."""

    def of(runs, window="whole", qkv="separate") -> pd.DataFrame:
        rows = contributions(make_table(runs))
        rows = rows[(rows["window"] == window) & (rows["qkv"] == qkv)]
        return rows.set_index(["workload", "factor"])

    return of


def test_the_factors_are_those_worked_out_by_hand(measure, factors):
    rows = factors(measure()).loc["xsum"]
    assert list(rows.index) == list(FACTORS)
    assert rows["value"].to_dict() == pytest.approx(
        {
            "speedup": 18 / 13,
            "baseline": 32 / 65,
            "schedule": 5 / 4,
            "packing": 3 / 2,
            "schedule_and_packing": 15 / 8,
            "kernels": 3 / 2,
            "product": 45 / 16,
            "padding": 5 / 4,
            "unfused-sequential": 1,
            "fused-sequential": 11 / 8,
            "unfused-mlora": 65 / 32,
            "fused-mlora": 5 / 2,
            "unfused-ours": 15 / 8,
            "fused-ours": 45 / 16,
        }
    )
    assert rows["over"].to_dict() == {
        "speedup": "mlora-packed",
        "baseline": "mlora-packed",
        "schedule": "peft-bf16",
        "packing": "schedule",
        "schedule_and_packing": "unfused-sequential",
        "kernels": "unfused-ours",
        "product": "unfused-sequential",
        "padding": "mlora",
    } | dict.fromkeys(CORNERS, "unfused-sequential")
    notes = rows["note"].dropna().to_dict()
    assert notes == {
        "packing": "derived: schedule_and_packing over schedule",
        "unfused-sequential": "1 by definition",
    }


def test_ratios_are_paired_by_repeat_and_have_a_range(measure, factors):
    """A drift that both systems have leaves no trace; one that only one has is the range."""
    rows = factors(measure(drift=(1.0, 0.5, 2.0))).loc["xsum"]
    assert rows["low"].to_dict() == pytest.approx(rows["value"].to_dict())
    slow = {"lorafusion": 900.0}
    others = {name: speed for name, speed in SPEEDS.items() if name not in slow}
    rows = factors(measure(others) + measure(slow, drift=(1.0, 1.21, 1.1))).loc["xsum"]
    speedup = rows.loc["speedup"]
    assert speedup["value"] == pytest.approx(18 / 13 * 1.1)
    assert (speedup["low"], speedup["high"]) == pytest.approx((18 / 13, 18 / 13 * 1.21))
    assert (speedup["bounds"], speedup["n"]) == ("range", 3)


def test_the_parts_multiply_to_the_whole_in_every_row(measure, factors):
    runs = []
    for index, (system, speed) in enumerate(SPEEDS.items()):
        drift = [1 + 0.01 * ((7 * index + 3 * repeat) % 5) for repeat in range(3)]
        runs += measure({system: speed}, style.WORKLOADS, drift)
    values = factors(runs)["value"].unstack()
    assert len(values) == 6
    parts = values["schedule"] * values["packing"] * values["kernels"]
    assert parts.to_dict() == pytest.approx(values["product"].to_dict())
    assert (values["baseline"] * values["product"]).to_dict() == pytest.approx(values["speedup"].to_dict())
    together = values["schedule"] * values["packing"]
    assert together.to_dict() == pytest.approx(values["schedule_and_packing"].to_dict())


def test_packing_is_paired_by_the_repeats_of_four_systems(measure, factors):
    """(600/320) / (500/400) = 3/2 in the first repeat; in the others two systems are slower, on either side."""
    slower = {"mlora-paper-setting": (1.0, 0.5, 1.0), "unfused-sequential": (1.0, 1.0, 0.75)}
    runs = [
        run for name, speed in SPEEDS.items() for run in measure({name: speed}, drift=slower.get(name, (1.0, 1.0, 1.0)))
    ]
    packing = factors(runs).loc[("xsum", "packing")]
    assert (packing["low"], packing["high"], packing["n"]) == pytest.approx((3 / 2, 3, 3))
    assert packing["value"] == pytest.approx((3 / 2 * 3 * 2) ** (1 / 3))
    short = {"peft-bf16": (1.0, 1.0)}
    runs = [
        run for name, speed in SPEEDS.items() for run in measure({name: speed}, drift=short.get(name, (1.0, 1.0, 1.0)))
    ]
    packing = factors(runs).loc[("xsum", "packing")]
    assert packing["n"] == 2
    assert packing["note"].endswith("; only repeats 1, 2 are in all")


def test_megatron_stands_in_where_peft_has_no_cell(measure, factors):
    """500/450 in place of 500/400; the product is the same, so packing is (600/320) / (500/450)."""
    speeds = {name: speed for name, speed in SPEEDS.items() if not name.startswith("peft")}
    rows = factors(measure(speeds, gpus=2)).loc["xsum"]
    assert rows["value"]["schedule"] == pytest.approx(10 / 9)
    assert rows["value"]["packing"] == pytest.approx(27 / 16)
    assert rows["value"]["product"] == pytest.approx(45 / 16)
    assert rows.loc["schedule", "over"] == "megatron-pp"
    remark = "another executor: megatron-pp, as peft-bf16 has no cell"
    assert rows.loc["schedule", "note"] == remark
    assert rows.loc["packing", "note"] == f"derived: schedule_and_packing over schedule; {remark}"
    both = factors(measure() + measure(speeds, ["mixed"]))
    assert both.loc[("all", "schedule"), "over"] == "peft-bf16 or megatron-pp"
    assert f"mixed: {remark}" in both.loc[("all", "packing"), "note"]
    assert "; derived: schedule_and_packing over schedule;" in both.loc[("all", "packing"), "note"]


def test_a_peft_that_failed_is_a_reason_and_not_replaced(measure, factors):
    rows = factors(measure(failed={("xsum", "peft-bf16", 1): "oom"})).loc["xsum"]
    assert set(rows.loc[["schedule", "packing"], "note"]) == {"peft-bf16: OOM (1 of 3 repeats)"}
    assert rows.loc[["schedule", "packing"], "value"].isna().all()
    assert rows.loc["schedule_and_packing", "value"] == pytest.approx(15 / 8)


def test_the_systems_that_the_parts_cannot_do_without():
    assert lacking(SPEEDS) == lacking(set(SPEEDS) - {"peft-bf16"}) == lacking(set(SPEEDS) - {"megatron-pp"}) == []
    assert lacking(set(SPEEDS) - {"peft-bf16", "megatron-pp"}) == ["peft-bf16 or megatron-pp"]
    assert lacking(["lorafusion", "megatron-pp", "unfused-ours"]) == ["unfused-sequential", "mlora-paper-setting"]


def test_over_all_workloads_are_the_geometric_mean_and_its_interval(measure, factors):
    """Kernels give 1.5 and 6 in two workloads: that they differ is no uncertainty, only that their repeats do."""
    others = {name: speed for name, speed in SPEEDS.items() if name != "lorafusion"}
    runs = measure(others, ["xsum", "mixed"])
    runs += measure({"lorafusion": 900.0}, ["xsum"], drift=(1.0, math.exp(0.2), math.exp(-0.2)))
    runs += measure({"lorafusion": 3600.0}, ["mixed"], drift=(1.0, 1.0, 1.0))
    kernels = factors(runs).loc[("all", "kernels")]
    assert kernels["value"] == pytest.approx(3)
    assert (kernels["bounds"], kernels["n"], kernels["note"]) == ("interval", 6, "95 % interval from 3 repeats")
    # The repeats' means are 3, 3 e^0.1 and 3 e^-0.1; Student's t of two degrees of freedom is 4.3027.
    reach = 4.3027 * 0.1 / math.sqrt(3)
    assert (kernels["low"], kernels["high"]) == pytest.approx((3 * math.exp(-reach), 3 * math.exp(reach)), rel=1e-4)


def test_a_product_over_all_workloads_is_that_of_its_parts(measure, factors):
    runs = []
    for factor, workload in enumerate(style.WORKLOADS, start=1):
        runs += measure(SPEEDS | {"lorafusion": 600.0 * factor}, [workload])
    rows = factors(runs).loc["all"]
    assert rows.loc["kernels", "value"] == pytest.approx(math.factorial(5) ** (1 / 5))
    assert rows.loc["kernels", "n"] == 15
    parts = rows.loc[["baseline", "schedule", "packing", "kernels"], "value"]
    assert parts.prod() == pytest.approx(rows.loc["speedup", "value"])


def test_too_few_repeats_have_a_range_and_say_so(measure, factors):
    speedup = factors(measure(workloads=["xsum", "mixed"], drift=(1.0, 1.0))).loc[("all", "speedup")]
    assert (speedup["bounds"], speedup["n"]) == ("range", 4)
    assert "no 95 % interval from 2 repeats, it takes 3" in speedup["note"]
    alone = factors(measure(drift=(1.0,)))
    assert "all" not in alone.index
    assert alone.loc[("xsum", "speedup")][["low", "high", "bounds"]].isna().all()


def test_workloads_of_different_repeats_have_a_range_and_say_so(measure, factors):
    runs = measure(workloads=["xsum"]) + measure(workloads=["mixed"], drift=(1.0,) * 4)
    kernels = factors(runs).loc[("all", "kernels")]
    assert (kernels["bounds"], kernels["n"]) == ("range", 7)
    assert "no 95 % interval, as the workloads have different repeats" in kernels["note"]


def test_windows_are_apart(measure, factors):
    runs = measure()
    for run in runs:
        if run["cell"]["system"] == "lorafusion":
            run["metrics"][1]["value"] = 18000.0
    assert factors(runs, "steady").loc[("xsum", "kernels"), "value"] == pytest.approx(3)
    assert factors(runs, "whole").loc[("xsum", "kernels"), "value"] == pytest.approx(1.5)


def test_merged_cells_have_their_own_corners_over_their_own_first(measure, factors):
    runs = measure() + measure(MERGED, qkv="/qkv~merged")
    merged = factors(runs, qkv="merged").loc["xsum"]
    assert sorted(merged.index) == sorted(["kernels", *CORNERS])
    assert merged["value"]["fused-ours"] == pytest.approx(2000 / 640)
    assert merged["value"]["unfused-ours"] == pytest.approx(15 / 8)
    assert merged["value"]["unfused-sequential"] == 1
    pd.testing.assert_frame_equal(factors(runs), factors(measure()))


def test_the_best_baseline_is_neither_an_ablation_nor_one_that_failed(measure, factors):
    """fused-mlora is faster than any baseline; mlora-packed failed in one repeat."""
    rows = factors(measure(failed={("xsum", "mlora-packed", 2): "oom"})).loc["xsum"]
    assert rows.loc["speedup", "over"] == "mlora"
    assert rows.loc["speedup", "value"] == pytest.approx(900 / 520)
    assert rows.loc["speedup", "note"] == "without mlora-packed: OOM (1 of 3 repeats)"
    failed = rows.loc[["padding", "unfused-mlora"]]
    assert failed[["value", "low", "high", "bounds"]].isna().all(axis=None)
    assert set(failed["note"]) == {"mlora-packed: OOM (1 of 3 repeats)"}


def test_workloads_may_have_different_best_baselines(measure, factors):
    runs = measure() + measure(SPEEDS | {"peft": 800.0}, ["mixed"])
    speedup = factors(runs).loc[("all", "speedup")]
    assert speedup["over"] == "best baseline"
    assert speedup["value"] == pytest.approx(math.sqrt(18 / 13 * 9 / 8))
    assert "xsum: over mlora-packed; mixed: over peft" in speedup["note"]


def test_a_failure_in_one_workload_leaves_no_number_over_all(measure, factors):
    rows = factors(measure(workloads=["xsum", "mixed"], failed={("mixed", "unfused-ours", 1): "timeout"}))
    assert pd.isna(rows.loc[("all", "packing"), "value"])
    assert rows.loc[("all", "packing"), "note"] == "mixed: unfused-ours: timeout (1 of 3 repeats)"
    assert rows.loc[("all", "schedule"), "value"] == pytest.approx(5 / 4)
    assert rows.loc[("all", "product"), "value"] == pytest.approx(45 / 16)


def test_missing_and_skipped_systems_are_reasons(measure, factors):
    skipped = {("xsum", "mlora", repeat): "skipped" for repeat in (1, 2, 3)}
    speeds = {name: speed for name, speed in SPEEDS.items() if name != "unfused-ours"}
    rows = factors(measure(speeds, failed=skipped)).loc["xsum"]
    assert rows.loc["kernels", "note"] == "unfused-ours: no such cell"
    assert rows.loc["padding", "note"] == "mlora: skipped"
    assert rows.loc[["kernels", "packing", "schedule_and_packing"], "value"].isna().all()
    only = factors(measure({"lorafusion": 900.0})).loc["xsum"]
    assert only.loc["speedup", "note"] == "no baseline finished"
    assert only["value"].isna().all()
    assert contributions(measurements.frame([])).columns.tolist() == COLUMNS


def test_repeats_that_only_one_has_are_not_paired(measure, factors):
    others = {name: speed for name, speed in SPEEDS.items() if name != "lorafusion"}
    speedup = factors(measure(others) + measure({"lorafusion": 900.0}, drift=(1.0, 1.0))).loc[("xsum", "speedup")]
    assert speedup["n"] == 2
    assert speedup["note"] == "only repeats 1, 2 are in both"


def test_a_part_between_two_capacities_says_so(measure, factors):
    others = {name: speed for name, speed in SPEEDS.items() if name != "lorafusion"}
    rows = factors(measure(others, capacity=4096) + measure({"lorafusion": 900.0}, capacity=8192)).loc["xsum"]
    assert rows.loc["kernels", "note"] == "capacity 8192 over 4096"
    assert pd.isna(rows.loc["schedule", "note"])


def test_packing_says_where_any_of_its_four_systems_has_another_capacity(measure, factors):
    others = {name: speed for name, speed in SPEEDS.items() if name != "peft-bf16"}
    rows = factors(measure(others, capacity=8192) + measure({"peft-bf16": 400.0}, capacity=4096)).loc["xsum"]
    assert rows.loc["schedule", "note"] == "capacity 8192 over 4096"
    assert rows.loc["packing", "note"].endswith("; capacity 8192 over 8192, divided by 8192 over 4096")
    assert pd.isna(rows.loc["schedule_and_packing", "note"])


def test_two_cells_for_one_place_are_refused(measure, make_table):
    with pytest.raises(MeasurementError, match="one bar for two numbers"):
        contributions(make_table(measure() + measure(cell="another")))
