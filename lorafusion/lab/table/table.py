"""The measurement table: one row a number, whatever was measured, simulated, published or derived.

Its words are defined in `vocabulary` and nowhere else. Its rows come from the result files of runs, `summarise` adds
the medians over repeats, `validate` says which row is wrong and why, and a table is kept as CSV (for people) and as
Parquet (with types), which hold the same.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
from pydantic import ValidationError

from lorafusion.core.files import read_json, whole
from lorafusion.core.files import write as write_text
from lorafusion.core.schema import mistakes
from lorafusion.core.seals import require_own_seal, require_seal, seal
from lorafusion.lab.table.reading import read_frame
from lorafusion.lab.table.result import BESIDE, ExpectedMetric, Result, ResultMetric
from lorafusion.lab.table.statistics import fewest, interval, median
from lorafusion.lab.table.store import SUFFIX, read_store, require_store
from lorafusion.lab.table.validation import (
    GROUP,
    KEY,
    ORDER,
    MeasurementError,
    require_columns,
    require_known,
    validate,
)
from lorafusion.lab.table.vocabulary import COLUMNS, COSTS, METRICS, STATUSES, TYPE_NAMES, json_schema

# Repeats that differ in the first are not repeats; where they differ in the second, the summary's note says so.
MUST_AGREE = ("config_hash", "workload_hash", "plan_hash")
SHOULD_AGREE = ("git_sha", "git_dirty", "gpu_name", "driver", "cuda", "torch", "triton")
BOOLEANS = {"True": True, "False": False}  # as they stand in a CSV


def read_results(paths: Iterable[str | Path]) -> pd.DataFrame:
    """The table of all rows of the result files; raises `MeasurementError` naming the file that is wrong."""
    return table_of(read_contents(paths))


def read_contents(paths: Iterable[str | Path]) -> dict[str, dict]:
    """The contents of result files by name, those in stores included; raises naming the file that is wrong."""
    contents: dict[str, dict] = {}
    for path in paths:
        entries = read_store(path) if str(path).endswith(SUFFIX) else {str(path): _json(path)}
        twice = contents.keys() & entries.keys()
        if twice:
            raise MeasurementError(f"{path}: {min(twice)} is there twice")
        for name, content in entries.items():
            require_own_seal(content, name)
        contents |= entries
    return contents


def table_of(contents: dict[str, dict]) -> pd.DataFrame:
    """The table of all rows of result files. contents: by name."""
    table = frame([row for path, result in contents.items() for row in rows_of_result(result, path)])
    validate(table)
    return table.sort_values(list(ORDER), ignore_index=True)


def read_result(path: str | Path) -> dict:
    """The content of a run's result file; raises `MeasurementError` for one that the table would not take."""
    read_results([path])
    return _json(path)


def _json(path: str | Path) -> dict:
    if not Path(path).exists():
        raise MeasurementError(f"{path}: no such file; every run writes a result, also one that fails")
    return read_json(path, "result")


def rows_of_result(result: dict, path: str) -> list[dict]:
    """The rows of one run: its numbers, or an empty value for each that it should have had."""
    try:
        parsed = Result.model_validate(result)
    except ValidationError as error:
        raise MeasurementError(*(f"{path}: {mistake}" for mistake in mistakes(error, Result))) from None
    require_known(set(parsed.cell).union(*(metric.cell for metric in parsed.metrics)), f"{path}: cell")
    origin = {name: value for name, value in parsed.provenance.model_dump().items() if name in COLUMNS}
    common = origin | parsed.cell | {"statistic": "single", "n": 1, "status": parsed.status, "result": path}
    if parsed.status == "ok":
        present = {(metric.metric, metric.window) for metric in parsed.metrics}
        for expected in parsed.expected:
            if (expected.metric, expected.window) not in present:
                number = f"{expected.metric} in window {expected.window}"
                raise MeasurementError(f"{path}: metrics: expected {number} of a run with status 'ok'")
        return [common | _number(metric, common, parsed.provenance.company) for metric in parsed.metrics]
    if parsed.metrics:
        count = len(parsed.metrics)
        raise MeasurementError(f"{path}: metrics: expected none with status {parsed.status!r}, found {count}")
    return [common | _failure(expected, parsed.note) for expected in parsed.expected]


def frame(rows: list[dict], source: str | Path = "table") -> pd.DataFrame:
    """Rows as a table with every column and its type, absent fields empty; raises for an unknown or mistyped column."""
    require_known({name for row in rows for name in row}, source)
    return _typed(pd.DataFrame(rows, columns=list(COLUMNS), dtype=object), source)


