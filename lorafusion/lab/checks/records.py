"""The checks of a suite: how each is made, by whichever driver, and that figures have them.

`lorafusion check`, the workflow's rules and `lorafusion sweep` make them here. A figure of a suite's measurements asks
for them here, and is not drawn unless each one is there, is passed, and is about the suite, device and code of the
table. Plans need no verdict: each run checks its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from lorafusion.core.schema import UserError
from lorafusion.lab.checks.comparisons import Curve, learning, lossless, systems, write_curves
from lorafusion.lab.checks.grounds import grounds_of
from lorafusion.lab.checks.verdicts import BY_SYSTEM, Verdict, origin_of, read_verdict, write_outcome
from lorafusion.lab.experiments.end_to_end import require_device
from lorafusion.lab.suite import Arrangement, Suite, read_suite
from lorafusion.lab.table.table import read

SYSTEMS_AS = "2x1"  # stages x replicas, or as many processes as a system can have


def make(name: str, suite_path: Path) -> tuple[Verdict, list[Curve]]:
    """One of `OF_RUNS` for a suite; and the losses that were compared, where it has some."""
    suite = read_suite(suite_path)
    require_device(suite, suite_path)
    arrangements = [Arrangement.read(one) for one in suite.checks.lossless]
    if name == "lossless":
        return lossless(arrangements, grounds=grounds_of(suite))
    if name == "systems":
        # On large models it is the gradients that are compared.
        small = [one for one in grounds_of(suite) if not one.layers]
        return systems(systems_of(suite), Arrangement.read(SYSTEMS_AS), small), []
    if name == "learning":
        return learning(grounds=grounds_of(suite)), []
    from lorafusion.lab.checks.gradients import gradients
    from lorafusion.lab.checks.gradients import grounds_of as grounds_of_gradients

    merged = systems_of(suite, merged=True)
    return gradients(systems_of(suite), arrangements, grounds_of_gradients(suite), merged), []


def make_files(name: str, suite_path: Path, folder: Path) -> str:
    """Make one of `OF_RUNS`, and write it to a folder if it holds, else raise `CheckError`; returns its statement."""
    suite = read_suite(suite_path)
    verdict, curves = make(name, suite_path)
    if curves:
        write_curves(curves, folder / f"{name}.csv")
    write_outcome(verdict, origin_of(suite.name, suite.device, suite.dtype), folder / f"{name}.json")
    return verdict.statement


def systems_of(suite: Suite, merged: bool | None = None) -> list[str]:
    """The systems of a suite's cells, or of those with q, k and v merged or apart."""
    grids = [grid for grid in suite.cells if merged is None or grid.merged_qkv is merged]
    return list(dict.fromkeys(system for grid in grids for system in grid.systems))


def require_passed(path: Path, check: str, suite: str, code: str | None, dtype: str | None = None) -> Verdict:
    """The verdict in a file; raises `UserError` unless it is this check's, is passed, and is about this suite and code,
    and this dtype. These two: None where they are not known."""
    verdict = read_verdict(path)
    pairs = [("check", verdict.check, check), ("passed", verdict.passed, True), ("suite", verdict.origin.suite, suite)]
    known = [("code", verdict.origin.code, code), ("dtype", verdict.origin.dtype, dtype)]
    pairs += [pair for pair in known if pair[2] is not None]
    for what, found, expected in pairs:
        if found != expected:
            raise UserError(f"{path}: {what}: expected {expected}, found {found}; `lorafusion check {check}` makes it")
    return verdict


def checked_table(path: Path, folder: Path | None, needed: Sequence[str]) -> pd.DataFrame:
    """A measurement table, once the checks that its figures need are there: in a folder, or in `checks` beside it."""
    table = read(path)
    require_checks(folder or path.parent / "checks", needed, table)
    return table


def require_checks(folder: Path, needed: Sequence[str], table: pd.DataFrame) -> None:
    """Raise `UserError` unless a table's numbers rest on the checks in a folder. A table that does not say which state
    of the code it is from, as old ones, is not asked."""
    measured = table[table["status"] == "ok"]
    suite, device, code = (_only(measured, column) for column in ("suite", "gpu_name", "tree_hash"))
    for check in needed:
        path = folder / f"{check}.json"
        verdict = require_passed(path, check, suite, code)
        if verdict.origin.gpu_name != device:
            found, expected = verdict.origin.gpu_name or "a CPU", device or "a CPU"
            raise UserError(f"{path}: made on {found}, but the table's numbers are of {expected}; make it there")
        if check in BY_SYSTEM:
            compared = {figure.partition(" as ")[0] for figure in verdict.figures}
            missing = sorted(set(measured["system"].dropna()) - compared - {""})
            if missing:
                raise UserError(f"{path}: says nothing of {missing[0]}, which the table has; make it for all systems")


def _only(table: pd.DataFrame, column: str) -> str | None:
    """What a column has in all rows; None where it is empty."""
    values = sorted(table[column].dropna().unique())
    if len(values) > 1:
        raise UserError(
            f"the table: {column}: expected one value, as checks are about one, found {values[0]} and {values[1]}"
        )
    return values[0] if values else None
