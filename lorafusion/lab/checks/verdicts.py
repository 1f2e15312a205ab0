"""The verdict of a check, as a file: what was proved, on what, and of which code; and what a figure asks of it.

This is the one place that reads verdicts. A verdict that cannot be read to the letter is none: `"passed": "no"` is a
mistake and not true.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from lorafusion.core.files import read_json, write
from lorafusion.core.schema import UserError, validated
from lorafusion.core.seals import require_own_seal, sealed

# The checks that figures need: of a suite's runs, of kernels, of whole training steps. The figures of some name each
# system that was compared.
BY_SYSTEM = ("systems", "gradients")
OF_RUNS = ("lossless", *BY_SYSTEM, "learning")
OF_KERNELS = ("kernels",)
OF_TRAINING = ("gradients", "learning")


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

    found = provenance(device)
    return Origin(suite=suite, device=device, dtype=dtype, gpu_name=found["gpu_name"], code=found.get("tree_hash"))


def write_verdict(verdict: Verdict, origin: Origin, path: Path) -> None:
    """Write a verdict with what it is about and its seal, whole or not at all."""
    write(path, json.dumps(sealed({**verdict.model_dump(), "origin": origin.model_dump()}), indent=1) + "\n")


def write_outcome(verdict: Verdict, origin: Origin, path: Path) -> None:
    """Write the verdict of a check that holds. Raises `CheckError` for one that does not, whose figures are written
    beside: the file itself is there for what holds alone."""
    if verdict.passed:
        write_verdict(verdict, origin, path)
        return
    path.unlink(missing_ok=True)
    failed = path.with_name(f"{path.name}.failed")
    write_verdict(verdict, origin, failed)
    raise CheckError(f"check {verdict.check} does not hold; its figures: {failed}")


def read_verdict(path: Path) -> Verdict:
    """The verdict in a file; raises `UserError` for one that is missing, cut short, or of another form."""
    if not path.exists():
        raise UserError(f"{path}: no such verdict; `lorafusion check` makes it")
    # A check that fails may have found what is no number.
    data = read_json(path, "verdict", finite=False)
    found = validated(_Written, {key: value for key, value in data.items() if key != "seal"}, path)
    require_own_seal(data, path)
    return found
