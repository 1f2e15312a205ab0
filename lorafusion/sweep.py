"""A suite's cells without Snakemake: tuned, planned, run and profiled one after another, in forked processes.

For a machine that is rented by the minute, where starting a run takes longer than the run. It leaves the files that the
workflow would, in the same places and by the same functions: `lorafusion measurements` and `lorafusion figure` go on
from them. What is there already is not done again.

Several of it share the work on a machine with several GPUs. Tunings and profiles are dealt out one by one. Of a repeat
a share runs whole workloads, so that systems are compared on one GPU, and the next one in the next repeat.
"""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import NamedTuple

from lorafusion.cells import run_cell, unavailable
from lorafusion.config import CONFIGS, Cell, Suite, cells, read_suite, read_systems
from lorafusion.data.lengths import make_workload
from lorafusion.errors import UserError
from lorafusion.files import write
from lorafusion.runtime.launch import Outcome
from lorafusion.tuning import Tuned, plan_cell, profile_cell, tune_cell
from lorafusion.workload import Workload

LOOK_SECONDS = 1.0
START = 80_000  # tokens that are trained while a run starts, about, as an H200 trains Llama-3.1-8B


class Share(NamedTuple):
    """Which of `count` sweeps of a suite this is."""

    index: int = 0
    count: int = 1

    @classmethod
    def read(cls, text: str) -> Share:
        parts = text.split("/")
        if len(parts) != 2 or not all(part.isdecimal() for part in parts) or int(parts[0]) >= int(parts[1]):
            raise UserError(f"--share: expected I/N with I from 0 to N - 1, found {text!r}")
        return cls(int(parts[0]), int(parts[1]))


def shuffled(names: list[str], repeat: int) -> list[str]:
    """Cells in the order of one of the repeats: the same wherever it is asked for, another for each repeat."""
    order = sorted(names)
    random.Random(repeat).shuffle(order)
    return order


def spread(costs: dict[str, int], shares: int) -> dict[str, int]:
    """To which share each of some things goes, so that all have about as much: the costly ones first, each to the share
    that has least."""
    loads, homes = [0] * shares, {}
    for name in sorted(costs, key=lambda one: (-costs[one], one)):
        homes[name] = loads.index(min(loads))
        loads[homes[name]] += costs[name]
    return homes


class Step(NamedTuple):
    """A file to be made, and what makes it, once there is another file, which may be another share's to make."""

    path: Path
    make: Callable[[], str]
    after: Path | None = None

    @property
    def is_ready(self) -> bool:
        return self.after is None or self.after.exists()


