"""What figures ask of checks.

A figure of measurements is not drawn unless each check that it needs is there, is passed, and is about the suite,
device and code of the table. Plans need no verdict: each run checks its own.
"""

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from lorafusion.core.schema import UserError
from lorafusion.lab.checks.catalog import CHECKS
from lorafusion.lab.checks.verdicts import Verdict, read_verdict
from lorafusion.lab.table.table import read


def require_passed(path: Path, check: str, suite: str, code: str | None, dtype: str | None = None) -> Verdict:
    """The verdict in a file; raises `UserError` unless it is this check's, is passed, and is about this suite and code,
    and this dtype. These two: None where they are not known."""
    verdict = read_verdict(path)
    pairs = [("check", verdict.check, check), ("passed", verdict.passed, True), ("suite", verdict.origin.suite, suite)]
    optional = [("code", verdict.origin.code, code), ("dtype", verdict.origin.dtype, dtype)]
    pairs += [pair for pair in optional if pair[2] is not None]
    for key, value, expected in pairs:
        if value != expected:
            raise UserError(
                f"{path}: {key}: expected {expected}, found {value}; `lorafusion lab check {suite} {check}` makes it"
            )
    return verdict


def checked_table(path: Path, folder: Path | None, needed: Sequence[str], suite: str) -> pd.DataFrame:
    """A measurement table, once the checks that its figures need are there: in a folder, or in `checks` beside it.
    suite: a name or a path; of a table that has it beside others only its rows."""
    table = read(path)
    of_suite = table["suite"] == Path(suite).stem
    table = table[of_suite] if of_suite.any() else table
    if needed:
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
            place, expected = verdict.origin.gpu_name or "a CPU", device or "a CPU"
            raise UserError(f"{path}: made on {place}, but the table's numbers are of {expected}; make it there")
        if CHECKS[check].by_system:
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
