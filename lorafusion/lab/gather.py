"""Result files gathered in a measurement table, with its store of results, its schema and its page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lorafusion.core.files import write
from lorafusion.core.schema import UserError
from lorafusion.lab.keys import require_results
from lorafusion.lab.suite import runs_of

# Of what `gather` writes, after the name `measurements`: the table in two forms, their seals, and what goes with it.
TABLE_SUFFIXES = (".csv", ".parquet", ".csv.sha256", ".parquet.sha256", ".results.jsonl.gz", ".schema.json", ".html")


def gather(folder: Path, results: Sequence[Path], suite: Path | None = None, incomplete: bool = False) -> str:
    """Write the table of some result files or stores of them (.results.jsonl.gz) to a folder, validated and sealed;
    returns a line about it.

    suite: a file of configs/suites; results of other cells or settings than its are refused. incomplete: also where
    runs are missing; the table's seal then says so.
    """
    from lorafusion.lab.report.pages import measurements_page
    from lorafusion.lab.table import table
    from lorafusion.lab.table.store import write_store

    contents = table.read_contents(list(results))
    require_results(contents, suite)
    frame = table.summarise(table.table_of(contents))
    table.validate(frame)
    expected = runs_of(suite) if suite else {}
    missing = table.gaps(frame, expected)
    if missing and not incomplete:
        raise UserError(f"{folder}: {missing}; give their result files too, or --incomplete")
    csv = folder / "measurements.csv"
    table.write(frame, csv, csv.with_suffix(".parquet"), expected)
    write_store(csv, contents)
    table.write_json_schema(csv.with_suffix(".schema.json"))
    write(csv.with_suffix(".html"), measurements_page(frame))
    return f"{csv}: {len(frame)} rows from {len(contents)} runs"
