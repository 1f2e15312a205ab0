"""A system's name is a name: nothing that plans, runs or times decides by it."""

from __future__ import annotations

import ast
import re
from collections import Counter
from pathlib import Path

import pytest
import yaml

from lorafusion.core.config import CONFIGS, read_systems
from lorafusion.core.plan import Plan
from lorafusion.data.lengths import make_workload
from lorafusion.lab.experiments.end_to_end import unavailable
from lorafusion.lab.runner import Share, dealt, measured
from lorafusion.lab.steps import dag_of
from lorafusion.lab.table.result import result_of
from lorafusion.lab.tuning import Tried, Tuned
from lorafusion.launch.outcome import Outcome
from lorafusion.planning import plan_system
from tests.renamed import NEUTRAL, exchanged, named

SYSTEMS = read_systems()
ABLE = [name for name, system in SYSTEMS.items() if not unavailable(system)]
ROOT = Path(__file__).parent.parent
# Reports know systems by name: which is ours, what is compared with what, in which colour.
# Of the laboratory all but the checks, which compare with systems by name, and the reports.
PACKAGES = ("core", "data", "engine", "launch", "model", "planning")
FILES = (
    "cost",
    "keys",
    "operators",
    "profiler",
    "runner",
    "dag",
    "measured_steps",
    "suite",
    "trials",
    "tuned",
    "tuning",
)
MEASURED = [
    "baselines",
    "kernels/fused_lora",
    *(f"lorafusion/{name}" for name in PACKAGES),
    *(f"lorafusion/lab/{name}.py" for name in FILES),
    "lorafusion/lab/checks/contract.py",
    "lorafusion/lab/experiments/end_to_end.py",
    "lorafusion/lab/table",
]
# Constants that are no system's name, though they read like one: by file, how often they are there.
OTHER_WORDS = Counter({
    ("lorafusion/lab/suite.py", "lorafusion"): 1,  # the command
    ("lorafusion/data/store.py", "lorafusion"): 1,  # a key in the files of tokens
    ("lorafusion/core/config.py", "lorafusion"): 1,  # the package
    ("lorafusion/core/log.py", "lorafusion"): 1,  # the logger
    ("lorafusion/planning/simulator/gantt.py", "lorafusion"): 1,  # of the picture's metadata
    ("lorafusion/core/machine.py", "peft"): 2,  # the package
    ("lorafusion/core/source_tree.py", "lorafusion"): 1,  # the folder
    ("lorafusion/planning/__init__.py", "mlora"): 1,  # the strategy
})  # fmt: skip


def sources():
    for part in MEASURED:
        place = ROOT / part
        yield from [place] if place.is_file() else sorted(place.rglob("*.py"))


def name_constants(tree: ast.AST, names: set[str]) -> list[str]:
    """String constants, and literal parts of formatted strings, that are a system's name."""
    return [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and node.value in names]


def test_what_is_measured_names_no_system():
    found = Counter()
    for path in sources():
        for name in name_constants(ast.parse(path.read_text()), set(SYSTEMS)):
            found[str(path.relative_to(ROOT)), name] += 1
    assert found - OTHER_WORDS == Counter()


@pytest.mark.parametrize(
    "code",
    ["if plan.system == 'lorafusion': pass", "x = {'mlora': 2}.get(name, 1)", "name in ('peft', 'x')",
     "match name:\n  case 'peft-bf16': pass", "name.startswith('lorafusion')"],
)  # fmt: skip
def test_a_decision_by_a_name_is_seen(code):
    assert name_constants(ast.parse(code), set(SYSTEMS))


def test_words_that_are_no_names_are_few():
    every = Counter()
    for path in sources():
        for name in name_constants(ast.parse(path.read_text()), set(SYSTEMS)):
            every[str(path.relative_to(ROOT)), name] += 1
    assert OTHER_WORDS - every == Counter()


WORKLOAD = make_workload(CONFIGS / "workloads" / "heterogeneous.yaml", samples=8, global_batch=4, scale=32, seed=1)


def plan_of(name: str, stages: int) -> Plan:
    """Without its key, a hash of it with its system's name."""
    plan = plan_system(WORKLOAD, name, stages=stages, capacity=128)
    return plan.model_copy(update={"key": None})


@pytest.mark.parametrize("name", SYSTEMS)
def test_a_plan_does_not_depend_on_a_name(name):
    other = next(one for one in SYSTEMS if SYSTEMS[one].planner != SYSTEMS[name].planner)
    stages = 1 if SYSTEMS[name].max_gpus == 1 or SYSTEMS[name].max_stages == 1 else 2
    plan = plan_of(name, stages)
    for names, new in ((named({name: NEUTRAL}), NEUTRAL), (exchanged(name, other), other)):
        with names:
            assert plan_of(new, stages) == plan.model_copy(update={"system": new})


