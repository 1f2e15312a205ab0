"""The capacity of a cell: what is tried, what is chosen, and what is said where nothing fits."""

from __future__ import annotations

import json
from functools import partial
from types import SimpleNamespace

import pytest
import yaml

from lorafusion.config import CONFIGS, cells, read_suite
from lorafusion.data.lengths import make_workload
from lorafusion.errors import UserError
from lorafusion.plan import Plan
from lorafusion.runtime.launch import Outcome
from lorafusion.tuning import Tried, Tuned, beginning, candidates, profile_cell, tune_cell
from lorafusion.workload import Workload


@pytest.fixture
def suite(tmp_path):
    """A suite of one tuned cell of a system, its workload beside it."""

    def make(system="peft-bf16", capacity=1024, gpus=1, device="cpu", **changes) -> SimpleNamespace:
        data = yaml.safe_load((CONFIGS / "suites" / "smoke.yaml").read_text())
        block = data["cells"][0] | {"workloads": ["xsum"], "systems": [system], "gpus": [gpus], "samples": 16}
        block |= {"capacity": capacity, "tuned": True, "length_scale": 64} | changes
        path = tmp_path / "suite.yaml"
        path.write_text(yaml.safe_dump(data | {"name": "one", "cells": [block], "device": device}))
        (cell,) = cells(read_suite(path))
        made = make_workload(CONFIGS / "workloads" / "xsum.yaml", samples=16, global_batch=8, scale=64, seed=1)
        (tmp_path / "workload.json").write_text(made.to_json())
        return SimpleNamespace(path=path, cell=cell, workload=made, workload_path=tmp_path / "workload.json")

    return make


def outcomes(*ends):
    """A launcher that has these outcomes in turn, and keeps what it was asked for: each an exception to the rule, a
    status, or tokens a second of the trials."""
    asked, left = [], list(ends)

    def launch(spec, processes, timeout):
        asked.append([trial.capacity for trial in spec.trials])
        for trial in spec.trials:  # they are there while it runs
            Plan.read(trial.plan)
            Plan.read(trial.part)
        Workload.read(spec.part)
        end = left.pop(0)
        return Outcome(end, "why") if isinstance(end, str) else Outcome("ok", report={"throughputs": end})

    launch.asked = asked
    return launch


def tuned(made, launch, tmp_path) -> Tuned:
    out = tmp_path / "tuned.json"
    tune_cell(made.path, made.cell.name, made.workload_path, out, launch=launch)
    return Tuned.read(out)


def test_capacities_are_halved_as_long_as_the_planner_can_and_the_plan_differs(suite):
    made = suite()
    plans = candidates(made.workload, made.cell)
    longest = max(sample.tokens for job in made.workload.jobs for sample in job.samples)
    assert [plan.capacity for plan in plans] == sorted((plan.capacity for plan in plans), reverse=True)
    assert all(1024 % plan.capacity == 0 and plan.capacity >= longest for plan in plans)
    assert len({plan.microbatches for plan in plans}) == len(plans)
    # Eight samples, the global batch, fit in less than the most: the plan is named by the least that holds it.
    assert plans[0].capacity < 1024
    assert max(one.rows for one in plans[0].microbatches) == 8


def test_the_first_global_batches_are_run(suite):
    made = suite(gpus=2, system="mlora", capacity=256)
    part = beginning(made.workload, 2)
    assert [len(job.batches) for job in part.jobs] == [2] * 4
    assert beginning(made.workload, 9) == made.workload.model_copy(update={"jobs": tuple(
        job.model_copy(update={"steps": 2}) for job in made.workload.jobs)})  # fmt: skip


@pytest.mark.parametrize(
    ("rates", "expected"), [([10.0, 9.0], 0), ([10.0, 11.0, 10.5], 1), ([10.0, 10.0], 0), ([10.0, 11.0, 12.0], 2)]
)
def test_the_fastest_is_chosen_and_of_equal_ones_the_largest(suite, tmp_path, rates, expected):
    made = suite(system="lorafusion", capacity=256)
    all_of_them = [plan.capacity for plan in candidates(made.workload, made.cell)]
    assert len(all_of_them) >= 3
    launch = outcomes(rates)
    found = tuned(made, launch, tmp_path)
    assert launch.asked == [all_of_them]
    assert found.capacity == all_of_them[expected]
    assert [one.throughput for one in found.trials] == rates


def test_what_does_not_fit_is_left_out_and_new_processes_try_the_next(suite, tmp_path):
    made = suite(capacity=256)
    first, second, *_ = [plan.capacity for plan in candidates(made.workload, made.cell)]
    launch = outcomes("oom", [5.0, 4.0])
    found = tuned(made, launch, tmp_path)
    assert [one[0] for one in launch.asked] == [first, second]
    assert found.trials[0] == Tried(capacity=first, status="oom")
    assert found.capacity == second


@pytest.mark.parametrize(
    ("end", "message"),
    [("oom", "not even {least} tokens fit in memory"), ("crash", "tuning: the run ended as crash: why")],
)
def test_a_cell_that_cannot_be_tuned_says_why(suite, tmp_path, end, message):
    made = suite(capacity=256)
    least = candidates(made.workload, made.cell)[-1].capacity
    with pytest.raises(UserError) as caught:
        tuned(made, outcomes(*[end] * 9), tmp_path)
    assert message.format(least=least) in str(caught.value)
    assert not (tmp_path / "tuned.json").exists()


def test_a_real_cell_is_tuned(suite, tmp_path, forked_runs):
    """Also where replicas and stages decide together when to end, and where the executor is somebody else's."""
    from tests import forked

    launch = partial(forked.launch)
    for system, gpus in (("lorafusion", 1), ("megatron-pp", 2)):
        made = suite(system=system, gpus=gpus, capacity=256)
        found = tuned(made, launch, tmp_path)
        rates = [one.throughput for one in found.trials]
        assert all(rates)
        assert all(rate == max(rates[: index + 1]) for index, rate in enumerate(rates[:-1]))


def test_a_tuning_is_for_one_workload(suite, tmp_path):
    from lorafusion.cli_plan import make

    made = suite(capacity=256)
    tuned(made, outcomes([1.0]), tmp_path)
    other = made.workload.model_copy(update={"name": "other"})
    (tmp_path / "other.json").write_text(other.to_json())
    make(made.workload_path, tmp_path / "plan.json", system="peft-bf16", tuned=tmp_path / "tuned.json")
    assert Plan.read(tmp_path / "plan.json").capacity == Tuned.read(tmp_path / "tuned.json").capacity
    with pytest.raises(UserError, match="tuned.json: tuned for workload"):
        make(tmp_path / "other.json", tmp_path / "plan.json", system="peft-bf16", tuned=tmp_path / "tuned.json")


def test_a_file_that_is_no_tuning_says_so(tmp_path):
    (tmp_path / "t.json").write_text(json.dumps({"version": 1, "cell": "c", "workload_hash": "h", "trials": [{}]}))
    with pytest.raises(UserError, match=r"t.json: trials.0.capacity: field required"):
        Tuned.read(tmp_path / "t.json")


def test_a_profile_of_a_cpu_is_refused(suite, tmp_path):
    made = suite()
    with pytest.raises(UserError, match="a suite for a CPU; only a GPU's kernels can be told apart"):
        profile_cell(made.path, made.cell.name, made.workload_path, tmp_path / "plan.json")
