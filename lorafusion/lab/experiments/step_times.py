"""Whole training steps of all arms of a bench, timed in turns: the rows of the experiment `steps`.

What is timed is a turn: microbatches in a row, each with its forward and backward pass and the step of every adapter,
for which the host waits no more than in a real run.
"""

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import pandas as pd
import torch

from lorafusion.core.clock import free_memory
from lorafusion.core.files import write
from lorafusion.core.machine import provenance
from lorafusion.core.seals import seal
from lorafusion.lab import profiler
from lorafusion.lab.experiments.bench import Variant
from lorafusion.lab.experiments.experiment import Point
from lorafusion.lab.experiments.steps_suite import StepsBench
from lorafusion.lab.experiments.timing import canary_rows, median_ratio, shuffled_rounds
from lorafusion.lab.experiments.trainers import Shared, Trainer, allocated
from lorafusion.lab.table.result import row
from lorafusion.launch.heartbeat import Position
from lorafusion.launch.outcome import FaultyRunError

WARM_UPS = 3  # microbatches of each arm before any is timed
# Of all arms in turns on a GPU, as in `timing`: its power limit lowers the clock only after a while.
WARM_SECONDS = 2.0
PROFILED = 2  # microbatches
PROFILE_COLUMNS = ("suite", "bench", "implementation", "adapters", "class", "milliseconds", "kernels", "share",
                   "gpu_name", "git_sha")  # fmt: skip


@dataclass
class Arms:
    """The arms of a bench that train, and why the others do not: a status and a note."""

    trainers: dict[Variant, Trainer] = field(default_factory=dict)
    lost: dict[Variant, tuple[str, str]] = field(default_factory=dict)

    def attempt(self, arm: Variant, work: Callable[[], float]) -> float | None:
        """The result of some work of an arm; None where the memory does not suffice, after which the arm is lost."""
        try:
            return work()
        except torch.OutOfMemoryError as error:
            note = str(error)
        self.lose(arm, "oom", note)
        return None

    def lose(self, arm: Variant, status: str, note: str) -> None:
        self.lost[arm] = status, note
        self.trainers.pop(arm, None)
        free_memory()

    def seconds(self, arm: Variant) -> float | None:
        """As its trainer's; None where it is lost."""
        return self.attempt(arm, self.trainers[arm].seconds) if arm in self.trainers else None


def bench_rows(point: Point, repeat: int, profile: Path) -> Iterator[list[dict]]:
    """The rows about times and memory, and then, on a GPU, those about how busy it is; what a microbatch's time goes
    into is written to `profile`, as CSV. An implementation that runs out of memory is rows that say so."""
    device = torch.device(point.settings.device)
    rows = canary_rows(device, f"bench~{point.name}")
    with tempfile.TemporaryDirectory(prefix="lorafusion-") as folder:
        arms, measured = measure(point, repeat, Position(Path(folder), 0))
        yield rows + measured
        if device.type == "cuda":
            rows, shares = profiled(point, arms)
            write(profile, pd.DataFrame(shares, columns=PROFILE_COLUMNS).to_csv(index=False, lineterminator="\n"))
            seal(profile)
            yield rows


def measure(point: Point, repeat: int, position: Position) -> tuple[Arms, list[dict]]:
    """All arms, and the rows about their memory and their speed."""
    bench, suite = point.subject, point.settings
    torch.manual_seed(suite.seed)  # PEFT's own dropout draws from torch's generator
    shared, arms, rows = Shared.of(bench, suite, position), Arms(), []
    for arm in bench.arms:
        peak = arms.attempt(arm, partial(_first_turn, bench, shared, arms, arm))
        if peak is None or shared.pipeline.device.type == "cuda":
            rows.append(_row(point, arm, "peak_memory", peak, arms))
        size = "out of memory" if peak is None else f"{peak / 2**30:.2f} GiB"
        print(f"{point.name}: {arm.name}: {size}", flush=True)
    times = seconds(bench, arms, shared.pipeline.device, suite.rounds, repeat)
    for arm, trainer in list(arms.trainers.items()):
        try:
            trainer.require_sound()
        except FaultyRunError as fault:
            arms.lose(arm, fault.status, str(fault))
    return arms, rows + speed_rows(point, arms, times)


