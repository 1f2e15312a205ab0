"""A suite whose workflow is the real one, with processes that start in no time: checks hold, and workers train nothing.

What they report depends on the plan alone. `hook/sitecustomize.py` puts them into each process.
Usage: python -m tests.torture.toy_workflow SPEC.json REPORT_DIRECTORY, alone or under torchrun.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import yaml

from tests.planted.plant import Planted, _Finder

HOOK = Path(__file__).parent / "hook"
SUITE = "swept"
SECONDS = 1.5  # a run


def write_suite(path: Path, processes: list[int]) -> None:
    from lorafusion.core.config import CONFIGS

    data = yaml.safe_load((CONFIGS / "suites" / "smoke.yaml").read_text())
    systems = {"workloads": ["xsum"], "systems": ["lorafusion", "mlora"], "gpus": processes}
    block = data["cells"][0] | systems | {"samples": 8, "length_scale": 64, "capacity": 128}
    path.write_text(yaml.safe_dump(data | {"name": SUITE, "repeats": 2, "cells": [block]}))


def install() -> None:
    """Have the symbols replaced as soon as their modules are imported."""
    for symbol, replace in (
        ("lorafusion.launch.launch:worker_command", toy_worker),
        ("lorafusion.lab.measured_steps:run_check", lambda _: toy_check),
        ("lorafusion.lab.steps:draw", lambda _: toy_draw),
        ("lorafusion.lab.steps:_publish", lambda _: toy_publish),
    ):
        sys.meta_path.insert(0, _Finder(Planted("toy", "", symbol, (), replace)))


def toy_worker(command):
    return lambda *arguments: [*command(*arguments)[:-1], __name__]


def toy_check(name: str, suite: Path):
    from tests.lab.toy_suite import verdict_of

    return verdict_of(name, suite, passed=True)


def toy_draw(name: str, files: list[Path], stem: Path, *_) -> None:
    from lorafusion.lab.report.registry import FORMATS

    for form in FORMATS:
        stem.with_name(f"{stem.name}.{form}").write_text("a figure")


def toy_publish(step, launch) -> str:
    step.path.mkdir(parents=True)
    return "nothing"


def report_of(workload, plan) -> dict:
    """What a run reports that took a second a slot."""
    slots = len(plan.slots())
    batches = {job.name: len(job.batches) for job in workload.jobs}
    return {
        "losses": {name: [1.0 / (1 + batch) for batch in range(count)] for name, count in batches.items()},
        "steps": batches,
        "stopped": [],
        "seconds": [[slot, 1.0 + slot] for slot in range(slots)],
        "clocks": [[1.0 + slots, 1.0 + slots]] * (plan.stages * plan.data_parallel),
        "peak_memory": 1000,
        "canary": {},
    }


def main(spec_path: str, reports: str) -> None:
    from lorafusion.core.files import write
    from lorafusion.core.plan import Plan
    from lorafusion.core.workload import Workload
    from lorafusion.launch.heartbeat import ENDED, Position
    from lorafusion.launch.launch import end_with_launcher
    from lorafusion.launch.lock import join
    from lorafusion.launch.spec import RunSpec

    end_with_launcher()
    spec = RunSpec.model_validate(json.loads(Path(spec_path).read_text()))
    join(spec.lock)
    position = Position(Path(reports), int(os.environ.get("RANK", 0)))
    position.set("training")
    time.sleep(SECONDS)
    if os.environ.get("RANK", "0") == "0":
        report = report_of(Workload.read(spec.workload), Plan.read(spec.plan))
        write(Path(reports) / "report.json", json.dumps(report))
    position.set(ENDED)


if __name__ == "__main__":
    main(*sys.argv[1:])