def summarise(table: pd.DataFrame) -> pd.DataFrame:
    """The single rows and, for each group of repeats, a row with their median.

    The median's interval is left empty below six repeats: no distribution-free 95 % interval exists there, and the
    note says so. Where any repeat of a cell failed, the cell's summaries have its status and no value: a median over
    the runs that survived would flatter. A column in which the repeats differ is empty.
    """
    single = table[table["statistic"] == "single"].reset_index(drop=True)
    if single.empty:
        return single
    disturbed = single["note"].str.contains(BESIDE, na=False, regex=False)
    notes = single["note"].str.replace(f"(; |^){BESIDE}.*", "", regex=True)
    plain = single.assign(note=notes.mask(notes == ""), disturbed=disturbed)
    grouped = plain.groupby(list(GROUP), dropna=False, sort=False)
    rest = [name for name in COLUMNS if name not in GROUP]
    distinct = grouped[rest].nunique(dropna=False)
    shared = grouped[rest].first().where(distinct == 1).reset_index()
    distinct = distinct.reset_index(drop=True)
    _require_agreement(single)
    failures = _failures(single)
    values, counts = grouped["value"].agg(list), grouped["disturbed"].sum()
    rows = []
    groups = zip(shared.to_dict("records"), distinct.to_dict("records"), values, counts, strict=True)
    for group, differing, numbers, count in groups:
        cell = (group["suite"], group["kind"], group["cell"])
        rows.append(group | _summary(group, differing, numbers, count, failures.get(cell)))
    return pd.concat([single, frame(rows)]).sort_values(list(ORDER), ignore_index=True)


def write(
    table: pd.DataFrame, csv_path: str | Path, parquet_path: str | Path, expected: Mapping[str, int] | None = None
) -> None:
    """Write a valid table in both forms, each file whole or not at all, and their seals, which say which of the
    expected runs are missing (`gaps`); equal tables give equal bytes."""
    validate(table, csv_path)
    ordered = _typed(table[list(COLUMNS)], csv_path).sort_values(list(ORDER), ignore_index=True)
    write_text(Path(csv_path), csv_text(ordered))
    with whole(Path(parquet_path)) as partial:
        ordered.to_parquet(partial, engine="pyarrow", index=False)
    for path in (csv_path, parquet_path):
        seal(Path(path), gaps(table, expected))


def csv_text(table: pd.DataFrame) -> str:
    """The table as CSV, numbers with as many digits as it takes to read the same number back."""
    return table.to_csv(index=False, lineterminator="\n")


def read(path: str | Path) -> pd.DataFrame:
    """A sealed table from its CSV or its Parquet file, the same from either.

    Raises `UserError` where the table was cut or edited, lacks runs that its seal does not say are missing, or has
    summaries that are not those of its runs.
    """
    path = Path(path)
    _require_form(path)
    sealed = require_seal(path)
    table = read_unsealed(path)
    if (missing := gaps(table)) and not sealed.remark:
        raise MeasurementError(f"{path}: expected, as its seal says: no run is missing; found: {missing}")
    _require_own_summaries(table, path)
    require_store(path, table)
    return table


def read_unsealed(path: str | Path) -> pd.DataFrame:
    """A valid table of which nothing says that it is whole."""
    path = Path(path)
    _require_form(path)
    table = read_frame(path, "string")
    require_columns(table.columns, path)
    table = _typed(table, path)
    validate(table, path)
    return table


def _require_form(path: Path) -> None:
    if path.suffix not in (".csv", ".parquet"):
        raise MeasurementError(f"{path}: expected a file that ends in .csv or .parquet")
    if not path.is_file():
        raise MeasurementError(f"{path}: no such file")


def gaps(table: pd.DataFrame, expected: Mapping[str, int] | None = None) -> str:
    """The runs that a table lacks, in a line; empty if it has all.

    Each cell must have a number, or a row that says why there is none, in each repeat in which any cell of its suite
    and kind has one of that metric, but for what a run costs besides time. A run that failed has only the rows that it
    was expected to have. expected: the repeats of each cell of the suite, by name, where that is known.
    """
    runs = table[(table["statistic"] == "single") & table["repeat"].notna() & ~table["metric"].isin(COSTS)]
    metric, run = ["suite", "kind", "metric", "window"], ["suite", "cell", "repeat"]
    repeats = runs.groupby(metric)["repeat"].agg(set)
    numbers = runs.groupby([*metric, "cell", "implementation", "pass"], dropna=False)["repeat"].agg(set)
    failed = set(runs.loc[runs["status"] != "ok", run].itertuples(index=False, name=None))
    missing = {
        (cell, repeat)
        for (suite, kind, *number, cell, _, _), present in numbers.items()
        for repeat in repeats[suite, kind, *number] - present
        if (suite, cell, repeat) not in failed
    }
    wanted = {(name, repeat) for name, count in (expected or {}).items() for repeat in range(1, count + 1)}
    missing = sorted(missing | (wanted - set(runs[["cell", "repeat"]].itertuples(index=False, name=None))))
    if not missing:
        return ""
    (name, repeat), count = missing[0], len(missing)
    runs_are = "1 run of a cell is" if count == 1 else f"{count} runs of cells are"
    return f"{runs_are} missing, first repeat {repeat} of {name!r}"