@dataclass(frozen=True)
class Sweep:
    """A suite's cells, and the folder of its results. launch: as `lorafusion.runtime.launch.launch`."""

    suite_path: Path
    folder: Path
    share: Share
    launch: Callable[..., Outcome]

    @cached_property
    def suite(self) -> Suite:
        return read_suite(self.suite_path)

    @cached_property
    def cells(self) -> dict[str, Cell]:
        return {cell.name: cell for cell in cells(self.suite, self.suite_path)}

    @property
    def longest_wait(self) -> float:
        """Seconds after which a tuning that another share has begun is at its end, whatever became of it."""
        return 60.0 * max(cell.grid.minutes for cell in self.cells.values())

    def steps(self) -> Iterator[Step]:
        """What this share of the sweep does, in order: all tunings, then the profiles, then repeat after repeat."""
        suite, systems, every = self.suite, read_systems(), self.cells
        able = [cell for cell in every.values() if not unavailable(systems[cell.system])]
        first = {cell.workload_name: cell for cell in every.values()}
        tokens = {name: Workload.read(self._workload(cell)).tokens for name, cell in first.items()}
        costs = Counter()
        for cell in able:
            costs[cell.workload_name] += tokens[cell.workload_name] + START
        homes = spread(costs, self.share.count)
        for cell in self._dealt([one for one in able if one.grid.tuned]):
            yield Step(self.path("tuned", cell, "json"), partial(self._tune, cell))
        for cell in self._dealt([one for one in able if one.workload in suite.profiled and suite.device == "cuda"]):
            yield Step(self.path("profiles", cell, "csv"), partial(self._profile, cell), self._tuning(cell))
        for repeat in range(1, suite.repeats + 1):
            for name in shuffled(list(every), repeat):
                cell = every[name]
                if (homes.get(cell.workload_name, 0) + repeat) % self.share.count == self.share.index:
                    path = self.folder / "runs" / name / f"repeat~{repeat}.json"
                    after = self._tuning(cell) if cell in able else None
                    yield Step(path, partial(self._run, cell, repeat, path), after)

    def _dealt(self, some: list[Cell]) -> list[Cell]:
        """Those of some cells that are this share's: costly ones lie together, and no share has them all."""
        return some[self.share.index :: self.share.count]

    def _tuning(self, cell: Cell) -> Path | None:
        """The file that says with which capacity a cell is planned, if it is tuned."""
        return self.path("tuned", cell, "json") if cell.grid.tuned else None

    def path(self, kind: str, cell: Cell, suffix: str) -> Path:
        return self.folder / kind / f"{cell.name}.{suffix}"

    def _workload(self, cell: Cell) -> Path:
        path = self.folder / "workloads" / f"{cell.workload_name}.json"
        if not path.exists():
            grid = cell.grid
            made = make_workload(CONFIGS / "workloads" / f"{cell.workload}.yaml", samples=grid.samples,
                                 global_batch=grid.global_batch, scale=grid.length_scale, seed=self.suite.seed,
                                 merged_qkv=grid.merged_qkv)  # fmt: skip
            write(path, made.to_json())
        return path

    def _plan(self, cell: Cell) -> Path:
        path = self.path("plans", cell, "json")
        if not path.exists():
            tuning = self._tuning(cell)
            capacity = Tuned.read(tuning).capacity if tuning else cell.grid.capacity_of(cell.workload)
            write(path, plan_cell(Workload.read(self._workload(cell)), cell, capacity).to_json())
        return path

    def _tune(self, cell: Cell) -> str:
        out = self.path("tuned", cell, "json")
        tuned = tune_cell(self.suite_path, cell.name, self._workload(cell), out, launch=self.launch)
        return ", ".join(map(str, tuned.trials))

    def _profile(self, cell: Cell) -> str:
        rows = profile_cell(self.suite_path, cell.name, self._workload(cell), self._plan(cell),
                            self.path("profiles", cell, "csv"), launch=self.launch)  # fmt: skip
        return f"{len(rows)} classes of kernels"

    def _run(self, cell: Cell, repeat: int, out: Path) -> str:
        workload, plan = self._workload(cell), None
        if not unavailable(read_systems()[cell.system]):
            plan = self._plan(cell)
        return run_cell(self.suite_path, cell.name, workload, plan, out, repeat, 1, None, launch=self.launch)


def sweep(suite_path: Path, folder: Path, share: Share, launch: Callable[..., Outcome], seconds: float) -> int:
    """Do what is missing of a suite, beginning nothing after `seconds`; returns how much was left."""
    begin, given_up = time.monotonic(), 0
    whole = Sweep(suite_path, folder, share, launch)
    missing = [step for step in whole.steps() if not step.path.exists()]
    wait = whole.longest_wait if share.count > 1 else 0.0
    while missing and time.monotonic() - begin <= seconds:
        step = _first_ready(missing, min(time.monotonic() + wait, begin + seconds))
        if step is None:
            break
        missing.remove(step)
        if step.path.exists():  # by another sweep meanwhile
            continue
        started = time.monotonic()
        try:
            said = step.make()
        except UserError as error:
            said, left = f"error: {error}", [one for one in missing if one.after != step.path]
            given_up += 1 + len(missing) - len(left)
            missing = left
        took = time.monotonic() - started
        print(f"{time.monotonic() - begin:7.1f} s, {took:5.1f} s: {step.path.relative_to(folder)}: {said}", flush=True)
    return len(missing) + given_up


def _first_ready(steps: list[Step], end: float) -> Step | None:
    """The first step that can be done; where all wait for other shares, as soon as one can, until `end` at most."""
    while True:
        ready = next((step for step in steps if step.is_ready), None)
        if ready or time.monotonic() >= end:
            return ready
        time.sleep(LOOK_SECONDS)
