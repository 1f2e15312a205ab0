"""Check: what each system costs on a fixed small workload is what a file records.

Nothing in it depends on the speed of a machine. Of each system it says what it is made of, how it plans and is tuned,
and what it does before, while and after the clock runs: on a CPU operators by class with the bytes that they move, on a
GPU kernels by class. A change of it is a change of what is compared, and is reviewed as one.
"""

import difflib
import json
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
import yaml

from lorafusion.core.config import CONFIGS, model_path, read_systems
from lorafusion.core.files import read_json, read_yaml, write
from lorafusion.core.plan import Plan
from lorafusion.data.lengths import make_workload
from lorafusion.engine import build
from lorafusion.lab.checks.observed_run import kernels_of_run, operators_of_run
from lorafusion.lab.checks.toy_runs import write_spec
from lorafusion.lab.experiments.end_to_end import unavailable
from lorafusion.lab.forked import FORKSERVER
from lorafusion.lab.suite import cells, read_suite
from lorafusion.lab.tuning import TrialOptions, Tuned, tune_cell
from lorafusion.launch.outcome import Outcome
from lorafusion.launch.spec import RunSpec
from lorafusion.planning import plan_system

ARRANGEMENTS = {"1 stage": (1, 1), "2 stages": (2, 1), "2 replicas": (1, 2)}
TUNED = {"models": ["tiny"], "gpus": [1], "workloads": ["xsum"], "samples": 16, "global_batch": 8,
         "length_scale": 64.0, "capacity": 256, "tuned": True, "minutes": 1}  # fmt: skip
LAYERS = 2  # the first has no gradient for its input, all others have


class ContractSetting(NamedTuple):
    """What is trained to see what systems cost on a device: a model's first layers, and how long the samples are."""

    model: str
    scale: float
    capacity: int


SETTINGS = {"cpu": ContractSetting("tiny", 32, 128), "cuda": ContractSetting("llama-3.1-8b", 1, 8192)}


def contracts(names: list[str], device: str) -> dict[str, dict]:
    """What the systems of these names cost on a device, each in a process of its own."""
    with ProcessPoolExecutor(1 if device == "cuda" else 2, FORKSERVER, max_tasks_per_child=1) as processes:
        return dict(zip(names, processes.map(contract_of, names, [device] * len(names)), strict=True))


def contract_of(name: str, device: str) -> dict:
    """What a system costs on a device. To be called in a process of its own."""
    torch.set_num_threads(1)
    setting, entry = SETTINGS[device], build.read_system(name)
    large, small = (make_workload(CONFIGS / "workloads" / "heterogeneous.yaml", samples=samples,
                                  global_batch=samples // 2, scale=setting.scale, seed=1)
                    for samples in (8, 2))  # fmt: skip
    plans = {label: plan_system(large, name, stages=stages, capacity=setting.capacity, data_parallel=replicas)
             for label, (stages, replicas) in ARRANGEMENTS.items()
             if stages * replicas <= (entry.max_gpus or 2) and stages <= (entry.max_stages or 2)}  # fmt: skip
    plan = plan_system(small, name, stages=1, capacity=setting.capacity)
    with tempfile.TemporaryDirectory(prefix="lorafusion-") as scratch:
        model = read_yaml(model_path(setting.model)) | {"num_hidden_layers": LAYERS}
        spec = write_spec(Path(scratch), name, model, small, plan, device=device, dtype="bfloat16")
        costs = kernels_of_run(spec) if device == "cuda" else operators_of_run(spec)
        costs |= tuning_of(name, Path(scratch)) if device == "cpu" else {}
    made_of = entry.model_dump(mode="json", exclude={"description", "max_gpus", "max_stages", "requires", "ablation"})
    return {"made of": made_of, "plans": {label: summary(plan) for label, plan in plans.items()}} | costs


def summary(plan: Plan) -> dict:
    """What a plan has the stages compute, in which order."""
    microbatches = plan.microbatches
    return {
        "microbatches": len(microbatches),
        "no-ops": sum(item.noop for item in microbatches),
        "tokens": sum(item.tokens for item in microbatches),
        "tokens with padding": sum(item.length for item in microbatches),
        "lengths": " ".join(str(item.length) for item in microbatches),
        "adapters in them": " ".join(str(len(item.segments)) for item in microbatches),
        "steps": sum(len(item.step_after) for item in microbatches),
        "flushes": plan.flush,
    }


def tuning_of(name: str, folder: Path) -> dict:
    """Which capacities are tried for a cell of a system, and which is chosen where the second is the fastest."""
    suite = {"name": "contract", "description": "one cell", "device": "cpu", "dtype": "float32", "repeats": 1,
             "adapter_dtype": "float32", "cells": [TUNED | {"systems": [name]}]}  # fmt: skip
    (folder / "suite.yaml").write_text(yaml.safe_dump(suite))
    (cell,) = cells(read_suite(folder / "suite.yaml"))
    workload = make_workload(CONFIGS / "workloads" / f"{cell.workload}.yaml", samples=TUNED["samples"],
                             global_batch=TUNED["global_batch"], scale=TUNED["length_scale"], seed=1)  # fmt: skip
    (folder / "tuned.json").write_text(workload.to_json())

    def launch(spec: RunSpec, *_: object) -> Outcome:
        options = TrialOptions.of(spec)
        rates = [10.0, 11.0, *(9.0 for _ in options.trials)][: len(options.trials)]
        Path(options.throughputs).write_text("".join(f"{rate}\n" for rate in rates))
        return Outcome("ok")

    tune_cell(folder / "suite.yaml", cell.name, folder / "tuned.json", folder / "out.json", launch)
    tuned = Tuned.read(folder / "out.json")
    tried = [trial.capacity for trial in tuned.trials]
    return {"tuning": {"tried": " ".join(map(str, tried)), "chosen": tuned.capacity}}


def check_contracts(record: Path, device: str, replace: bool = False) -> str:
    """How what systems cost on a device differs from what is recorded, as lines for people; empty if it does not.
    replace: write it there. Systems that cannot run here are left as they are recorded."""
    systems = read_systems()
    names = [name for name, entry in systems.items() if not unavailable(entry)]
    recorded = read_json(record, "record of what systems cost") if record.exists() or not replace else {}
    measured = contracts(names, device)
    expected = {name: recorded[name] for name in recorded if name not in systems or name in measured}
    if replace:
        kept = {name: contract for name, contract in recorded.items() if name in systems} | measured
        write(record, json.dumps({name: kept[name] for name in systems if name in kept}, indent=1) + "\n")
    return difference(expected, measured)


def difference(recorded: dict[str, dict], measured: dict[str, dict]) -> str:
    """For each system that differs the lines that do."""
    lines = []
    for name in dict.fromkeys([*recorded, *measured]):
        before, now = (json.dumps(side.get(name), indent=1).splitlines() for side in (recorded, measured))
        if before != now:
            changes = difflib.unified_diff(before, now, "recorded", "found", n=1, lineterm="")
            lines += [f"{name}:", *(f"  {line}" for line in changes)]
    return "\n".join(lines)
