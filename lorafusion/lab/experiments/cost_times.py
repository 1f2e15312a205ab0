"""The times of microbatches on the stages of a bench: the rows of the experiment `costs`.

A stage trains as a worker's does (`trainers`), alone: its neighbours' hidden states and gradients are there already. Of
each pass two things are measured. Its time is that between marks in the device's work, with more work waiting; it is
the GPU's own, or the host's where the GPU waits for it. The host's time is that until it has launched a pass for a GPU
that has nothing else to do. On a CPU the two are one.
"""

import gc
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch

from lorafusion.core.clock import Meter, free_memory
from lorafusion.core.config import read_model
from lorafusion.engine.pipeline import Expected, Pipeline
from lorafusion.engine.process import WorkerProcess, gathered
from lorafusion.lab.experiments.bench import Variant
from lorafusion.lab.experiments.costs_suite import CostsBench, CostsGrid, Part
from lorafusion.lab.experiments.experiment import Point
from lorafusion.lab.experiments.timing import canary_rows
from lorafusion.lab.experiments.trainers import Shared, Trainer
from lorafusion.lab.table.result import row
from lorafusion.launch.heartbeat import Position
from lorafusion.launch.launch import launch
from lorafusion.launch.spec import RunSpec

# Of a microbatch in turns on a GPU before it is timed: its power limit lowers the clock within a quarter of a second.
WARM_SECONDS = 0.4
TIMED = 2  # microbatches of a turn, after one that lets the host get ahead of the device
PASSES = ("forward", "backward")
MESSAGES = "lorafusion.lab.experiments.cost_times:time_messages"
ROUND_TRIPS, WARM_TRIPS = 10, 3  # of a message: in a round, and before any is timed


@dataclass(frozen=True)
class Size:
    """Microbatches that are measured: where, in which arm, of how many tokens and in samples of how many."""

    bench: str
    part: Part
    layers: int
    arm: Variant
    recompute: bool
    tokens: int
    sample_tokens: int

    @property
    def name(self) -> str:
        index, count = self.part.stage
        again = "all" if self.recompute else "none"
        return (f"bench~{self.bench}/layers~{self.layers}/stage~{index}-of-{count}/recompute~{again}"
                f"/implementation~{self.arm.implementation}/adapters~{self.arm.adapters}/tokens~{self.tokens}"
                f"/sample~{self.sample_tokens}")  # fmt: skip

    def row(
        self, metric: str, value: float | None, which: str | None = None, status: str = "ok", note: str = ""
    ) -> dict:
        """A number of it or of one of its passes, in columns of the table; `bench` tells the stage and how it
        computes."""
        index, count = self.part.stage
        samples = self.tokens // self.sample_tokens // max(1, self.arm.adapters)
        again = "-recomputed" if self.recompute else ""
        cell = {"cell": self.name, "bench": f"{self.bench}-layers-{self.layers}-stage-{index}-of-{count}{again}",
                "stages": count, "adapters": self.arm.adapters, "tokens": self.tokens, "samples": samples,
                "pass": which}  # fmt: skip
        return row(metric, value, "steady", cell, status=status, note=note[:200],
                   implementation=self.arm.implementation)  # fmt: skip


def bench_rows(point: Point) -> Iterator[list[dict]]:
    """The rows of each arm on each part of a bench, as it has been measured. What runs out of memory is a row that says
    so."""
    device = torch.device(point.settings.device)
    gc.freeze()  # as a worker does: collections that look at all modules would be in the host's times
    torch.manual_seed(point.settings.seed)  # PEFT's own dropout draws from torch's generator
    yield canary_rows(device, f"bench~{point.name}")
    if device.type == "cpu":
        cores = len(os.sched_getaffinity(0))
        yield [row("cores", cores, "steady", {"cell": f"bench~{point.name}/cores"})]
    with tempfile.TemporaryDirectory(prefix="lorafusion-") as folder:
        for part in point.subject.parts:
            shared = _shared(point, part, Position(Path(folder), 0))
            for grid in point.subject.grids:
                for arm in grid.arms:
                    yield _arm_rows(point, part, grid, arm, shared)
            del shared
            free_memory()


def _shared(point: Point, part: Part, position: Position) -> Shared:
    bench: CostsBench = point.subject
    arm = Variant(implementation="frozen", adapters=0)
    largest = bench.steps_bench(arm, bench.most_tokens, bench.most_tokens, stage=part.stage)
    return Shared.of(largest, point.settings, position, part.shortened(read_model(bench.model)))


