"""A suite's steps made by this process, without Snakemake: for a machine that is rented by the minute, where starting
a run takes longer than the run.

The steps are those of the workflow, and so are their files. What is up to date is not made again. Several processes can
share a suite, each with a GPU of its own. Steps are dealt out one by one, except those of shuffled repeats: of a repeat
a share runs whole groups, so that the systems that are compared run on one GPU, and on the next one in the next repeat.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout, suppress
from functools import partial
from typing import IO, NamedTuple

from lorafusion.core.schema import UserError
from lorafusion.lab.dag import Step, ancestors, make_step, state, with_ancestors
from lorafusion.launch.launch import end_with_parent

LOOK_SECONDS = 1.0


class Share(NamedTuple):
    """Which of `count` processes that share a suite this is."""

    index: int = 0
    count: int = 1

    @classmethod
    def read(cls, text: str) -> Share:
        match = re.fullmatch(r"(\d{1,5})/(\d{1,5})", text)
        if not match or int(match[1]) >= int(match[2]):
            raise UserError(f"--share: expected I/N with I from 0 to N - 1, found {text!r}")
        return cls(int(match[1]), int(match[2]))


def spread(costs: dict[str, int], shares: int) -> dict[str, int]:
    """To which share each of some groups goes, so that all have about as much: the costly ones first, each to the share
    that has least."""
    loads, homes = [0] * shares, {}
    for name in sorted(costs, key=lambda name: (-costs[name], name)):
        homes[name] = loads.index(min(loads))
        loads[homes[name]] += costs[name]
    return homes


def dealt(steps: Sequence[Step], share: Share) -> list[Step]:
    """The steps of a share, in order."""
    costs: dict[str, int] = {}
    for step in steps:
        if step.turn and step.turn.repeat == 1:
            costs[step.turn.group] = costs.get(step.turn.group, 0) + step.turn.cost()
    homes, places, mine = spread(costs, share.count), {}, []
    for step in steps:
        if step.turn:
            place = homes.get(step.turn.group, 0) + step.turn.repeat
        else:
            kind = "check" if step.kind.name.startswith("check_") else step.kind.name
            place = places.setdefault(kind, 0)
            places[kind] += 1
        if place % share.count == share.index:
            mine.append(step)
    return mine


def measured(steps: Sequence[Step]) -> list[Step]:
    """Of some steps and all that they are made from, those that need the machine. The others are made where they are
    needed."""
    return [step for step in with_ancestors(steps) if not step.kind.quick]


def run_steps(steps: Sequence[Step], launch: Callable, seconds: float = float("inf"), shares: int = 1) -> int:
    """Make what is missing of some steps or out of date, beginning nothing after `seconds`; returns how many are left.

    launch: as `lorafusion.launch.launch.launch`. shares: how many processes share the suite; what another one makes is
    waited for.
    """
    begin, given_up = time.monotonic(), 0
    for step in steps:
        with suppress(UserError):  # said when it is the step's turn
            make_quick(step, launch)
    seen: dict[Step, str] = {}
    missing = [step for step in steps if state(step, seen)]
    while missing and time.monotonic() - begin <= seconds:
        step = first_ready(missing, begin + seconds, shares)
        if step is None:
            break
        missing.remove(step)
        started = time.monotonic()
        try:
            make_quick(step, launch)
            if not state(step):  # made by another share meanwhile
                continue
            statement = _make(step, launch)
        except UserError as error:
            statement, left = f"error: {error}", [other for other in missing if step not in ancestors(other)]
            given_up += 1 + len(missing) - len(left)
            missing = left
        took = time.monotonic() - started
        print(f"{time.monotonic() - begin:7.1f} s, {took:5.1f} s: {step.relative}: {statement}", flush=True)
    return len(missing) + given_up


def make_quick(step: Step, launch: Callable) -> None:
    """Make the quick steps that a step is made from, as far as they can be made now."""
    seen: dict[Step, str] = {}
    for source in ancestors(step):
        if source.kind.quick and state(source, seen) and not any(state(other, seen) for other in source.inputs):
            _make(source, launch)
            seen.pop(source)


def _make(step: Step, launch: Callable) -> str:
    """Make a step, and say why if it was made before. What it and its processes print goes to its log."""
    reason = state(step)
    if step.path.exists():
        print(f"{step.relative}: made anew: {reason}", flush=True)
    try:
        step.log.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{step.log.parent}: cannot be made ({error.strerror})") from None
    step.log.unlink(missing_ok=True)
    with open(step.log, "a") as log:  # its processes add to it too
        if step.kind.fresh:
            return _make_in_a_process(step, log)
        with redirect_stdout(log):
            statement = make_step(step, partial(launch, log=log))
        log.write(f"{statement}\n")
    return statement


def _make_in_a_process(step: Step, log: IO[str]) -> str:
    words = [sys.executable, "-m", "lorafusion.cli.main", *shlex.split(step.command)[1:]]
    done = subprocess.run(words, stdout=log, stderr=subprocess.STDOUT, check=False, preexec_fn=end_with_parent)
    lines = step.log.read_text().splitlines() or [""]
    if done.returncode:
        raise UserError(f"{lines[-1].removeprefix('error: ')} ({step.log})")
    return lines[-1].partition(": ")[2]


def first_ready(steps: Sequence[Step], end: float, shares: int = 1) -> Step | None:
    """The first step whose inputs are there; where all wait for other shares, as soon as there is one, until `end` at
    most, or until what they wait for can't come any more."""
    begin = time.monotonic()
    while True:
        seen: dict[Step, str] = {}
        # By this share or another.
        blocked = [
            [source for source in ancestors(step) if not source.kind.quick and state(source, seen)] for step in steps
        ]
        ready = next((step for step, waits in zip(steps, blocked, strict=True) if not waits), None)
        longest = 60.0 * max((source.resources.minutes for waits in blocked for source in waits), default=0)
        if ready or time.monotonic() >= min(end, begin + (longest if shares > 1 else 0.0)):
            return ready
        time.sleep(LOOK_SECONDS)
