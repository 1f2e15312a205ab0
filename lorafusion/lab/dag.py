"""What a step of a suite is: the files that it writes, what they depend on, and whether they are up to date.

`lorafusion.lab.steps` lists the steps of a suite. Two drivers make them: Snakemake, whose rules are made from the kinds
of steps, and `lorafusion.lab.runner`, in one process on a rented machine. Both call `make_step`, which compares the
keys of the inputs first, and writes the step's own key beside its output at the end.

A key is a hash of all settings that an output depends on, and of the keys of its inputs. What files contain is compared
too, where they say what they were made from (`lorafusion.lab.keys`).
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatch
from functools import cached_property, partial
from pathlib import Path
from typing import NamedTuple

from lorafusion.core.files import write
from lorafusion.core.schema import UserError
from lorafusion.core.workload import content_hash
from lorafusion.lab.cluster.request import Resources
from lorafusion.lab.keys import OutOfDateError
from lorafusion.launch.outcome import Outcome
from lorafusion.launch.rendezvous import node_rank
from lorafusion.launch.spec import RunSpec

KEY_SUFFIX = ".key"
FIRST = 1000  # the tier of a step that is of no block of a suite


@dataclass(frozen=True, eq=False)
class Kind:
    """Steps that differ in their name alone: a rule of the workflow.

    outputs: paths below the suite's folder, the main one first; {name} stands for the step's name.
    quick: needs no machine for itself and takes seconds. Such steps are made by whichever driver needs them.
    fresh: made in a process of its own, whose clock nothing before it has disturbed.
    directory: the output is a folder.
    labels: of the outputs that the report shows, in a category, with a caption (a file of workflow/report).
    """

    name: str
    outputs: tuple[str, ...]
    quick: bool = False
    fresh: bool = False
    directory: bool = False
    labels: dict[str, str] = field(default_factory=dict)
    category: str = ""
    caption: str = ""

    @property
    def has_name(self) -> bool:
        return "{name}" in self.outputs[0]

    @property
    def log(self) -> str:
        return f"logs/{self.name}/{{name}}.log" if self.has_name else f"logs/{self.name}.log"

    @property
    def key(self) -> str:
        return f"{self.outputs[0]}{KEY_SUFFIX}"


class Turn(NamedTuple):
    """When a measured step comes: in which repeat, with which others of a group, and what it costs about."""

    group: str
    repeat: int
    cost: Callable[[], int]


@dataclass(frozen=True, eq=False)
class Step:
    """Something that is made, with all its files.

    command: what to type to make it again. make: makes the files with a launcher of processes (as
    `lorafusion.launch.launch.launch`) and says in a line how it went. settings: a JSON value with all that the outputs
    depend on besides the inputs. read: reads the outputs and raises `UserError` where they are not what would be made
    now. turn: for steps that are run in shuffled repeats. tier: of a suite's blocks, for one process that makes steps
    of a higher one first.
    """

    kind: Kind
    name: str
    folder: Path
    command: str
    make: Callable[[Step, Callable], str]
    settings: Callable[[], object]
    inputs: tuple[Step, ...] = ()
    read: Callable[[], object] = lambda: None
    resources: Resources = Resources(minutes=10, memory_mb=2000, exclusive=False)
    priority: int = 0
    tier: int = FIRST
    turn: Turn | None = None

    def _at(self, pattern: str) -> Path:
        return self.folder / pattern.format(name=self.name)

    @cached_property
    def outputs(self) -> list[Path]:
        return [self._at(pattern) for pattern in self.kind.outputs]

    @property
    def files(self) -> list[Path]:
        return [*self.outputs, self.key_path]

    @property
    def path(self) -> Path:
        return self.outputs[0]

    @property
    def relative(self) -> str:
        return self.kind.outputs[0].format(name=self.name)

    @property
    def log(self) -> Path:
        return self._at(self.kind.log)

    @cached_property
    def key(self) -> str:
        """Of what the outputs would be made from now."""
        return content_hash([self.kind.name, self.name, self.settings(), [step.key for step in self.inputs]])

    @property
    def key_path(self) -> Path:
        return self._at(self.kind.key)

    @property
    def written_key(self) -> str | None:
        """Of what the outputs were made from; None where it is not known."""
        return self.key_path.read_text(errors="replace").strip() if self.key_path.is_file() else None

    @property
    def is_stale(self) -> bool:
        """Were the outputs made from something else than they would be made from now?"""
        return self.written_key not in (None, self.key)

    def write_key(self) -> None:
        write(self.key_path, f"{self.key}\n")

    def forget_key(self) -> None:
        self.key_path.unlink(missing_ok=True)

    def require_current(self) -> None:
        """Raise `OutOfDateError` unless the outputs have the key of what they would be made from now."""
        if not self.path.exists():
            raise UserError(f"{self.path}: missing; make it first: {self.command}")
        if self.written_key != self.key:
            raise OutOfDateError(self.path, "key", self.written_key or "none", self.key)

    def reason(self) -> str:
        """Why the outputs are not up to date, if the inputs are; empty if they are."""
        if not all(path.exists() for path in self.outputs):
            return "missing"
        try:
            self.read()
            self.require_current()
        except OutOfDateError as error:
            return error.reason
        except UserError as error:
            return str(error).removeprefix(f"{self.path}: ")
        return ""


def state(step: Step, seen: dict[Step, str] | None = None) -> str:
    """Why a step is to be made, empty if it is up to date. seen: the states that are known already."""
    seen = {} if seen is None else seen
    if step not in seen:
        waits_for = next((source for source in step.inputs if state(source, seen)), None)
        seen[step] = f"after {waits_for.path}" if waits_for else step.reason()
    return seen[step]


def ancestors(step: Step) -> list[Step]:
    """All that a step is made from, the earliest first, each once."""
    sources: dict[Step, None] = {}
    for source in step.inputs:
        sources |= dict.fromkeys([*ancestors(source), source])
    return list(sources)


def with_ancestors(steps: Sequence[Step]) -> list[Step]:
    """Steps and all that they are made from, the earliest first, each once."""
    return list(dict.fromkeys(every for step in steps for every in [*ancestors(step), step]))


def make_step(step: Step, launch: Callable) -> str:
    """Make one step whose inputs are up to date; returns what it says."""
    for source in step.inputs:
        source.require_current()
    is_first = node_rank(os.environ) == 0  # of a run on several nodes the first writes the result
    if is_first:
        step.forget_key()
    statement = step.make(step, partial(launch_again, launch))
    if is_first:
        step.write_key()
    return statement


def launch_again(
    launch: Callable, spec: RunSpec, processes: int, timeout: float = math.inf, nodes: int = 1, *reports: Path | None
) -> Outcome:
    """Launch a run on one node once more if a process of it was killed from outside, as by a host that is short of
    memory. Never after a failure of its own, which says something about the run."""
    first = launch(spec, processes, timeout, nodes, *reports)
    if not first.killed or nodes > 1:
        return first
    print(f"killed from outside, tried once more: {first.note}", flush=True)
    second = launch(spec, processes, timeout, nodes, *reports)
    reason = f"the second try, as a process of the first was killed: {first.note}"
    return replace(second, note="; ".join(filter(None, [second.note, reason])))


@dataclass(frozen=True)
class Dag:
    """The steps of a suite, in the order in which one process makes them. runs: those that write a result. targets:
    what can be asked for by name; `all` is what the workflow makes unless asked for something else."""

    suite: str
    name: str
    folder: Path
    steps: tuple[Step, ...]
    runs: frozenset[Step]
    targets: dict[str, list[Step]]

    @property
    def kinds(self) -> dict[Kind, dict[str, Step]]:
        """The steps of each kind by their names."""
        steps_of: dict[Kind, dict[str, Step]] = {}
        kinds: dict[str, Kind] = {}
        for step in self.steps:
            steps_of.setdefault(kinds.setdefault(step.kind.name, step.kind), {})[step.name] = step
        return steps_of

    def of_target(self, target: str) -> list[Step]:
        """The steps of a target with all that they are made from, in order."""
        wanted = set(with_ancestors(self.targets[target]))
        return [step for step in self.steps if step in wanted]

    def select(self, patterns: Sequence[str]) -> list[Step]:
        """The steps of some kinds, or whose path in the suite's folder fits a pattern; `UserError` if there is none."""
        names = dict.fromkeys(step.kind.name for step in self.steps)
        chosen = [step for step in self.steps if any(_fits(step, pattern, pattern in names) for pattern in patterns)]
        if not chosen:
            kinds = ", ".join(names)
            raise UserError(f"{self.suite}: no step fits {' or '.join(map(repr, patterns))}; kinds of steps: {kinds}")
        return chosen


def _fits(step: Step, pattern: str, is_kind: bool) -> bool:
    """A kind's name stands for its steps alone: `run` is a part of many paths, and `workload` of nearly all."""
    return step.kind.name == pattern if is_kind else fnmatch(step.relative, f"*{pattern}*")
