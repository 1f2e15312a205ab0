"""What every row of the measurement table must say, and what tells its rows apart."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from lorafusion.core.schema import UserError
from lorafusion.lab.table.vocabulary import COLUMNS, IDENTITY, METRICS

# Rows that agree here, and differ only in `repeat`, are repeats of each other.
GROUP = ("suite", "kind", "cell", "metric", "window", "implementation", "pass")
KEY = (*GROUP, "statistic", "repeat")
# A number's place by the columns of its cell, without the cell's name: for readers who group by columns.
PLACE = (*IDENTITY, "metric", "window", "implementation", "pass", "statistic", "repeat")
ROUNDING = 1e-9  # of a product of two numbers that were written with all their digits
ORDER = ("suite", "kind", "model", "workload", "gpus", "system", *KEY[2:])


class MeasurementError(UserError):
    """A result file or a table that does not say what it must; names the file, the row, the column and the remedy."""


def require_columns(names: Iterable[str], source: str | Path) -> None:
    """Raise `MeasurementError` unless a table has all columns and no others."""
    require_known(names, source)
    for name in COLUMNS:
        if name not in names:
            raise MeasurementError(f"{source}: no column {name!r}")


def require_known(names: Iterable[str], source: str | Path) -> None:
    """Raise `MeasurementError` for a name that is no column."""
    if unknown := sorted(set(names) - set(COLUMNS)):
        raise MeasurementError(f"{source}: unknown column {unknown[0]!r}; known: {', '.join(COLUMNS)}")


def validate(table: pd.DataFrame, source: str | Path = "table") -> None:
    """Raise `MeasurementError` at the first thing that a row says and must not, or must say and does not."""
    require_columns(table.columns, source)
    checked = _Checked(table, source)
    for name, column in COLUMNS.items():
        if column.required:
            checked.reject(table[name].isna(), name, "a value")
        if column.values:
            valid = table[name].isin(column.values) | table[name].isna()
            checked.reject(~valid, name, "one of " + ", ".join(column.values))
    for field in ("unit", "direction"):
        fixed = table["metric"].map({name: getattr(metric, field) for name, metric in METRICS.items()})
        checked.reject(table[field] != fixed, field, fixed + " for " + table["metric"])
    _validate_values(table, checked)
    single = table["statistic"] == "single"
    checked.reject(~single & table["repeat"].notna(), "repeat", "none in a summary")
    measured = single & (table["kind"] == "measured")
    checked.reject(measured & table["repeat"].isna(), "repeat", "the number of the fresh process")
    twice = "one " + table["statistic"] + " row for " + table["metric"] + " of cell " + table["cell"]
    checked.reject(table.duplicated(list(KEY)), "repeat", twice)
    _require_tokens_over_time(table, checked)
    named = table.groupby(list(PLACE), dropna=False)["cell"].transform("first")
    checked.reject(table.duplicated(list(PLACE)), "cell", "other columns than those of cell " + named)


def _require_tokens_over_time(table: pd.DataFrame, checked: _Checked) -> None:
    """Throughput times time is one whole number of tokens in all runs of a workload, whatever system trained it."""
    run = ["suite", "cell", "repeat"]
    rows = table[(table["kind"] == "measured") & (table["statistic"] == "single") & (table["window"] == "whole")]
    rows = rows[(rows["status"] == "ok") & rows["workload_hash"].notna()]
    throughput, time = (rows[rows["metric"] == metric].drop_duplicates(run) for metric in ("throughput", "time"))
    both = throughput.reset_index().merge(time[[*run, "value"]], on=run, suffixes=("", "_of_time")).set_index("index")
    if both.empty:
        return
    tokens = (both["value"] * both["value_of_time"]).astype(float)
    expected = tokens.groupby(both["workload_hash"]).transform("median").round()
    bad = (tokens - expected).abs() > ROUNDING * expected
    wanted = expected.map("{:.0f} tokens over the run's time, as its workload's other runs have".format)
    checked.reject(bad.reindex(table.index, fill_value=False), "value", wanted.reindex(table.index, fill_value=""))


@dataclass(frozen=True)
class _Checked:
    """A table under validation, and where it is from."""

    table: pd.DataFrame
    source: str | Path

    def reject(self, bad: pd.Series, column: str, expected: str | pd.Series) -> None:
        """Raise for the first bad row, counted from 1 below the header, with what was expected there."""
        flags = bad.to_numpy(dtype=bool, na_value=True)
        if not flags.any():
            return
        position = int(flags.argmax())
        wanted = expected if isinstance(expected, str) else expected.iloc[position]
        value, result = self.table[column].iloc[position], self.table["result"].iloc[position]
        origin = "" if pd.isna(result) else f" (of {result})"
        shown = "nothing" if pd.isna(value) else repr(value) if isinstance(value, str) else str(value)
        raise MeasurementError(f"{self.source}: row {position + 1}{origin}: {column}: expected {wanted}, found {shown}")


def _validate_values(table: pd.DataFrame, checked: _Checked) -> None:
    ok, value = table["status"] == "ok", table["value"]
    checked.reject(ok & value.isna(), "value", "a number with status ok")
    checked.reject(~ok & value.notna(), "value", "none with status " + table["status"])
    for name in ("value", "ci_low", "ci_high"):
        checked.reject(table[name].isin([math.inf, -math.inf]), name, "a finite number")
    low, high = table["ci_low"], table["ci_high"]
    checked.reject(low.isna() != high.isna(), "ci_low", "both ends of the interval or neither")
    outside = (low > value).fillna(False) | (high < value).fillna(False)
    checked.reject(outside, "ci_low", "an interval around the value")
    checked.reject(table["n"] < 1, "n", "at least 1")
