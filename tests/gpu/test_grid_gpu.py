"""The times of calls on a GPU: the host's, the wall's and the device's are told apart."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from lorafusion.lab.experiments import EXPERIMENTS
from lorafusion.lab.experiments.grid_times import builder_of, measured
from lorafusion.lab.experiments.timing import call_seconds, own_stream, prepared

GPU = torch.device("cuda", 0)
SLEPT = 2_000_000  # cycles of an SM, about a millisecond


def test_a_device_that_is_slow_is_no_time_of_the_host():
    call = partial(torch.cuda._sleep, SLEPT)
    with own_stream(GPU):
        times = call_seconds({"sleep": call}, {"sleep": prepared(call, GPU)}, GPU)["sleep"]
    assert times["wall"] > 0.0005
    assert times["host"] < 0.2 * times["wall"]
    assert times["device"] == pytest.approx(times["wall"], rel=0.1)


def test_a_point_of_the_grid_has_three_times_of_all_its_cases():
    point = EXPERIMENTS["grid"].point("h200", "llama-3.1-8b")
    bench = next(bench for bench in point.subject if bench.shape == (4096, 1024))
    with own_stream(GPU):
        rows = measured(bench, 64, builder_of(point.settings, bench), turn=1)
    cases = [(case.implementation, case.adapters) for case in bench.cases(64)]
    assert [(row["implementation"], row["cell"]["adapters"]) for row in rows[::3]] == cases
    assert [row["metric"] for row in rows] == ["host", "wall", "device"] * len(cases)
    assert all(row["status"] == "ok" and row["value"] > 0 for row in rows)
