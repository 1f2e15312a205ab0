"""Result files gathered in a measurement table, with its store of results, its schema and its page."""

from collections.abc import Sequence
from pathlib import Path

from lorafusion.core.files import write
from lorafusion.core.schema import UserError, one_of
from lorafusion.lab.experiments import EXPERIMENTS
from lorafusion.lab.keys import part_of, require, require_one_workload, suite_files

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
    expected = {name: files.repeats for name, files in suite_files(suite).items()} if suite else {}
    missing = table.gaps(frame, expected)
    if missing and not incomplete:
        raise UserError(f"{folder}: {missing}; give their result files too, or --incomplete")
    csv = folder / "measurements.csv"
    table.write(frame, csv, csv.with_suffix(".parquet"), expected)
    write_store(csv, contents)
    table.write_json_schema(csv.with_suffix(".schema.json"))
    write(csv.with_suffix(".html"), measurements_page(frame))
    return f"{csv}: {len(frame)} rows from {len(contents)} runs"


def require_results(contents: dict[str, dict], suite_path: Path | None) -> None:
    """Raise `UserError` unless results may stand in one table: what trains one workload trained the same, a bench is
    as configs/ has it now, and with a suite each result is of a cell as the suite has it now. contents: of result
    files, by name."""
    files = suite_files(suite_path) if suite_path else {}
    trained = []
    for path, result in contents.items():
        cell, origin = part_of(result, "cell", path), part_of(result, "provenance", path)
        name, bench = str(cell.get("cell")), origin.get("bench")
        if suite_path:
            if name not in files:
                raise UserError(f"{path}: cell: found {name}, which {suite_path} does not have")
            files[name].require_result(path, result)
        if bench:
            require(path, [("config_hash", origin.get("config_hash"), _bench_hash(path, bench))])
        if "/system~" in name:
            trained.append((path, str(cell.get("suite")), name, origin.get("workload_hash")))
    require_one_workload(trained)


def _bench_hash(path: str, bench: list[str]) -> str:
    """The hash of a bench's configuration, as the file of configs/ for its kind has it now."""
    experiment, suite, name = bench
    one_of("bench", experiment, set(EXPERIMENTS), path)
    for point in EXPERIMENTS[experiment].points(suite):
        if point.name == name:
            return EXPERIMENTS[experiment].key(point)
    raise UserError(f"{path}: bench: found {name}, which suite {suite} does not have now")
