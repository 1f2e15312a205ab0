"""In a table every run of a workload has trained the same tokens: its throughput times its time."""

from __future__ import annotations

import pytest

from lorafusion.core.config import CONFIGS
from lorafusion.lab.table import table
from lorafusion.lab.table.table import MeasurementError
from tests.lab.table.test_table import build, result

END_TO_END = CONFIGS.parent / "results" / "reference" / "nvidia-h200" / "end_to_end.parquet"


def run(system: str, repeat: int, seconds: float, throughput: float, workload: str = "w") -> dict:
    found = result(system, repeat, throughput)
    time = {"metric": "time", "value": seconds, "unit": "s", "direction": "lower", "window": "whole"}
    return found | {
        "metrics": [*found["metrics"], time],
        "provenance": found["provenance"] | {"workload_hash": workload},
    }


RUNS = [run("lorafusion", 1, 3.0, 1000 / 3), run("lorafusion", 2, 7.0, 1000 / 7), run("mlora", 1, 11.0, 1000 / 11)]


def test_each_time_may_differ():
    other = run("lorafusion", 3, 3.0, 999 / 3, workload="another")
    other["cell"]["cell"] += "/another"
    table.validate(build(*RUNS, other))


@pytest.mark.parametrize("index", range(3))
@pytest.mark.parametrize("factor", [1.02, 0.999999])
def test_one_that_is_a_little_faster_is_refused(index, factor):
    runs = list(RUNS)
    changed = run(runs[index]["cell"]["system"], runs[index]["cell"]["repeat"], 3.0, factor * 1000 / 3)
    runs[index] = changed
    expected = (
        rf"of {index}\.json\): value: expected 1000 tokens over the run's time, as its workload's other runs have"
    )
    with pytest.raises(MeasurementError, match=expected):
        table.validate(build(*runs))


def test_tokens_are_whole():
    with pytest.raises(MeasurementError, match="value: expected 1000 tokens over the run's time"):
        table.validate(build(run("lorafusion", 1, 3.0, 1000.4 / 3)))


@pytest.mark.parametrize("system", ["lorafusion", "mlora"])
def test_a_system_of_the_table_of_record_cannot_be_made_two_percent_faster(system):
    measured = table.read_unsealed(END_TO_END)
    ours = (measured["system"] == system) & (measured["metric"] == "throughput") & (measured["window"] == "whole")
    measured.loc[ours & (measured["statistic"] == "single"), "value"] *= 1.02
    with pytest.raises(MeasurementError, match="tokens over the run's time"):
        table.validate(measured)