def _arm_rows(point: Point, part: Part, grid: CostsGrid, arm: Variant, shared: Shared) -> list[dict]:
    """The rows of an arm, of its largest microbatches first: they find the memory that all need."""
    shared.stage.recompute(float(grid.recompute))
    layers, rows, trainer = len(shared.stage.model.layers), [], None
    for tokens, sample_tokens in sorted(grid.sizes, reverse=True):
        size = Size(point.name, part, layers, arm, grid.recompute, tokens, sample_tokens)
        try:
            trainer = Trainer(point.subject.steps_bench(arm, tokens, sample_tokens), arm, shared, like=trainer)
            rows += _rows(size, trainer, point.settings.rounds)
        except torch.OutOfMemoryError as error:
            note, trainer = str(error), None
            rows += [size.row("time", None, name, "oom", note) for name in PASSES]
            free_memory()
        print(size.name, *(f"{item['value']:.3g}" for item in rows[-2:] if item["value"]), flush=True)
    return rows


def _rows(size: Size, trainer: Trainer, rounds: int) -> list[dict]:
    """The numbers of a size."""
    meter = trainer.run.record.meter
    on_gpu = meter.device.type == "cuda"
    _warm_up(trainer, WARM_SECONDS if on_gpu else 0.0)
    passes, hosts = [], []
    for _ in range(rounds):
        hosts.append(_host_seconds(trainer))
        passes += _turn(trainer)
    trainer.require_steps()
    rows = [size.row("time", _median(passes, index), name) for index, name in enumerate(PASSES)]
    if size.arm.adapters:
        rows.append(size.row("step_time", _median(passes, len(PASSES))))
    if on_gpu:
        rows += [size.row("host_time", _median(hosts, index), name) for index, name in enumerate(PASSES)]
        rows.append(size.row("saved_memory", trainer.run.kept_by_forward(0)))
        trainer.finish()
    return rows


def _warm_up(trainer: Trainer, seconds: float) -> None:
    begin = time.perf_counter()
    trainer.train(1)
    trainer.finish()
    while time.perf_counter() - begin < seconds:
        trainer.train()
        trainer.finish()


def _turn(trainer: Trainer) -> list[tuple[float, ...]]:
    """Seconds of the forward and backward pass, and of the steps after them, of each timed microbatch of a turn."""
    meter, marks = trainer.run.record.meter, []
    trainer.microbatch(0)
    for _ in range(TIMED):
        of_one = [meter.mark()]
        trainer.microbatch(1, partial(_mark, of_one, meter.mark))
        marks.append([*of_one, meter.mark()])
    trainer.finish()
    return [tuple(meter.seconds(*pair) for pair in pairwise(of_one)) for of_one in marks]


def _mark(marks: list, mark: Callable) -> None:
    marks.append(mark())


def _host_seconds(trainer: Trainer) -> tuple[float, ...]:
    """Seconds until the host had launched the forward pass of a microbatch, and from there the backward pass."""
    trainer.finish()
    times = [time.perf_counter()]
    trainer.microbatch(0, partial(_mark, times, time.perf_counter))
    trainer.finish()
    return tuple(after - before for before, after in pairwise(times))


def _median(times: list[tuple[float, ...]], index: int) -> float:
    return statistics.median(of_one[index] for of_one in times)


def link_rows(point: Point) -> Iterator[list[dict]]:
    """The rows of messages between two processes, each on a device of its own."""
    entry = point.settings
    spec = RunSpec(system="lorafusion", model="tiny", workload="", task=MESSAGES, device=entry.device,
                   options={"sizes": entry.links, "rounds": ROUND_TRIPS * entry.rounds})  # fmt: skip
    outcome = launch(spec, 2, 60 * entry.minutes)
    status, note = outcome.status, outcome.note
    times = outcome.report["seconds"] if status == "ok" else [None] * len(entry.links)
    yield [
        row("transfer_time", value, "steady",
            {"cell": f"bench~{point.name}/bytes~{size}", "bench": f"{point.name}-{size}"},
            status=status, note=note[:200])
        for size, value in zip(entry.links, times, strict=True)
    ]  # fmt: skip


def time_messages(process: WorkerProcess) -> dict:
    """The task that times messages between two stages: half of what a message takes there and back, for each size."""
    pipeline = Pipeline(process.rank, 2, 1, process.device, torch.uint8, 1)
    meter, seconds = Meter(process.device), []
    pipeline.connect()
    for size in process.spec.options["sizes"]:
        times = []
        for _ in range(WARM_TRIPS + process.spec.options["rounds"]):
            pipeline.wait_for_everyone()
            meter.synchronize()
            begin = time.perf_counter()
            _there_and_back(pipeline, size)
            meter.synchronize()
            times.append((time.perf_counter() - begin) / 2)
        seconds.append(statistics.median(times[WARM_TRIPS:]))
    return {"seconds": gathered(seconds)[0]}


def _there_and_back(pipeline: Pipeline, size: int) -> None:
    expected = [Expected((size,), torch.uint8, "a message")]
    if pipeline.is_first:
        pipeline.send_after(torch.zeros(size, dtype=torch.uint8, device=pipeline.device))
        pipeline.from_after(iter(expected), nullcontext).next()
    else:
        pipeline.send_before(pipeline.from_before(iter(expected), nullcontext).next())
    pipeline.finish_sends()
