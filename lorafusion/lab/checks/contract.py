"""The contract of arms: what each system costs on a fixed small workload, recorded in a file that a test compares.

Nothing in it depends on the speed of a machine. Of each arm it says what it is made of, how it plans and is tuned, and
what it does before, while and after the clock runs: on a CPU operators by class with the bytes that they move, on a GPU
kernels by class. A change of it is a change of what is compared, and is reviewed as one.
"""

from __future__ import annotations

import difflib
import json
import re
import resource
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
import yaml

from lorafusion.core.clock import Meter, Point
from lorafusion.core.config import CONFIGS, SystemConfig, model_path, read_systems
from lorafusion.core.files import read_json, read_yaml, write
from lorafusion.core.plan import Plan
from lorafusion.core.plugins import load
from lorafusion.core.workload import Workload
from lorafusion.data.lengths import make_workload
from lorafusion.engine import worker
from lorafusion.engine.fork_server import FORKSERVER
from lorafusion.engine.timed import timed
from lorafusion.lab import cost, profiler
from lorafusion.lab.experiments.end_to_end import unavailable
from lorafusion.lab.operators import COMMUNICATION, Counting, Operation, by_class, product_dtypes
from lorafusion.lab.suite import cells, read_suite
from lorafusion.lab.tuning import tune_cell
from lorafusion.launch.heartbeat import WAITING, Position
from lorafusion.launch.launch import Outcome
from lorafusion.launch.spec import RunSpec
from lorafusion.planning import plan_system

ARRANGEMENTS = {"1 stage": (1, 1), "2 stages": (2, 1), "2 replicas": (1, 2)}
TUNED = {"models": ["tiny"], "gpus": [1], "workloads": ["xsum"], "samples": 16, "global_batch": 8,
         "length_scale": 64.0, "capacity": 256, "tuned": True, "minutes": 1}  # fmt: skip
LAYERS = 2  # the first has no gradient for its input, all others have
CLOCK = "while the clock runs"
START_UP = "start-up"
FEW_WAITS = 2  # in a run, which are the machine's; mostly there is none
PASS = re.compile(r"the (forward|backward|step|optimizer step)s? (?:of|after) microbatch (\d+)")


class Setting(NamedTuple):
    """What is trained to see what arms cost on a device: a model's first layers, and how long the samples are."""

    model: str
    scale: float
    capacity: int


SETTINGS = {"cpu": Setting("tiny", 32, 128), "cuda": Setting("llama-3.1-8b", 1, 8192)}


class Done(NamedTuple):
    """An operator that ran, and what the process was doing: a part of the run, and a pass."""

    part: str
    within: str
    operation: Operation


class _Place(Position):
    """What a process does, as its run says it; `done` has it all, and `order` the passes that the clock sees."""

    def __init__(self, folder: Path) -> None:
        self.part, self.within = START_UP, ""
        self.done: list[Done] = []
        self.order: list[str] = []
        self.waits: list[int] = []
        super().__init__(folder, 0)

    def set(self, doing: str) -> None:
        super().set(doing)
        found = PASS.fullmatch(doing)
        if found:
            self.within = found[1]
            if self.part == CLOCK:
                self.order.append(f"{found[1][0].upper()}{found[2]}")
        elif not doing.startswith(WAITING):
            self.part, self.within = doing, "between"

    def note(self, operation: Operation) -> None:
        self.done.append(Done(self.part, self.within, operation))

    def during(self, part: str) -> list[Done]:
        return [one for one in self.done if one.part == part]


class _Clock(Meter):
    """A meter that tells the place of a process when the clock starts, and how often it has waited till then."""

    def __init__(self, device: torch.device, place: _Place) -> None:
        super().__init__(device)
        self._place = place

    def point(self) -> Point:
        self._place.part, self._place.within = CLOCK, "between"
        # Whatever it waits for, the thread gives its core away then.
        self._place.waits.append(resource.getrusage(resource.RUSAGE_THREAD).ru_nvcsw)
        return super().point()


def contracts(names: list[str], device: str) -> dict[str, dict]:
    """What the systems of these names cost on a device, each in a process of its own."""
    with ProcessPoolExecutor(1 if device == "cuda" else 2, FORKSERVER, max_tasks_per_child=1) as processes:
        return dict(zip(names, processes.map(contract_of, names, [device] * len(names)), strict=True))


