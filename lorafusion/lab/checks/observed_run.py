"""A run that is watched: which operators it runs on a CPU, or kernels on a GPU, in which part of it.

Nothing in it depends on the speed of a machine.
"""

import re
import resource
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch

from lorafusion.core.clock import Mark, Meter, TimePoint
from lorafusion.core.plan import Plan
from lorafusion.core.workload import Workload
from lorafusion.engine.build import build_run, executor_of
from lorafusion.engine.process import WorkerProcess
from lorafusion.engine.task import train
from lorafusion.engine.timed import timed
from lorafusion.lab import cost, profiler
from lorafusion.lab.operators import COMMUNICATION, Counting, Operation, by_class, product_dtypes, saved_bytes
from lorafusion.launch.heartbeat import WAITING, Position
from lorafusion.launch.spec import RunSpec

CLOCK = "while the clock runs"
START_UP = "start-up"
FEW_WAITS = 2  # in a run, which are the machine's; mostly there is none
PASS = re.compile(r"the (forward|backward|step|optimizer step)s? (?:of|after) microbatch (\d+)")


class PlacedOperation(NamedTuple):
    """An operator that ran, and what the process was doing: a part of the run, and a pass."""

    part: str
    within: str
    operation: Operation


class Observer(Position):
    """What a process does, as its run says it: `operations` has it all, `order` the passes that the clock sees."""

    def __init__(self, folder: Path) -> None:
        self.part, self.within = START_UP, ""
        self.operations: list[PlacedOperation] = []
        self.order: list[str] = []
        self.waits: list[int] = []
        super().__init__(folder, 0)

    def set(self, doing: str) -> None:
        super().set(doing)
        match = PASS.fullmatch(doing)
        if match:
            self.within = match[1]
            if self.part == CLOCK:
                self.order.append(f"{match[1][0].upper()}{match[2]}")
        elif not doing.startswith(WAITING):
            self.part, self.within = doing, "between"

    def note(self, operation: Operation) -> None:
        self.operations.append(PlacedOperation(self.part, self.within, operation))

    def during(self, part: str) -> list[PlacedOperation]:
        return [item for item in self.operations if item.part == part]


class _Clock(Meter):
    """A meter that tells the observer when the clock starts, and how often the process has waited till then."""

    def __init__(self, device: torch.device, observer: Observer) -> None:
        super().__init__(device)
        self._observer = observer

    def point(self) -> TimePoint:
        self._observer.part, self._observer.within = CLOCK, "between"
        # Whatever it waits for, the thread gives its core away then.
        self._observer.waits.append(resource.getrusage(resource.RUSAGE_THREAD).ru_nvcsw)
        return super().point()

    def seconds(self, begin: Mark, end: Mark) -> float:
        """The same for all: how long a message with times is depends on their digits."""
        return 1.0


def operators_of_run(spec: RunSpec) -> dict:
    """The operators of a run, from its warm-up to its end, and once more where all layers are recomputed."""
    run, again = run_and_watch(spec), run_and_watch(spec.model_copy(update={"checkpointing": 1.0}))
    measured = run.during(CLOCK)
    parts = [part for part in dict.fromkeys(item.part for item in run.operations) if part not in (START_UP, CLOCK)]
    return {
        "stage": stage_of(spec),
        "order": " ".join(run.order),
        "waits of the host in a microbatch": waits_of(run),
        "matrix products": product_dtypes([item.operation for item in measured]),
        **{part: totals(run.during(part)) for part in parts},
        CLOCK: {within: totals([item for item in measured if item.within == within])
                for within in dict.fromkeys(item.within for item in measured)},
        "with all layers recomputed": totals(again.during(CLOCK)),
    }  # fmt: skip


def waits_of(observer: Observer) -> int:
    """How often the process waited in each microbatch while the clock ran, asleep or for others; messages left out."""
    messages = sum(item.operation.kind == COMMUNICATION for item in observer.during(CLOCK))
    microbatches = sum(step.startswith("F") for step in observer.order)
    begin, end = observer.waits
    return -(-max(0, end - begin - messages - FEW_WAITS) // microbatches)


def run_and_watch(spec: RunSpec) -> Observer:
    """Run a spec in this process, and what it did."""
    with tempfile.TemporaryDirectory(prefix="lorafusion-") as scratch:
        observer, device = Observer(Path(scratch)), torch.device("cpu")
        with Counting(observer.note):
            train(WorkerProcess(spec, device, observer, meter=_Clock(device, observer)))
    return observer


def totals(operations: list[PlacedOperation]) -> dict[str, str]:
    """Operators by class, how many there are and what they move."""
    classes = by_class(item.operation for item in operations)
    return {name: f"{part.operators}, {part.read:,} bytes read, {part.written:,} written"
            for name, part in classes.items()}  # fmt: skip


def stage_of(spec: RunSpec) -> dict:
    """What a run's stage is made of, and the bytes that the forward of the longest microbatch keeps for its backward
    pass beside the model's parameters."""
    with tempfile.TemporaryDirectory(prefix="lorafusion-") as scratch:
        workload, plan = Workload.read(spec.workload), Plan.read(spec.plan)
        run = build_run(WorkerProcess(spec, torch.device("cpu"), Position(Path(scratch), 0)), workload, plan)
        slot = max(range(len(plan.microbatches)), key=lambda index: plan.microbatches[index].length)
        parameters = {parameter.untyped_storage().data_ptr() for parameter in run.stage.parameters()}
        kept = saved_bytes(lambda: run.forward(slot, None), parameters)
    return cost.structure(run) | {"bytes kept by a forward": kept}


def kernels_of_run(spec: RunSpec) -> dict:
    """The kernels of a run's plan while the clock runs, and where the host waited for the device."""
    device = torch.device("cuda", 0)
    with tempfile.TemporaryDirectory(prefix="lorafusion-") as scratch:
        position = Position(Path(scratch), 0)
        run = build_run(WorkerProcess(spec, device, position), Workload.read(spec.workload), Plan.read(spec.plan))
        execute = executor_of(spec.system)
        timed(run, execute)
        made_of = cost.structure(run)
        run.adapters.clear()
        waits: list[str] = []
        cost.watched(cost.repeated(run, run.plan), execute, _host_waits(waits))
        spans = cost.profiled(cost.repeated(run, run.plan), execute)
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
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")
    waits += [text for text in (str(warning.message) for warning in caught) if "called a synchronizing" in text]
