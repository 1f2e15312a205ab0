"""The measurement table on wandb: a run for each cell and one that compares them, offline unless the user asks.

The table is the store and wandb a view of it: runs are made from the finished table, never by the measured process.
Offline runs are sent later with `wandb sync DIRECTORY/wandb/offline-run-*`. The folder must then still be where it
was written, as wandb keeps the absolute paths of the tables in it.
"""

import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import zip_longest
from pathlib import Path
from typing import Any

import pandas as pd

from lorafusion.core.schema import UserError, one_of
from lorafusion.core.wandb_runs import private_wandb
from lorafusion.lab.report.published import replaced, write_manifest
from lorafusion.lab.table.table import csv_text
from lorafusion.lab.table.vocabulary import COLUMNS

MANIFEST = "runs.json"
MODES = {"offline", "online"}
CELL = ["suite", "kind", "cell"]
# Columns that tell the numbers of a cell apart; the others describe the cell or its repeats.
OF_A_NUMBER = {
    "metric",
    "value",
    "unit",
    "direction",
    "statistic",
    "n",
    "ci_low",
    "ci_high",
    "window",
    "status",
    "note",
}
MOST_ROWS = 10_000  # of a wandb table, which drops those above


@dataclass(frozen=True)
class CellRuns:
    """A cell as it is published: its rows of the table, its repeats' result files, and the settings of its run."""

    singles: pd.DataFrame
    medians: pd.DataFrame
    results: list[dict]
    sweep: str

    @property
    def name(self) -> str:
        return self.singles["cell"].iloc[0]

    @property
    def status(self) -> str:
        failed = self.medians["status"][self.medians["status"] != "ok"]
        return "ok" if failed.empty else failed.iloc[0]

    @property
    def implementation(self) -> str | None:
        """Of the cell itself; some of its numbers, such as canaries, have names of their own in that column."""
        if self.results:
            return self.results[0]["cell"].get("implementation")
        return _plain(self.singles["implementation"].iloc[0])

    @property
    def config(self) -> dict[str, Any]:
        """The flat columns of the cell and all of its provenance; a list by repeat where the repeats differ."""
        runs = self.singles.drop_duplicates("repeat")
        columns = [name for name in COLUMNS if name not in OF_A_NUMBER]
        values = {name: [_plain(value) for value in runs[name]] for name in columns}
        for name in {name for result in self.results for name in result["provenance"]} - set(COLUMNS):
            values[name] = [result["provenance"].get(name) for result in self.results]
        agreed = {name: _agreed(entries) for name, entries in sorted(values.items())}
        agreed |= {"implementation": self.implementation, "sweep": self.sweep}
        return {name: value for name, value in agreed.items() if value is not None}

    @property
    def settings(self) -> dict[str, Any]:
        """What `wandb.init` is told."""
        kind = self.singles["kind"].iloc[0]
        return {
            "id": _digest(self.sweep, *self.singles[CELL].iloc[0]),
            "name": self.name,
            "group": self.sweep,
            "job_type": "end_to_end",
            "tags": [kind, self.status],
            "config": self.config,
        }

    def key(self, row: dict) -> str:
        """The name of a number: metric/window, and the implementation where it is not the cell's."""
        other = "" if _plain(row["implementation"]) == self.implementation else f"/{row['implementation']}"
        return f"{row['metric']}/{row['window']}{other}"

    @property
    def history(self) -> Iterator[dict[str, Any]]:
        """For each repeat a line with its numbers, then a line for each global batch with the adapters' losses."""
        losses = {result["cell"].get("repeat"): result["losses"] for result in self.results}
        for repeat, rows in self.singles.groupby("repeat", dropna=False):
            ok = rows[rows["status"] == "ok"].to_dict("records")
            line = {"repeat": _plain(repeat), "status": rows["status"].iloc[0]}
            yield line | {f"repeats/{self.key(row)}": row["value"] for row in ok}
            curves = losses.get(repeat, {})
            for batch, values in enumerate(zip_longest(*curves.values()), 1):
                points = zip(curves, values, strict=True)
                row = {f"loss/{name}/repeat-{repeat}": value for name, value in points if value is not None}
                yield {"global_batch": batch} | row

    @property
    def summary(self) -> dict[str, Any]:
        """The medians and their intervals, or the status and the note of a cell that failed."""
        out = {"status": self.status, "repeats": int(self.medians["n"].max())}
        for row in self.medians.to_dict("records"):
            key = self.key(row)
            named = {key: row["value"], f"{key}/ci_low": row["ci_low"], f"{key}/ci_high": row["ci_high"]}
            out |= {name: value for name, value in named.items() if not pd.isna(value)}
        if self.status != "ok":
            out["note"] = _plain(self.medians["note"].iloc[0])
        return out


