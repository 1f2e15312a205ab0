"""The capacity of a cell: what is tried, what is chosen, and what is said where nothing fits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from lorafusion.core.config import CONFIGS, read_systems
from lorafusion.core.plan import Plan
from lorafusion.core.schema import UserError
from lorafusion.core.workload import Workload
from lorafusion.data.lengths import make_workload
from lorafusion.lab.experiments.end_to_end import spec_of
from lorafusion.lab.keys import CellFiles
from lorafusion.lab.suite import cells, read_suite
from lorafusion.lab.trials import SLOWER
from lorafusion.lab.tuning import (
    TrialOptions,
    Tried,
    Tuned,
    beginning,
    candidates,
    plan_cell,
    profile_cell,
    sizes,
    tune_cell,
)
from lorafusion.launch.outcome import Outcome
from lorafusion.planning import plan_system


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


def plans_of(made) -> list[Plan]:
    return candidates(made.workload, CellFiles(read_suite(made.path), made.cell))


def outcomes(*ends):
    """A launcher that has these outcomes in turn, and keeps what it was asked for: tokens a second of the first trials,
    and how the run ended."""
    asked, left = [], list(ends)

    def launch(spec, processes, timeout):
        assert 0 < timeout <= 180
        options = TrialOptions.of(spec)
        asked.append([trial.capacity for trial in options.trials])
        for trial in options.trials:  # they are there while it runs
            Plan.read(trial.plan)
            Plan.read(trial.part)
        Workload.read(options.part)
        rates, status = left.pop(0)
        Path(options.throughputs).write_text("".join(f"{rate}\n" for rate in rates))
        return Outcome(status, "" if status == "ok" else "why")

    launch.asked = asked
    return launch


def tuned(made, launch, tmp_path) -> Tuned:
    out = tmp_path / "tuned.json"
    tune_cell(made.path, made.cell.name, made.workload_path, out, launch=launch)
    return Tuned.read(out)


def test_capacities_get_smaller_as_long_as_the_planner_can_and_the_plan_differs(suite):
    made = suite()
    plans = plans_of(made)
    longest = max(sample.tokens for job in made.workload.jobs for sample in job.samples)
    assert [plan.capacity for plan in plans] == sorted((plan.capacity for plan in plans), reverse=True)
    assert all(plan.capacity in sizes(1024) and plan.capacity >= longest for plan in plans)
    assert len({plan.microbatches for plan in plans}) == len(plans)
    # Eight samples, the global batch, fit in less than the most: the plan is named by the least that holds it.
    assert plans[0].capacity < 1024
    assert max(one.rows for one in plans[0].microbatches) == 8


def test_sizes_are_halves_and_three_quarters():
    assert list(sizes(32)) == [32, 24, 16, 12, 8, 6, 4, 3, 2, 1, 1]


@pytest.mark.parametrize("system", ["mlora-packed", "peft-bf16"])
@pytest.mark.parametrize("name", ["xsum", "cnn_dailymail", "wikisum", "mixed", "heterogeneous"])
def test_no_number_of_samples_is_left_out(suite, name, system):
    """The sizes are near enough to each other for each power of two of samples."""
    made = make_workload(CONFIGS / "workloads" / f"{name}.yaml", samples=16, global_batch=8, seed=1)
    tried = suite(system=system, capacity=32768)
    counts = [max(len(one.samples) for batch in plan.microbatches for one in batch.segments)
              for plan in candidates(made, CellFiles(read_suite(tried.path), tried.cell))]  # fmt: skip
    assert len(counts) > 1
    assert all(larger <= 2 * smaller for larger, smaller in pairwise(counts))


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
    all_of_them = [plan.capacity for plan in plans_of(made)]
    assert len(all_of_them) >= 3
    launch = outcomes((rates, "ok"))
    found = tuned(made, launch, tmp_path)
    assert launch.asked == [all_of_them]
    assert found.capacity == all_of_them[expected]
    assert [one.throughput for one in found.trials] == rates


def test_what_does_not_fit_is_left_out_and_new_processes_try_the_next(suite, tmp_path):
    made = suite(system="lorafusion", capacity=256)
    first, second, third, *_ = [plan.capacity for plan in plans_of(made)]
    launch = outcomes(([], "oom"), ([5.0, 4.0], "ok"))
    found = tuned(made, launch, tmp_path)
    assert [one[0] for one in launch.asked] == [first, second]
    assert found.trials == (Tried(capacity=first, status="oom", note="why"), Tried(capacity=second, throughput=5.0),
                            Tried(capacity=third, throughput=4.0))  # fmt: skip
    assert found.capacity == second


@pytest.mark.parametrize("status", ["oom", "crash", "timeout"])
def test_what_was_found_before_something_failed_counts(suite, tmp_path, status):
    made = suite(system="lorafusion", capacity=256)
    first, second, *_ = [plan.capacity for plan in plans_of(made)]
    launch = outcomes(([5.0], status))
    found = tuned(made, launch, tmp_path)
    assert len(launch.asked) == 1
    assert found.trials[1:] == (Tried(capacity=second, status=status, note="why"),)
    assert found.capacity == first


@pytest.mark.parametrize(("status", "runs"), [("oom", None), ("crash", 1), ("timeout", 1)])
def test_a_cell_that_fits_nowhere_is_planned_with_the_least_and_its_run_says_why(suite, tmp_path, status, runs):
    made = suite(system="lorafusion", capacity=256)
    every = [plan.capacity for plan in plans_of(made)]
    launch = outcomes(*[([], status)] * 9)
    found = tuned(made, launch, tmp_path)
    assert len(launch.asked) == (runs or len(every))
    assert {one.status for one in found.trials} == {status}
    assert found.capacity == every[(runs or len(every)) - 1]


FIXED = [name for name, system in read_systems().items() if system.planner != "lorafusion.planning.fast:plan"]


@pytest.mark.parametrize("name", FIXED)
@pytest.mark.parametrize("workload", ["wikisum", "mixed"])
def test_the_beginning_is_cut_as_the_whole_plan_is(name, workload):
    """Samples of each adapter in a microbatch, for systems that fix them: another cut would be timed in their place."""
    whole = make_workload(CONFIGS / "workloads" / f"{workload}.yaml", samples=32, global_batch=8, seed=1)
    part, stages = beginning(whole, 1), 1
    for capacity in (16384, 8192, 4096):
        cuts = []
        for jobs in (whole, part):
            plan = plan_system(jobs, name, stages=stages, capacity=capacity)
            cuts.append({tuple((one.adapter, len(one.samples)) for one in batch.segments)
                         for batch in plan.microbatches})  # fmt: skip
        assert cuts[0] == cuts[1]


@pytest.mark.parametrize("workload", ["xsum", "cnn_dailymail", "wikisum", "mixed", "heterogeneous"])
def test_the_beginning_has_no_larger_microbatches_than_the_whole_plan(workload):
    """Which would not fit in memory where the plan does."""
    whole = make_workload(CONFIGS / "workloads" / f"{workload}.yaml", samples=16, global_batch=8, seed=1)
    for capacity in sizes(32768):
        if capacity < 4096:
            break
        largest = [max(one.tokens for one in plan_system(jobs, "lorafusion", stages=1, capacity=capacity).microbatches)
                   for jobs in (beginning(whole, 1), whole)]  # fmt: skip
        assert largest[0] <= largest[1]


@pytest.mark.parametrize(("system", "gpus"), [("lorafusion", 1), ("mlora", 2), ("megatron-pp", 2)])
def test_a_real_cell_is_tuned(suite, tmp_path, system, gpus):
    """Also where stages decide together when to end, and where the executor is somebody else's."""
    from tests import forked

    made = suite(system=system, gpus=gpus, capacity=256)
    found = tuned(made, forked.launch, tmp_path)
    rates = [one.throughput for one in found.trials]
    assert all(rates), found
    every = [plan.capacity for plan in plans_of(made)]
    assert [one.capacity for one in found.trials] == every[: len(rates)]
    # It ended with the last capacity, or with the first that was clearly slower.
    assert len(rates) == len(every) or rates[-1] < SLOWER * max(rates)
    assert all(rate >= SLOWER * max(rates[: index + 1]) for index, rate in enumerate(rates[:-1]))


