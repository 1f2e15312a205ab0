"""A suite's cells without Snakemake: tuned, planned, run and profiled one after another, in forked processes.

For a machine that is rented by the minute, where starting a run takes longer than the run. It leaves the files that the
workflow would, in the same places and by the same functions: `lorafusion measurements` and `lorafusion figure` go on
from them. What is there already is not done again, if it was made from what the suite says now (`lorafusion.lab.keys`).

Several of it share the work on a machine with several GPUs. Tunings and profiles are dealt out one by one. Of a repeat
a share runs whole workloads, so that systems are compared on one GPU, and the next one in the next repeat.
"""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import NamedTuple

from lorafusion.core.files import write
from lorafusion.core.plan import Plan
from lorafusion.core.schema import UserError
from lorafusion.core.source_tree import tree_hash
from lorafusion.lab.checks.catalog import needed_by, run_check
from lorafusion.lab.checks.requirements import require_passed
from lorafusion.lab.experiments.end_to_end import run_cell, unavailable
from lorafusion.lab.keys import CellFiles, OutOfDateError, suite_files
from lorafusion.lab.suite import Cell, Suite, read_suite
from lorafusion.lab.tuning import plan_cell, profile_cell, tune_cell
from lorafusion.launch.launch import Outcome

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
    """Cells in the order of one of the repeats: the same wherever it is asked for, another for each repeat. It depends
    on their places in the suite, not on what they are called."""
    order = list(names)
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


def out_of_date(path: Path, read: Callable[[Path], object]) -> str:
    """Why a file is not what it would be if it were made now; empty if it is. read: raises `UserError` then."""
    if not path.exists():
        return "missing"
    try:
        read(path)
    except OutOfDateError as error:
        return error.reason
    except UserError as error:
        return str(error).removeprefix(f"{path}: ")
    return ""


class Step(NamedTuple):
    """A file to be made, how it is read where it is up to date, and what makes it, once another step is done, which may
    be another share's to do. make: is given a log."""

    path: Path
    read: Callable[[Path], object]
    make: Callable[[Path], str]
    after: Step | None = None

    @property
    def is_ready(self) -> bool:
        return self.after is None or not self.after.reason

    @property
    def reason(self) -> str:
        """Why it is to be done, empty if it is not."""
        if not self.is_ready:
            return f"after {self.after.path}"
        return out_of_date(self.path, self.read)