def publish(
    table: pd.DataFrame,
    results: list[dict],
    figures: list[Path],
    directory: str | Path,
    mode: str = "offline",
    project: str = "lorafusion",
    entity: str | None = None,
) -> list[str]:
    """Publish a table anew into `directory` and return the ids of the runs: the cells in order, then the comparison.

    table: with the summary rows of `lorafusion.lab.table.table.summarise`.
    results: the content of the runs' result files, for their losses and all of their provenance.
    figures: PNG files. directory: new, empty, or one that holds an earlier publication just as it was written, which
    this one replaces once it is whole; wandb writes nowhere else.
    mode: "offline" writes files only; "online" sends them too, with the key of WANDB_API_KEY or ~/.netrc, to the
    server of WANDB_BASE_URL.
    A run's id is made from the table and the cell, so that publishing a table twice replaces and does not double.
    Raises `UserError` for a mode, a figure or a folder that will not do, and where an online run cannot be sent; then
    the directory is as it was.
    """
    one_of("mode", mode, MODES, "wandb")
    if find_spec("wandb") is None:
        raise UserError("publish: wandb is not installed; `pip install 'lorafusion[wandb]'`")
    _require_runs(table)
    images = _images(figures)
    sweep = _digest(csv_text(table))
    with replaced(Path(directory).resolve(), MANIFEST) as folder:
        runs = {}
        with private_wandb(folder, mode) as start:
            for cell in _cells(table, results, sweep):
                run = start(project=project, entity=entity, **cell.settings)
                _log_cell(run, cell)
                entry = {"cell": cell.name, "status": cell.status, "job_type": "end_to_end"}
                runs[run.id] = entry | {"folder": _folder_of(run, folder)}
                run.finish(exit_code=0 if cell.status == "ok" else 1)
            run = start(project=project, entity=entity, **_comparison(table, sweep))
            _log_comparison(run, table, images)
            runs[run.id] = {"job_type": "compare", "folder": _folder_of(run, folder)}
            run.finish()
        head = {"sweep": sweep, "mode": mode, "project": project, "entity": entity}
        write_manifest(folder, MANIFEST, head | {"runs": runs})
    return list(runs)


def _require_runs(table: pd.DataFrame) -> None:
    """Raise `UserError` unless there is a row of a run for each cell: of summaries alone nothing can be shown."""
    runs = table[table["statistic"] == "single"]
    measured, named = (set(rows[CELL].itertuples(index=False, name=None)) for rows in (runs, table))
    if runs.empty or named - measured:
        lonely = sorted(map(str, named - measured)) or ["any cell"]
        raise UserError(f"publish: the table: expected rows of the runs of each cell, found none of {lonely[0]}")


def _cells(table: pd.DataFrame, results: list[dict], sweep: str) -> Iterator[CellRuns]:
    measured = set(table.loc[table["kind"] == "measured", "cell"])
    table = table[(table["kind"] != "simulated") | ~table["cell"].isin(measured)]  # a prediction is no run
    for key, rows in table.groupby(CELL, sort=True):
        cell_results = [result for result in results if tuple(result["cell"][name] for name in CELL) == key]
        cell_results.sort(key=lambda result: result["cell"].get("repeat") or 0)
        single = rows["statistic"] == "single"
        yield CellRuns(rows[single].sort_values("repeat"), rows[~single], cell_results, sweep)


def _log_cell(run: Any, cell: CellRuns) -> None:
    for name in ("repeat", "status", "global_batch"):
        run.define_metric(name, summary="none")
    # Without summaries of their own, as the last repeat is not the cell's result.
    run.define_metric("repeats/*", step_metric="repeat", summary="none")
    run.define_metric("loss/*", step_metric="global_batch", summary="none")
    for line in cell.history:
        run.log(line)
    run.summary.update(cell.summary)


def _comparison(table: pd.DataFrame, sweep: str) -> dict[str, Any]:
    suites = sorted(table["suite"].unique())
    medians = table[table["statistic"] == "median"].drop_duplicates(CELL)
    return {
        "id": _digest(sweep, "compare"),
        "name": f"{', '.join(suites)}: comparison",
        "group": sweep,
        "job_type": "compare",
        "tags": ["compare"],
        "config": {"suite": _agreed(suites), "sweep": sweep, "cells": dict(Counter(medians["status"]))},
    }


def _log_comparison(run: Any, table: pd.DataFrame, images: dict[str, Path]) -> None:
    """The whole table, medians and single rows apart, and the figures, in one line of history."""
    import wandb

    single = table["statistic"] == "single"
    line = {}
    for name, rows in (("medians", table[~single]), ("repeats", table[single])):
        data = [[_plain(value) for value in row] for row in rows.itertuples(index=False, name=None)]
        for part, start in enumerate(range(0, len(data), MOST_ROWS)):
            key = f"table/{name}" + (f"-{part + 1}" if part else "")
            line[key] = wandb.Table(columns=list(rows.columns), data=data[start : start + MOST_ROWS])
    line |= {f"figures/{name}": wandb.Image(str(path)) for name, path in images.items()}
    run.log(line)


def _images(figures: list[Path]) -> dict[str, Path]:
    """Figures by name."""
    out: dict[str, Path] = {}
    for path in map(Path, figures):
        if path.suffix != ".png" or not _is_picture(path):
            raise UserError(f"{path}: expected a PNG file")
        if path.stem in out:
            raise UserError(f"{path}: another figure has this name")
        out[path.stem] = path
    return out


def _is_picture(path: Path) -> bool:
    from PIL import Image

    try:
        with Image.open(path) as image:
            image.load()
            return image.format == "PNG"
    except (OSError, SyntaxError):  # Pillow raises the latter for a file that is cut
        return False


def _folder_of(run: Any, folder: Path) -> str:
    return str(Path(run.dir).parent.relative_to(folder))


def _digest(*parts: str) -> str:
    return hashlib.sha1("\n".join(parts).encode()).hexdigest()[:16]


def _agreed(values: list[Any]) -> Any:
    """The value if all are the same, else all."""
    return values[0] if all(value == values[0] for value in values) else values


def _plain(value: Any) -> Any:
    """A field of the table as JSON has it, an empty one as None."""
    if pd.isna(value):
        return None
    return value.item() if hasattr(value, "item") else value
