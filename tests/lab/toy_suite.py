"""A small suite whose steps are made without training, and its fixtures."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import yaml

from lorafusion.core.config import CONFIGS
from lorafusion.lab import tuning
from lorafusion.lab.checks.catalog import needed_by
from lorafusion.lab.checks.verdicts import CheckOutcome, Curve, Verdict, origin_of
from lorafusion.lab.dag import Step, state
from lorafusion.lab.experiments import experiment
from lorafusion.lab.runner import Share, dealt, measured, run_steps
from lorafusion.lab.steps import dag_of
from lorafusion.lab.suite import read_suite
from lorafusion.lab.tuned import TRY_CAPACITIES, TrialOptions
from lorafusion.launch.outcome import Outcome

CHECKS = needed_by("runs")
ALL = Share()


def small_suite(path: Path) -> Path:
    """Two workloads, one cell tuned, one that cannot run, twice."""
    data = yaml.safe_load((CONFIGS / "suites" / "smoke.yaml").read_text())
    block = data["cells"][0] | {"samples": 8, "length_scale": 64, "gpus": [1], "capacity": 128}
    blocks = [
        block | {"systems": ["peft-bf16", "unsloth"]},
        block | {"systems": ["mlora"], "workloads": ["xsum"], "tuned": True},
    ]
    path.write_text(yaml.safe_dump(data | {"name": "swept", "repeats": 2, "cells": blocks}))
    return path


@pytest.fixture(scope="module")
def checked():
    """Checks hold at once: what is checked is not the runner's."""
    with pytest.MonkeyPatch.context() as patches:
        patches.setattr("lorafusion.lab.measured_steps.run_check", partial(verdict_of, passed=True))
        yield patches


def verdict_of(name: str, suite: Path, passed: bool) -> CheckOutcome:
    verdict = Verdict(check=name, passed=passed, statement="it holds" if passed else "it does not", figures={})
    curves = [Curve("a", "alone", [1.0])] if name == "lossless" else []
    return CheckOutcome(verdict, origin_of("swept", "cpu", read_suite(suite).dtype), curves)


@pytest.fixture
def suite(tmp_path) -> Path:
    return small_suite(tmp_path / "suite.yaml")


def steps_of(suite: Path, folder: Path, share: Share = ALL) -> list[Step]:
    """What `lorafusion lab run --here` does of the suite in a share."""
    dag = dag_of(suite, folder)
    wanted = set(measured(dag.of_target("all")))
    return dealt([step for step in dag.steps if step in wanted], share)


def run(suite: Path, folder: Path, share: Share, launch, seconds: float) -> int:
    return run_steps(steps_of(suite, folder, share), launch, seconds, share.count)


def reasons(suite: Path, folder: Path) -> list[str]:
    return [state(step) for step in steps_of(suite, folder)]


def instant(spec, processes, timeout, nodes=1, reports=None, log=None) -> Outcome:
    """A launcher of runs that come to nothing at once; capacities are the faster, the smaller they are."""
    print("launched", file=log)
    if spec.task == TRY_CAPACITIES:
        options = TrialOptions.of(spec)
        Path(options.throughputs).write_text("".join(f"{1e6 / trial.capacity}\n" for trial in options.trials))
        return Outcome("ok")
    return Outcome("crash", "nothing is run here")


@pytest.fixture
def origin(monkeypatch):
    """Where numbers come from is not asked again for each."""

    same = experiment.provenance("cpu")
    for module in (experiment, tuning):
        monkeypatch.setattr(module, "provenance", lambda device: dict(same))


def files(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