@dataclass(frozen=True)
class Sweep:
    """A suite's cells, and the folder of its results. launch: as `lorafusion.launch.launch.launch`."""

    suite_path: Path
    folder: Path
    share: Share
    launch: Callable[..., Outcome]

    @cached_property
    def suite(self) -> Suite:
        return read_suite(self.suite_path)

    @cached_property
    def files(self) -> dict[str, CellFiles]:
        """By the cells' names."""
        return suite_files(self.suite_path)

    @property
    def longest_wait(self) -> float:
        """Seconds after which a tuning that another share has begun is at its end, whatever became of it."""
        return 60.0 * max(one.cell.grid.minutes for one in self.files.values())

    def steps(self) -> Iterator[Step]:
        """What this share of the sweep does, in order: checks, tunings, profiles, then repeat after repeat."""
        suite, every = self.suite, self.files
        code = tree_hash()
        for name in needed_by("runs")[self.share.index :: self.share.count]:
            yield Step(self.folder / "checks" / f"{name}.json",
                       partial(require_passed, check=name, suite=suite.name, code=code, dtype=suite.dtype),
                       partial(self._check, name))  # fmt: skip
        able = [one for one in every.values() if not unavailable(one.system)]
        for one in {one.cell.workload_name: one for one in every.values()}.values():
            self._workload(one)
        costs = Counter()
        for one in able:
            costs[one.cell.workload_name] += one.expected_workload.tokens + START
        homes = spread(costs, self.share.count)
        yield from filter(None, map(self._tuning, self._dealt([one for one in able if one.cell.grid.tuned])))
        profiled = [one for one in able if one.cell.workload in suite.profiled and suite.device == "cuda"]
        for one in self._dealt(profiled):
            yield Step(self.path("profiles", one.cell, "csv"), partial(self._read_profile, one),
                       partial(self._profile, one), self._tuning(one))  # fmt: skip
        for repeat in range(1, suite.repeats + 1):
            for name in shuffled(list(every), repeat):
                if (homes.get(every[name].cell.workload_name, 0) + repeat) % self.share.count == self.share.index:
                    yield self._repeat(every[name], repeat)

    def _dealt(self, some: list[CellFiles]) -> list[CellFiles]:
        """Those of some cells that are this share's: costly ones lie together, and no share has them all."""
        return some[self.share.index :: self.share.count]

    def _check(self, name: str, log: Path) -> str:
        outcome = run_check(name, self.suite_path)
        outcome.write_to(self.folder / "checks")
        statement = outcome.verdict.statement
        write(log, f"passed: {statement}\n")
        return statement

    def _tuning(self, one: CellFiles) -> Step | None:
        """What finds the capacity with which a cell is planned, if it is tuned."""
        if not one.cell.grid.tuned or unavailable(one.system):
            return None
        return Step(self.path("tuned", one.cell, "json"), one.tuned, partial(self._tune, one))

    def _repeat(self, one: CellFiles, repeat: int) -> Step:
        path = self.folder / "runs" / one.cell.name / f"repeat~{repeat}.json"
        return Step(path, partial(self._read_result, one, repeat), partial(self._run, one, repeat, path),
                    self._tuning(one))  # fmt: skip

    def path(self, kind: str, cell: Cell, suffix: str) -> Path:
        return self.folder / kind / f"{cell.name}.{suffix}"

    def _workload(self, one: CellFiles) -> Path:
        path = self.folder / "workloads" / f"{one.cell.workload_name}.json"
        return self._up_to_date(path, one.workload, lambda: one.expected_workload.to_json())

    def _plan(self, one: CellFiles) -> Path | None:
        if unavailable(one.system):
            return None
        tuned = one.tuned(self._tuned_path(one))
        return self._up_to_date(
            self.path("plans", one.cell, "json"),
            partial(one.plan, tuned=tuned),
            lambda: plan_cell(one.expected_workload, one.cell, one.capacity(tuned)).to_json(),
        )

    def _up_to_date(self, path: Path, read: Callable[[Path], object], text: Callable[[], str]) -> Path:
        """The path of a file that takes no time, made where it is missing or out of date."""
        reason = out_of_date(path, read)
        if reason:
            say_anew(self.folder, path, reason)
            write(path, text())
        return path

    def _tuned_path(self, one: CellFiles) -> Path | None:
        step = self._tuning(one)
        return step.path if step else None

    def _read_plan(self, one: CellFiles) -> Plan | None:
        path = self._plan(one)
        return one.plan(path, one.tuned(self._tuned_path(one))) if path else None

    def _read_profile(self, one: CellFiles, path: Path) -> object:
        return one.profile(path, self._read_plan(one))

    def _read_result(self, one: CellFiles, repeat: int, path: Path) -> object:
        return one.result(path, self._read_plan(one), repeat)

    def _tune(self, one: CellFiles, log: Path) -> str:
        out = self.path("tuned", one.cell, "json")
        with self._logged(log) as launch:
            tuned = tune_cell(self.suite_path, one.cell.name, self._workload(one), out, launch=launch)
        return ", ".join(map(str, tuned.trials))

    def _profile(self, one: CellFiles, log: Path) -> str:
        with self._logged(log) as launch:
            rows = profile_cell(self.suite_path, one.cell.name, self._workload(one), self._plan(one),
                                self.path("profiles", one.cell, "csv"), self._tuned_path(one), launch)  # fmt: skip
        return f"{len(rows)} classes of kernels"

    def _run(self, one: CellFiles, repeat: int, out: Path, log: Path) -> str:
        with self._logged(log) as launch:
            return run_cell(self.suite_path, one.cell.name, self._workload(one), self._plan(one), out, repeat, 1, log,
                            self._tuned_path(one), launch)  # fmt: skip

    @contextmanager
    def _logged(self, log: Path) -> Iterator[Callable[..., Outcome]]:
        """The launcher of runs whose output goes to a file."""
        log.parent.mkdir(parents=True, exist_ok=True)
        with open(log, "w") as file:
            yield partial(self.launch, log=file)

    def log(self, step: Step) -> Path:
        """Where the workflow has the log of a step, too."""
        kind, *rest = step.path.relative_to(self.folder).with_suffix(".log").parts
        places = {"checks": "check_", "tuned": "tune/", "profiles": "profile/", "runs": "run/"}
        return self.folder / "logs" / f"{places[kind]}{Path(*rest)}"


def say_anew(folder: Path, path: Path, reason: str) -> None:
    """Say of a file that is out of date why it is made anew."""
    if path.exists():
        print(f"{path.relative_to(folder)}: made anew: {reason}", flush=True)


def sweep(suite_path: Path, folder: Path, share: Share, launch: Callable[..., Outcome], seconds: float) -> int:
    """Do what is missing of a suite or out of date, beginning nothing after `seconds`; returns how much was left."""
    begin, given_up = time.monotonic(), 0
    whole = Sweep(suite_path, folder, share, launch)
    missing = [step for step in whole.steps() if step.reason]
    wait = whole.longest_wait if share.count > 1 else 0.0
    while missing and time.monotonic() - begin <= seconds:
        step = _first_ready(missing, min(time.monotonic() + wait, begin + seconds))
        if step is None:
            break
        missing.remove(step)
        started = time.monotonic()
        try:
            reason = step.reason
            if not reason:  # made by another sweep meanwhile
                continue
            say_anew(folder, step.path, reason)
            said = step.make(whole.log(step))
        except UserError as error:
            said, left = f"error: {error}", [one for one in missing if one.after is None or one.after.path != step.path]
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
