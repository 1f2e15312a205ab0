"""What an experiment is: its points in a suite, what each depends on, what it needs, and how it is run.

A *point* is one process that writes one result file. It is run `repeats` times, each in a fresh process. The drivers
(Snakemake's rules and the runner without Snakemake) and the command line know experiments by this protocol only.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from lorafusion.core.machine import has_gpu, neighbours, provenance
from lorafusion.core.schema import UserError, one_of
from lorafusion.lab.cluster.queue import jobs_here
from lorafusion.lab.cluster.request import Resources
from lorafusion.lab.suite import read_suite, step_command

MARGIN = 5  # minutes that a job may take beyond the time limit of what it runs


@dataclass(frozen=True)
class Point:
    """One process of an experiment. suite: the suite's name; source: the suite as it was asked for, a name or the path
    of a file; settings and subject: what the experiment itself has to know; points of a higher priority are run
    before all others."""

    suite: str
    source: str
    name: str
    repeats: int
    settings: Any
    subject: Any
    priority: int = 0


class Inputs(NamedTuple):
    """What a run is given besides its point. Only `end_to_end` has files to read. launch: as
    `lorafusion.launch.launch.launch`, which is the default."""

    workload: Path | None = None
    plan: Path | None = None
    tuned: Path | None = None
    nodes: int = 1
    launch: Callable[..., Any] | None = None


NO_INPUTS = Inputs()


class Experiment(ABC):
    """One kind of measurement.

    name: in the registry, on the command line and in result files; also the folder of its files below the results of a
    suite, where `folder` says no other. checks: verdicts that must be there before a point is run.
    """

    name: ClassVar[str]
    folder: ClassVar[str]
    checks: ClassVar[tuple[str, ...]] = ()

    def __init_subclass__(cls) -> None:
        if "name" in cls.__dict__ and "folder" not in cls.__dict__:
            cls.folder = cls.name

    @abstractmethod
    def points(self, suite: str) -> list[Point]:
        """All points of a suite, by its name or the path of its file; none where the suite has no such experiment."""

    @abstractmethod
    def key(self, point: Point) -> str:
        """A hash of everything in configs/ that the numbers of a point depend on."""

    @abstractmethod
    def resources(self, point: Point) -> Resources:
        """What a job needs that runs the point."""

    @abstractmethod
    def run(self, point: Point, repeat: int, out: Path, log: Path | None, inputs: Inputs = NO_INPUTS) -> str:
        """Run a point once, write its result file, also where it fails, and say in one line how it went. log: where
        the output goes, which the result file names."""

    def more_outputs(self, point: Point) -> tuple[str, ...]:
        """Suffixes of the files that a run writes besides `out`, which they replace: ".profile.csv" for example."""
        return ()

    def origin(self, point: Point, out: Path, log: Path | None) -> dict[str, Any]:
        """Where the result in `out` comes from, whatever was measured, and what else ran there."""
        return {
            **provenance(point.settings.device),
            **neighbours(),
            "other_jobs": jobs_here(),
            "config_hash": self.key(point),
            "seed": point.settings.seed,
            "started_at": datetime.now(UTC).isoformat(timespec="seconds"),
            "log": str(log) if log else None,
            "command": step_command(point.source, out),
        }

    def point(self, suite: str, name: str) -> Point:
        """A point by its name; `UserError` where the suite has none of that name."""
        points = {point.name: point for point in self.points(suite)}
        one_of(f"point of {self.name}", name, set(points), suite)
        return points[name]


def require_device(suite: Any, source: str | Path) -> None:
    """Raise where a suite, or the entry of one, is for GPUs and there is none. source: its file."""
    if suite.device == "cuda" and not has_gpu():
        raise UserError(f"{source}: a suite for GPUs, but nvidia-smi finds none; try the suite smoke")


def is_path(suite: str) -> bool:
    """Is a suite given by the path of its file, and not by its name?"""
    return suite.endswith((".yaml", ".yml"))


def suite_name(suite: str) -> str:
    """The name of a suite that is given by its name or the path of its file."""
    return read_suite(suite).name if is_path(suite) else suite