def contract_of(name: str, device: str) -> dict:
    """What a system costs on a device. To be called in a process of its own."""
    torch.set_num_threads(1)
    setting, entry = SETTINGS[device], worker.read_systems()[name]
    large, small = (make_workload(CONFIGS / "workloads" / "heterogeneous.yaml", samples=samples,
                                  global_batch=samples // 2, scale=setting.scale, seed=1)
                    for samples in (8, 2))  # fmt: skip
    plans = {said: plan_system(large, name, stages=stages, capacity=setting.capacity, data_parallel=replicas)
             for said, (stages, replicas) in ARRANGEMENTS.items() if _can(entry, stages, replicas)}  # fmt: skip
    plan = plan_system(small, name, stages=1, capacity=setting.capacity)
    with tempfile.TemporaryDirectory(prefix="lorafusion-") as scratch:
        spec = spec_of(name, small, plan, setting, device, Path(scratch))
        costs = on_gpu(spec) if device == "cuda" else on_cpu(spec)
        costs |= tuning_of(name, Path(scratch)) if device == "cpu" else {}
    made_of = entry.model_dump(mode="json", exclude={"description", "max_gpus", "max_stages", "requires", "ablation"})
    return {"made of": made_of, "plans": {said: summary(plan) for said, plan in plans.items()}} | costs


def _can(entry: SystemConfig, stages: int, replicas: int) -> bool:
    return stages * replicas <= (entry.max_gpus or 2) and stages <= (entry.max_stages or 2)


def spec_of(name: str, workload: Workload, plan: Plan, setting: Setting, device: str, folder: Path) -> RunSpec:
    """A run of a plan on the model's first layers in bfloat16; the files that it needs are written to a folder."""
    model = read_yaml(model_path(setting.model)) | {"num_hidden_layers": LAYERS}
    for file, text in (("model.yaml", yaml.safe_dump(model)), ("workload.json", workload.to_json()),
                       ("plan.json", plan.to_json())):  # fmt: skip
        (folder / file).write_text(text)
    return RunSpec(system=name, model=str(folder / "model.yaml"), workload=str(folder / "workload.json"),
                   plan=str(folder / "plan.json"), device=device, dtype="bfloat16",
                   adapter_dtype="bfloat16")  # fmt: skip


def summary(plan: Plan) -> dict:
    """What a plan has the stages compute, in which order."""
    microbatches = plan.microbatches
    return {
        "microbatches": len(microbatches),
        "no-ops": sum(one.noop for one in microbatches),
        "tokens": sum(one.tokens for one in microbatches),
        "tokens with padding": sum(one.length for one in microbatches),
        "lengths": " ".join(str(one.length) for one in microbatches),
        "adapters in them": " ".join(str(len(one.segments)) for one in microbatches),
        "steps": sum(len(one.step_after) for one in microbatches),
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

    def launch(spec: RunSpec, **_: object) -> Outcome:
        rates = [10.0, 11.0, *(9.0 for _ in spec.trials)][: len(spec.trials)]
        Path(spec.throughputs).write_text("".join(f"{rate}\n" for rate in rates))
        return Outcome("ok")

    tuned = tune_cell(folder / "suite.yaml", cell.name, folder / "tuned.json", folder / "out.json", launch)
    tried = [trial.capacity for trial in tuned.trials]
    return {"tuning": {"tried": " ".join(map(str, tried)), "chosen": tuned.capacity}}


def on_cpu(spec: RunSpec) -> dict:
    """The operators of a run, from its rehearsal to its end, and once more where all layers are recomputed."""
    place, again = run_and_watch(spec), run_and_watch(spec.model_copy(update={"checkpointing": 1.0}))
    measured = place.during(CLOCK)
    parts = [part for part in dict.fromkeys(one.part for one in place.done) if part not in (START_UP, CLOCK)]
    return {
        "stage": stage_of(spec),
        "order": " ".join(place.order),
        "waits of the host in a microbatch": waits_of(place),
        "matrix products": product_dtypes([one.operation for one in measured]),
        **{part: told(place.during(part)) for part in parts},
        CLOCK: {within: told([one for one in measured if one.within == within])
                for within in dict.fromkeys(one.within for one in measured)},
        "with all layers recomputed": told(again.during(CLOCK)),
    }  # fmt: skip


def waits_of(place: _Place) -> int:
    """How often the process waited in each microbatch while the clock ran, asleep or for others; messages left out."""
    messages = sum(one.operation.kind == COMMUNICATION for one in place.during(CLOCK))
    microbatches = sum(one.startswith("F") for one in place.order)
    begin, end = place.waits
    return -(-max(0, end - begin - messages - FEW_WAITS) // microbatches)


def run_and_watch(spec: RunSpec) -> _Place:
    """Run a spec in this process, and what it did."""
    with tempfile.TemporaryDirectory(prefix="lorafusion-") as scratch:
        place, device = _Place(Path(scratch)), torch.device("cpu")
        with Counting(place.note):
            worker.trained(spec, device, place, 0, 1, _Clock(device, place))
    return place


def told(done: list[Done]) -> dict[str, str]:
    """Operators by class, how many there are and what they move."""
    classes = by_class(one.operation for one in done)
    return {name: f"{part.operators}, {part.read:,} bytes read, {part.written:,} written"
            for name, part in classes.items()}  # fmt: skip


def stage_of(spec: RunSpec) -> dict:
    """What a run's stage is made of, and the bytes that the forward of the longest microbatch keeps for its backward
    pass beside the model's parameters."""
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with tempfile.TemporaryDirectory(prefix="lorafusion-") as scratch:
        workload, plan = Workload.read(spec.workload), Plan.read(spec.plan)
        run = worker.build_run(spec, workload, plan, torch.device("cpu"), Position(Path(scratch), 0), 0)
        slot = max(range(len(plan.microbatches)), key=lambda index: plan.microbatches[index].length)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            out = run.forward(slot, None)  # which holds what was kept
        for parameter in run.stage.parameters():
            kept.pop(parameter.untyped_storage().data_ptr(), None)
        del out
    return cost.structure(run) | {"bytes kept by a forward": sum(kept.values())}


def on_gpu(spec: RunSpec) -> dict:
    """The kernels of a run's plan while the clock runs, and where the host waited for the device."""
    device = torch.device("cuda", 0)
    with tempfile.TemporaryDirectory(prefix="lorafusion-") as scratch:
        position = Position(Path(scratch), 0)
        run = worker.build_run(spec, Workload.read(spec.workload), Plan.read(spec.plan), device, position, 0)
        execute = load(worker.read_systems()[spec.system].executor, "executor")
        timed(run, execute)
        made_of = cost.structure(run)
        run.adapters.clear()
        waits: list[str] = []
        cost.watched(run, execute, run.plan, lambda: _host_waits(waits))
        spans = cost.profiled(run, execute, run.plan)
    classes = Counter(profiler.class_of(span.name) for span in spans)
    return {
        "stage": made_of,
        "kernels": dict(sorted(classes.items())) | {"all": len(spans)},
        "launches": len({span.launch for span in spans}),
        "host waits": len(waits),
        "gpu": torch.cuda.get_device_name(device),
        "torch": torch.__version__,
    }


@contextmanager
def _host_waits(waits: list[str]) -> Iterator[None]:
    """Within it each operation for which the host waits for the device is written to a list."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")
    waits += [str(one.message) for one in said if "called a synchronizing" in str(one.message)]


def check_contracts(record: Path, device: str, replace: bool = False) -> str:
    """How what systems cost on a device differs from what is recorded, as lines for people; empty if it does not.
    replace: write it there. Systems that cannot run here are left as they are recorded."""
    every = read_systems()
    names = [name for name, entry in every.items() if not unavailable(entry)]
    recorded = read_record(record) if record.exists() or not replace else {}
    found = contracts(names, device)
    expected = {name: recorded[name] for name in recorded if name not in every or name in found}
    if replace:
        kept = {name: one for name, one in recorded.items() if name in every} | found
        write(record, text_of({name: kept[name] for name in every if name in kept}))
    return difference(expected, found)


def read_record(path: Path) -> dict[str, dict]:
    return read_json(path, "record of what systems cost")


def text_of(contracts: dict[str, dict]) -> str:
    return json.dumps(contracts, indent=1) + "\n"


def difference(recorded: dict[str, dict], found: dict[str, dict]) -> str:
    """For each arm that differs the lines that do."""
    lines = []
    for name in dict.fromkeys([*recorded, *found]):
        before, now = (json.dumps(one.get(name), indent=1).splitlines() for one in (recorded, found))
        if before != now:
            changes = difflib.unified_diff(before, now, "recorded", "found", n=1, lineterm="")
            lines += [f"{name}:", *(f"  {line}" for line in changes)]
    return "\n".join(lines)