def report_of(plan: Plan) -> dict:
    slots = len(plan.slots())
    return {
        "seconds": [[slot, 0.5 * (slot + 1)] for slot in range(slots)],
        "clocks": [[0.5 * slots, 0.5 * slots]],
        "losses": {job.name: [1.0] * len(job.batches) for job in WORKLOAD.jobs},
        "steps": {job.name: len(job.batches) for job in WORKLOAD.jobs},
        "stopped": [],
        "peak_memory": 4096,
        "canary": {"canary-gemm": 1e-3},
        "finished": True,
        "cost": {"tokens": 500, "part": "all", "counts": {"operators": 900}},
    }


@pytest.mark.parametrize("name", SYSTEMS)
def test_equal_times_are_equal_metrics(name):
    """By the tokens of the workload and the times alone, which are known here."""
    plan = plan_of(name, 1)
    outcome, plans = Outcome("ok", report=report_of(plan)), [plan.model_copy(update={"system": new})
                                                             for new in (name, NEUTRAL, *ABLE)]  # fmt: skip
    results = [result_of(outcome, WORKLOAD, one, {"system": "the same"}, {}) for one in plans]
    assert all(result == results[0] for result in results)
    found = {(metric["metric"], metric["window"]): metric["value"] for metric in results[0]["metrics"]}
    whole = 0.5 * len(plan.microbatches)
    assert found["throughput", "whole"] == pytest.approx(sum(job.tokens for job in WORKLOAD.jobs) / whole)
    assert found["operators", "whole"] == pytest.approx(900 / 500 * 1000)


@pytest.mark.parametrize("name", [*SYSTEMS, NEUTRAL])
def test_the_fastest_capacity_is_chosen_for_every_system(name):
    trials = [Tried(capacity=capacity, throughput=rate) for capacity, rate in ((96, 10.0), (64, 12.0), (48, 11.0))]
    fields = {field: None for field in Tuned.model_fields} | {"version": 2, "trials": trials, "system": name}
    assert Tuned.model_construct(**fields).capacity == 64


@pytest.fixture
def suite(tmp_path):
    """Makes a suite of every system that can run here on two workloads, under these names."""

    def make(names: list[str], folder: str) -> Path:
        data = yaml.safe_load((CONFIGS / "suites" / "smoke.yaml").read_text())
        block = data["cells"][0] | {"samples": 4, "length_scale": 64, "gpus": [1], "capacity": 128, "systems": names}
        blocks = [block, block | {"tuned": True, "merged_qkv": True}]
        path = tmp_path / folder / "suite.yaml"
        path.parent.mkdir()
        path.write_text(yaml.safe_dump(data | {"name": "all", "repeats": 3, "cells": blocks}))
        return path

    return make


def taken(path: Path, count: int) -> list[list[str]]:
    """What each of so many shares of a suite does, in order."""
    dag = dag_of(path, path.parent)
    wanted = set(measured(dag.of_target("all")))
    steps = [step for step in dag.steps if step in wanted]
    return [[step.relative for step in dealt(steps, Share(index, count))] for index in range(count)]


@pytest.mark.parametrize("count", [1, 2])
def test_cells_are_dealt_out_whatever_their_systems_names(suite, count):
    own = taken(suite(ABLE, "own"), count)
    new = dict(zip(ABLE, [NEUTRAL, *ABLE[3:], ABLE[0], ABLE[1]], strict=True))
    with named(new):
        found = taken(suite([new[name] for name in ABLE], "other"), count)
    expected = [[re.sub("(?<=system~)[^./]+", lambda name: new[name[0]], step) for step in share] for share in own]
    assert found == expected


def test_systems_of_a_workload_run_on_one_gpu(suite):
    """Of a repeat; and on the other one in the next."""
    shares = taken(suite(ABLE, "own"), 2)
    homes: dict[tuple[str, str], set[int]] = {}
    for index, steps in enumerate(shares):
        for step in steps:
            kind, _, rest = step.partition("/")
            if kind == "runs":
                workload, _, repeat = re.fullmatch("(.*)/system~([^/]+)/(.*)", rest).groups()
                homes.setdefault((workload, repeat), set()).add(index)
    assert homes
    assert all(len(one) == 1 for one in homes.values())
    for workload in {workload for workload, _ in homes}:
        first, second, third = (homes[workload, f"repeat~{repeat}.json"] for repeat in (1, 2, 3))
        assert first == third != second
