"""The verdict of a check, as a file: what was proved, on what, and of which code; and what a figure asks of it.

This is the one place that reads verdicts. A verdict that cannot be read to the letter is none: `"passed": "no"` is a
mistake and not true.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, model_validator

from lorafusion.core.files import read_json, write
from lorafusion.core.schema import UserError, validated
from lorafusion.core.seals import require_own_seal, seal, sealed


class CheckError(UserError):
    """A check that does not hold."""


class Origin(BaseModel):
    """What a check was made for and on. suite: the suite's name, None where it was made for none. gpu_name: None on a
    CPU. code: the state of the code, as the measurement table has it; None where it is not known."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    suite: str | None
    device: Literal["cpu", "cuda"]
    dtype: str
    gpu_name: str | None = None
    code: str | None = None


class Verdict(BaseModel):
    """The outcome of a check: did it hold, and by which figures. limits: the most that a figure may be, by its name.
    origin: there as soon as it is a file."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    check: str = Field(min_length=1)
    passed: bool
    statement: str
    figures: dict[str, float | int]
    limits: dict[str, float | int] = {}
    origin: Origin | None = None

    @model_validator(mode="after")
    def _figures_bear_it_out(self) -> Verdict:
        for name in self.limits:
            if name not in self.figures:
                raise ValueError(f"limits: no figure {name!r}")
        for name, value in self.figures.items():
            limit = self.limits.get(name, math.inf)
            if self.passed and not (math.isfinite(value) and value <= limit):
                raise ValueError(f"passed, although {name!r} is {value}, where at most {limit} is allowed")
        return self


class _Written(Verdict):
    origin: Origin


def origin_of(suite: str | None, device: str, dtype: str) -> Origin:
    """Of a check that is made here and now."""
    from lorafusion.core.machine import provenance

    here = provenance(device)
    return Origin(suite=suite, device=device, dtype=dtype, gpu_name=here["gpu_name"], code=here.get("tree_hash"))


PLAIN = "plain libraries"  # the trainer of a curve


class Curve(NamedTuple):
    """The losses of a job's global batches, and who trained it: `alone`, an arrangement, or `plain libraries`."""

    job: str
    trainer: str
    losses: list[float]


class Evidence:
    """The figures of a check while it is made, and whether all are within their limits."""

    def __init__(self) -> None:
        self._figures: dict[str, float] = {}
        self._limits: dict[str, float] = {}
        self._passed = True

    def add(self, name: str, value: float, most: float | None = None) -> None:
        self._figures[name] = value
        if most is not None:
            self._limits[name] = most
            self.require(value <= most)  # which NaN is not

    def require(self, condition: bool) -> None:
        self._passed = self._passed and condition

    def verdict(self, check: str, statement: str) -> Verdict:
        """What it comes to; a check without figures has not passed."""
        return Verdict(check=check, passed=self._passed and bool(self._figures), statement=statement,
                       figures=self._figures, limits=self._limits)  # fmt: skip


def left_out(why: str, names: Sequence[str]) -> str:
    """The end of a statement that is not about everything."""
    return f"; left out, {why}: {', '.join(names)}" if names else ""


@dataclass(frozen=True)
class CheckOutcome:
    """A check that was made: its verdict, what it is about, and the losses that were compared, where it has some."""

    verdict: Verdict
    origin: Origin
    curves: Sequence[Curve] = ()

    def lines(self) -> list[str]:
        """For people."""
        verdict = self.verdict
        lines = [f"{'passed' if verdict.passed else 'FAILED'}: {verdict.statement}"]
        for name, value in verdict.figures.items():
            limit = f" (at most {verdict.limits[name]:.3g})" if name in verdict.limits else ""
            lines.append(f"  {name}: {value:.3g}{limit}")
        return lines

    def write(self, path: Path, curves: Path | None = None) -> None:
        """Write the verdict to a file, and the curves. Raises `CheckError` for a check that does not hold, whose
        figures are written beside: the file itself is there for what holds alone."""
        if self.curves and curves:
            write_curves(self.curves, curves)
        if self.verdict.passed:
            write_verdict(self.verdict, self.origin, path)
            return
        path.unlink(missing_ok=True)
        failed = path.with_name(f"{path.name}.failed")
        write_verdict(self.verdict, self.origin, failed)
        raise CheckError(f"check {self.verdict.check} does not hold; its figures: {failed}")

    def write_to(self, folder: Path) -> None:
        """Write it under the names of `catalog.files_of`."""
        name = self.verdict.check
        self.write(folder / f"{name}.json", folder / f"{name}.csv")


def write_verdict(verdict: Verdict, origin: Origin, path: Path) -> None:
    """Write a verdict with what it is about and its seal, whole or not at all."""
    write(path, json.dumps(sealed({**verdict.model_dump(), "origin": origin.model_dump()}), indent=1) + "\n")


def write_curves(curves: Sequence[Curve], path: Path) -> None:
    """All losses as CSV: job, trainer, step (from 1), loss."""
    lines = ["job,trainer,step,loss"]
    for curve in curves:
        lines += [f"{curve.job},{curve.trainer},{step},{loss!r}" for step, loss in enumerate(curve.losses, 1)]
    write(path, "\n".join(lines) + "\n")
    seal(path)


def read_verdict(path: Path) -> Verdict:
    """The verdict in a file; raises `UserError` for one that is missing, cut short, or of another form."""
    if not path.exists():
        raise UserError(f"{path}: no such verdict; `lorafusion lab check` makes it")
    # A check that fails may have found what is no number.
    data = read_json(path, "verdict", finite=False)
    verdict = validated(_Written, {key: value for key, value in data.items() if key != "seal"}, path)
    require_own_seal(data, path)
    return verdict