TWO_NODES = """
import os, sys, time
from pathlib import Path
from lorafusion.lab.tuning import TrialOptions, tune_cell
from lorafusion.launch.outcome import Outcome
from lorafusion.launch.rendezvous import meet
name, suite, cell, workload, out, *ends = sys.argv[1:]
def launch(spec, processes, seconds, nodes, reports):
    reports.mkdir(parents=True, exist_ok=True)
    if meet(reports, nodes, os.environ).rank == 0:
        time.sleep(1)  # in which the other comes: its processes would be missed
    options = TrialOptions.of(spec)
    print(processes, nodes, reports.name, *[trial.capacity for trial in options.trials])
    status = ends.pop(0)
    if status == "ok":
        Path(options.throughputs).write_text("5.0\\n")
    return Outcome(status)
print(tune_cell(Path(suite), cell, Path(workload), Path(out), launch, 2))
"""


@pytest.mark.slow
def test_of_two_nodes_the_first_decides_what_is_tried_and_writes_it(suite, tmp_path):
    """The second sees broken connections where the first sees a memory that does not suffice, and ends with it."""
    made = suite(system="lorafusion", gpus=2, capacity=256)
    first, second, *others = [plan.capacity for plan in plans_of(made)]
    ends = {"0": ["oom", "ok"], "1": ["crash", "crash"]}
    nodes = [
        subprocess.Popen(
            [sys.executable, "-c", TWO_NODES, node, made.path, made.cell.name, made.workload_path,
             tmp_path / "tuned.json", *ends[node]],
            env=os.environ | {"SLURM_NODEID": node}, text=True, stdout=subprocess.PIPE,
        )
        for node in ends
    ]  # fmt: skip
    lines = [node.communicate(timeout=60)[0].splitlines() for node in nodes]
    runs = [f"2 2 run-{number} {' '.join(map(str, left))}" for number, left in
            enumerate(([first, second, *others], [second, *others]))]  # fmt: skip
    assert lines[0] == [*runs, f"{first}: oom, {second}: 5 tok/s"]
    assert lines[1] == [*runs, "node 1: its processes have ended; the first node judges"]
    assert Tuned.read(tmp_path / "tuned.json").capacity == second
    assert not list(tmp_path.glob("*.reports-*"))