def write_json_schema(path: str | Path) -> None:
    """Write the JSON Schema (draft 2020-12) of a row, an empty field being null."""
    write_text(Path(path), json.dumps(json_schema(), indent=1) + "\n")


def _number(metric: ResultMetric, common: dict, company: str) -> dict:
    row = metric.model_dump(exclude={"cell"}) | metric.cell
    row["implementation"] = metric.implementation or common.get("implementation")
    row["note"] = _one_line("; ".join(filter(None, [metric.note, company])))
    return row


def _failure(expected: ExpectedMetric, note: str) -> dict:
    vocabulary = METRICS[expected.metric]
    row = expected.model_dump() | {"unit": vocabulary.unit, "direction": vocabulary.direction}
    return row | {"value": None, "note": _one_line(note)}


def _one_line(text: str | None) -> str | None:
    return " ".join((text or "").split()) or None


def _failures(single: pd.DataFrame) -> dict[tuple, dict]:
    """For each cell of which a repeat failed: the worst status and a note."""
    out = {}
    for cell, rows in single.groupby(["suite", "kind", "cell"], sort=False):
        failed = rows[rows["status"] != "ok"]
        if not failed.empty:
            worst = failed.loc[failed["status"].map(STATUSES.index).idxmax()]
            runs, bad = (frame["repeat"].nunique(dropna=False) for frame in (rows, failed))
            reason = "" if pd.isna(worst["note"]) else f": {worst['note']}"
            note = f"{bad} of {runs} repeats failed ({worst['status']}{reason})"
            out[cell] = {"status": worst["status"], "n": runs, "note": note}
    return out


def _summary(group: dict, distinct: dict, values: list[float], disturbed: int, failure: dict | None) -> dict:
    """What the summary row of a group says itself, the rest being what its repeats share. disturbed: how many of them
    ran beside others."""
    row = {"statistic": "median", "repeat": None, "ci_low": None, "ci_high": None}
    if failure:
        return row | failure | {"value": None}
    row |= {"status": "ok", "n": len(values), "value": median(values)}
    notes = [] if pd.isna(group["note"]) else [group["note"]]
    if bounds := interval(values):
        row["ci_low"], row["ci_high"] = bounds
    elif len(values) > 1:
        notes.append(f"no 95 % interval from {len(values)} repeats, it takes {fewest()}")
    if mixed := [name for name in SHOULD_AGREE if distinct[name] > 1]:
        notes.append(f"repeats differ in {', '.join(mixed)}")
    if disturbed:
        notes.append(f"{disturbed} of {len(values)} repeats ran beside others")
    return row | {"note": "; ".join(notes) or None}


def _require_agreement(single: pd.DataFrame) -> None:
    hashes = single.groupby(list(GROUP), dropna=False, sort=False)[list(MUST_AGREE)].nunique().reset_index()
    for name in MUST_AGREE:
        bad = hashes[name] > 1
        if bad.any():
            cell = hashes["cell"][bad.idxmax()]
            raise MeasurementError(f"cell {cell!r}: its repeats differ in {name}; delete those of the older settings")


def _require_own_summaries(table: pd.DataFrame, source: Path) -> None:
    """Raise where a summary is not that of the single rows, or either is without the other. Tables of summaries alone
    have nothing to compare with."""
    single = table["statistic"] == "single"
    if not single.any():
        return
    columns = ["status", "n", "value", "ci_low", "ci_high"]
    written, computed = (
        rows[rows["statistic"] != "single"].set_index(list(KEY))[columns] for rows in (table, summarise(table))
    )
    if len(written) and not written.sort_index().equals(computed.sort_index()):
        differing = written.index.symmetric_difference(computed.index)
        if differing.empty:
            aligned = computed.reindex(written.index)
            same = (written == aligned).fillna(False) | (written.isna() & aligned.isna())
            differing = written.index[~same.all(axis=1).to_numpy()]
        place = dict(zip(KEY, differing[0], strict=True))
        what = f"{place['statistic']} of {place['metric']} of cell {place['cell']!r}"
        raise MeasurementError(f"{source}: the {what} is not that of its single rows; gather the table again")


def _typed(table: pd.DataFrame, source: str | Path) -> pd.DataFrame:
    """The table with each column in its type and, in text columns, empty text as an empty field."""
    columns = {}
    for name, column in COLUMNS.items():
        values = table[name]
        if column.dtype == "boolean":
            values = values.astype(object).map(lambda value: BOOLEANS.get(value, value))
        try:
            columns[name] = values.astype(column.dtype)
        except (TypeError, ValueError, OverflowError):
            bad = next(value for value in values if not _fits(value, column.dtype))
            raise MeasurementError(f"{source}: {name}: expected {TYPE_NAMES[column.dtype]}, found {bad!r}") from None
        if column.dtype == "string":
            columns[name] = columns[name].replace("", pd.NA)
    return pd.DataFrame(columns)


def _fits(value: Any, dtype: str) -> bool:
    try:
        pd.Series([value], dtype=object).astype(dtype)
    except (TypeError, ValueError, OverflowError):
        return False
    return True
