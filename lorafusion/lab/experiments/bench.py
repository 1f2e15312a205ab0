"""Experiments that have an entry for each suite in a file of configs/, and whose points measure many cells each.

A point's process makes rows in the words of the measurement table, and one result file of them.
"""

from abc import abstractmethod
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from lorafusion.core.config import read_entries
from lorafusion.core.schema import MOST_MINUTES, MOST_REPEATS, MOST_SAMPLES, MOST_SEED, Config, UserError, one_of
from lorafusion.core.workload import ALL_LINEAR, Job, content_hash
from lorafusion.lab.cluster.request import Resources
from lorafusion.lab.experiments.experiment import (
    MARGIN,
    NO_INPUTS,
    Experiment,
    Inputs,
    Point,
    require_device,
    suite_name,
)
from lorafusion.lab.table.result import result_of_rows, write_result

SEVERAL = ("peft-multi", "fused-multi", "looped")  # implementations that take several adapters
Count = Annotated[int, Field(ge=1, le=MOST_SAMPLES)]


class BenchEntry(Config):
    """What the entries of all these files say."""

    repeats: int = Field(default=1, ge=1, le=MOST_REPEATS, description="fresh processes a bench")
    seed: int = Field(default=1, ge=0, le=MOST_SEED)
    minutes: int = Field(default=10, ge=1, le=MOST_MINUTES, description="time limit of a process")


class DeviceEntry(BenchEntry):
    """Of experiments that compute on a device."""

    device: Literal["cpu", "cuda"]
    dtype: Literal["float32", "bfloat16", "float16"]


class Variant(BaseModel):
    """An implementation and its number of adapters, none of a frozen model."""

    model_config = ConfigDict(frozen=True)

    implementation: str
    adapters: int

    @property
    def name(self) -> str:
        return f"{self.implementation}, {self.adapters} adapters" if self.adapters > 1 else self.implementation


def variants(implementations: list[str], adapters: list[int]) -> list[Variant]:
    """Each implementation once, and that of several adapters with each number of them."""
    return [
        Variant(implementation=name, adapters=count)
        for name in implementations
        for count in (adapters if name in SEVERAL else [0 if name == "frozen" else 1])
    ]


def equal_jobs(count: int, **settings: Any) -> tuple[Job, ...]:
    """Jobs that differ in their seeds alone, with adapters at all linears. settings: fields of `Job`."""
    return tuple(
        Job(name=f"adapter-{i}", dataset="random", target_modules=ALL_LINEAR, seed=i, **settings) for i in range(count)
    )


class BenchExperiment(Experiment):
    """config: the file with an entry for each suite; entry: what one holds."""

    config: Path
    entry: ClassVar[type[BenchEntry]]
    memory_mb: ClassVar[int] = 16_000

    @abstractmethod
    def subjects(self, entry: Any, source: str) -> Iterable[tuple[str, Any]]:
        """The names of an entry's points, and what each measures; `UserError` for something unknown."""

    @abstractmethod
    def depends_on(self, point: Point) -> object:
        """Everything in configs/ that the numbers of a point depend on, as JSON data."""

    @abstractmethod
    def columns(self, point: Point) -> dict:
        """What all rows of a point have in common, in columns of the table; `cell` is among them."""

    @abstractmethod
    def measure(self, point: Point, repeat: int, out: Path) -> Iterator[list[dict]]:
        """The rows of a point, as `lorafusion.lab.table.result.row` makes them. The result file is written after each
        of the lists. What fails is a row that says so."""

    def entries(self) -> dict[str, Any]:
        """All entries of the file; `UserError` names the key that is wrong, in whichever entry."""
        entries = read_entries(self.config, self.entry)
        for name, entry in entries.items():
            self._points_of(name, entry)
        return entries

    def entry_of(self, suite: str) -> Any:
        """The entry of a suite; `UserError` where there is none."""
        entries = self.entries()
        one_of(f"suite of {self.name}", suite, set(entries), self.config)
        return entries[suite]

    def points(self, suite: str) -> list[Point]:
        name = suite_name(suite)
        entry = self.entries().get(name)
        return self._points_of(name, entry) if entry else []

    def _points_of(self, suite: str, entry: Any) -> list[Point]:
        points: dict[str, Point] = {}
        for name, subject in self.subjects(entry, f"{self.config}: {suite}"):
            if name in points:
                raise UserError(f"{self.config}: {suite}: bench {name} is in the suite twice")
            points[name] = Point(suite, suite, name, entry.repeats, entry, subject)
        return list(points.values())

    def key(self, point: Point) -> str:
        return content_hash(self.depends_on(point))

    def resources(self, point: Point) -> Resources:
        entry = point.settings
        return Resources(entry.minutes + MARGIN, self.memory_mb, gpus=int(entry.device == "cuda"))

    def run(self, point: Point, repeat: int, out: Path, log: Path | None, inputs: Inputs = NO_INPUTS) -> str:
        require_device(point.settings, self.config)
        origin = self.origin(point, out, log) | {"bench": (self.name, point.suite, point.name)}
        cell = {"suite": point.suite, "kind": "measured", "gpus": 1, "repeat": repeat} | self.columns(point)
        rows: list[dict] = []
        for more in self.measure(point, repeat, out):
            rows += more
            write_result(out, result_of_rows(rows, cell, origin))
        return f"{len(rows)} numbers, {sum(row['status'] != 'ok' for row in rows)} failed"