def test_a_file_that_is_no_tuning_says_so(tmp_path):
    identity = {"version": 3, "cell": "c", "workload_hash": "h", "config_hash": "c", "system": "s", "stages": 1,
                "data_parallel": 1}  # fmt: skip
    origin = {"suite": "s", "gpu_name": None, "git_sha": None, "git_dirty": None, "tree_hash": None}
    (tmp_path / "t.json").write_text(json.dumps(identity | origin | {"trials": [{}]}))
    with pytest.raises(UserError, match=r"t.json: trials.0.capacity: field required"):
        Tuned.read(tmp_path / "t.json")


def test_a_profile_of_a_cpu_is_refused(suite, tmp_path):
    made = suite()
    with pytest.raises(UserError, match="a suite for a CPU; only a GPU's kernels can be told apart"):
        profile_cell(made.path, made.cell.name, made.workload_path, tmp_path / "plan.json", tmp_path / "profile.csv")


@pytest.mark.parametrize(("system", "device"), [("lorafusion", "cuda"), ("lorafusion", "cpu"), ("mlora", "cuda")])
def test_a_cell_has_graphs_where_its_system_and_device_can(suite, system, device):
    """Its plan then has buckets, and is made by other settings; without graphs nothing is as it was not before."""
    plain = suite(system, device=device)
    eager = CellFiles(read_suite(plain.path), plain.cell)
    auto = suite(system, device=device, graphs="auto")
    files = CellFiles(read_suite(auto.path), auto.cell)
    can = (system, device) == ("lorafusion", "cuda")
    assert (files.graphs, eager.graphs) == (can, False)
    grids = [files.cell.grid.model_copy(update={"graphs": setting}) for setting in ("auto", "on")]
    specs = [spec_of(files.cell.model_copy(update={"grid": grid}), files.suite, auto.path) for grid in grids]
    assert [spec.needs_graphs for spec in specs] == [False, True]
    assert eager.graphs_note == ""
    reason = {"cpu": "the device is cpu, and", "cuda": "" if can else "system mlora has no graphs, its loop"}[device]
    assert files.graphs_note.startswith(f"; without graphs: {reason}" if reason else "")
    assert files.configuration != eager.configuration
    plan = plan_cell(auto.workload, files, 1024)
    assert bool(plan.buckets) == can
    path = auto.path.parent / "plan.json"
    path.write_text(plan.to_json())
    grid = files.cell.grid.model_copy(update={"tuned": False})
    untuned = CellFiles(files.suite, files.cell.model_copy(update={"grid": grid}))
    assert untuned.plan(path, None) == plan


def test_a_suite_has_cells_with_graphs_beside_cells_without(suite):
    """Of the same system, workload and settings: their names, plans and keys differ."""
    path = suite("lorafusion", device="cuda", graphs="auto").path
    data = yaml.safe_load(path.read_text())
    data["cells"][0]["systems"].append("lorafusion-eager")
    path.write_text(yaml.safe_dump(data))
    captured, eager = (CellFiles(read_suite(path), cell) for cell in cells(read_suite(path)))
    assert (captured.graphs, eager.graphs) == (True, False)
    assert captured.cell.workload_name == eager.cell.workload_name
    assert eager.cell.name == f"{captured.cell.name}-eager"
    assert captured.configuration != eager.configuration
    plans = [plan_cell(captured.expected_workload, files, 1024) for files in (captured, eager)]
    assert [bool(plan.buckets) for plan in plans] == [True, False]
    assert eager.graphs_note == "; without graphs: system lorafusion-eager has no graphs, it shows what they bring"


def test_graphs_of_a_system_without_are_refused(suite):
    with pytest.raises(
        UserError, match=r"cells.0.graphs: found on, expected auto or off: system mlora has no graphs, its"
    ):
        suite("mlora", device="cuda", graphs="on")