def _first_turn(bench: StepsBench, shared: Shared, arms: Arms, arm: Variant) -> float:
    """Build an arm and let it train a turn, in which it comes to hold all that it ever does. Returns the bytes of its
    peak, of which what the arms before it hold is no part: their adapters and moments, whose bytes are counted exactly.
    What libraries keep for themselves is in the peak of the first that needs it."""
    free_memory()
    others = allocated(shared.pipeline.device) - shared.allocated
    trainer = arms.trainers[arm] = Trainer(bench, arm, shared)
    meter = trainer.run.record.meter
    meter.reset_peak_memory()
    trainer.train()
    trainer.finish()
    return meter.peak_memory() - others


def seconds(bench: StepsBench, arms: Arms, device: torch.device, rounds: int, seed: int) -> dict[Variant, list[float]]:
    """The time of a microbatch of each arm in each of the rounds, whose order is shuffled. An arm that runs out of
    memory on the way is lost. Compare arms by the ratios of each round, as those of `timing.seconds`."""
    begin, microbatches = time.perf_counter(), 0
    least = WARM_SECONDS if device.type == "cuda" else 0.0
    while arms.trainers and (microbatches < WARM_UPS or time.perf_counter() - begin < least):
        for arm in list(arms.trainers):
            arms.seconds(arm)
        microbatches += bench.microbatches
    times: dict[Variant, list[float | None]] = {arm: [] for arm in arms.trainers}
    for index, order in enumerate(shuffled_rounds(list(times), rounds, seed), 1):
        for arm in order:
            times[arm].append(arms.seconds(arm))
        print(f"round {index} of {rounds}", flush=True)
    return {arm: times[arm] for arm in arms.trainers}


def speed_rows(point: Point, arms: Arms, times: dict[Variant, list[float]]) -> list[dict]:
    """The rows about the arms' times, and those without a value of the arms that were lost."""
    rows, times = [], {arm: times[arm] for arm in arms.trainers}
    by_implementation = {arm.implementation: samples for arm, samples in times.items()}
    frozen, peft = by_implementation.get("frozen"), by_implementation.get("peft-bf16")
    for arm, samples in times.items():
        median = statistics.median(samples)
        values = {"time": median, "throughput": point.subject.tokens / median}
        if arm.adapters and frozen:
            values["overhead"] = median_ratio(samples, frozen) - 1
        if arm.adapters and peft and arm.implementation != "peft-bf16":
            values["speedup"] = median_ratio(peft, samples)
        rows += [_row(point, arm, metric, value, arms) for metric, value in values.items()]
    for arm in arms.lost:
        metrics = ("time", "throughput", *(("overhead", "speedup") if arm.adapters else ()))
        rows += [_row(point, arm, metric, None, arms) for metric in metrics]
    return rows


def profiled(point: Point, arms: Arms) -> tuple[list[dict], list[dict]]:
    """How busy the GPU is with each arm, as rows, and what it does meanwhile, as those of `profiler`."""
    origin = provenance("cuda")
    identity = {"suite": point.suite, "bench": point.name} | {key: origin[key] for key in ("gpu_name", "git_sha")}
    rows, shares = [_row(point, arm, "busy", None, arms) for arm in arms.lost], []
    for arm, trainer in arms.trainers.items():
        spans = profiler.trace(partial(trainer.train, PROFILED))
        trainer.finish()
        if not spans:
            print(f"{point.name}: {arm.name}: the profiler saw no kernels", flush=True)
            continue
        parts = profiler.breakdown(spans, PROFILED)
        busy = profiler.busy_share(parts)
        rows.append(_row(point, arm, "busy", busy, arms))
        shares += profiler.csv_rows(parts, **identity, **arm.model_dump())
        print(f"{point.name}: {arm.name}: {busy:.1%} busy", *profiler.unknown_kernels(spans), sep="\n", flush=True)
    return rows, shares


def _row(point: Point, arm: Variant, metric: str, value: float | None, arms: Arms) -> dict:
    """A number of an arm; or without a value, and why, of a lost one that should have had it."""
    bench, (index, count) = point.subject, point.subject.stage
    cell = {
        "cell": f"bench~{point.name}/implementation~{arm.implementation}/adapters~{arm.adapters}",
        "tokens": bench.tokens,
        "adapters": arm.adapters,
    }
    window = "whole" if metric == "peak_memory" else "steady"
    notes = [f"stage {index} of {count}"] if count > 1 else []
    notes += [f"{bench.checkpointing:.0%} of the layers recomputed"] if bench.checkpointing else []
    status, note = ("ok", ", ".join(notes)) if value is not None else arms.lost[arm]
    return row(metric, value, window, cell, status=status, implementation=arm.implementation, note=note[:200])
