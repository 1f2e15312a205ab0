"""The end of a run in the terminal: who was how fast, what failed and where to look."""

from pathlib import Path

import pandas as pd
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lorafusion.lab.report import style
from lorafusion.lab.report.throughput import ablations, merged_qkv
from lorafusion.lab.table.result import BESIDE

ROW = ["suite", "model", "workload", "kind", "gpus", "global_batch"]
HEADINGS = {"suite": "suite", "model": "model", "workload": "workload", "kind": "kind", "global_batch": "batch"}
NUMBERS = ("gpus", "global_batch")
MOST_COLUMNS = 5  # systems beside each other
FROZEN = "frozen"  # the model without adapters, as a system


def print_summary(table: pd.DataFrame, report_path: str | Path, console: Console | None = None) -> None:
    """Print the median throughputs (tokens/s, whole window), the failed cells and the path of the report.

    table: with the summary rows of `lorafusion.lab.table.table.summarise`.
    """
    console = console or Console()
    medians = table[(table["statistic"] == "median") & table["metric"].isin(["throughput", "frozen_throughput"])]
    # Ablations are for their figure, as are cells with merged q, k and v, which are others of the same name here.
    compared = ~medians["system"].isin(ablations()) & ~merged_qkv(medians)
    whole = medians[(medians["window"] == "whole") & compared]
    whole = whole.assign(system=whole["system"].mask(whole["metric"] == "frozen_throughput", FROZEN))
    if whole.empty:
        console.print("no throughput in the table")
    else:
        _print_throughputs(whole, console)
    _print_failures(table, console)
    _print_disturbed(table, console)
    _print_line(console, f"report: {report_path}")


def _print_throughputs(whole: pd.DataFrame, console: Console) -> None:
    """A row a workload and number of processes and a column a system, or the other way round where there are more
    systems; what is the same everywhere is in the title."""
    measured = whole[whole["kind"] == "measured"]
    cpu = not measured.empty and measured["gpu_name"].isna().all()
    names = [name for name in ROW if name in ("workload", "gpus") or whole[name].nunique(dropna=False) > 1]
    systems = list(style.looks(whole["system"]))
    rows = list(whole.sort_values(names, key=style.rank).groupby(names, dropna=False, sort=False))
    headings = [HEADINGS.get(name, "processes" if cpu else "GPUs") for name in names]
    out = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    if len(systems) <= MOST_COLUMNS:
        for name, heading in zip(names, headings, strict=True):
            out.add_column(heading, justify="right" if name in NUMBERS else "left", overflow="fold")
        for system in systems:
            # A break after a hyphen keeps five systems within 80 columns.
            out.add_column(system.replace("-", "-\n"), justify="right", overflow="fold")
        for row, cells in rows:
            out.add_row(*map(_text, row), *_entries(cells, systems))
    else:
        out.add_column(f"system; {', '.join(headings)} \u2192", overflow="fold")
        for row, _ in rows:
            out.add_column("\n".join(map(_text, row)), justify="right", overflow="fold")
        columns = [_entries(cells, systems) for _, cells in rows]
        for index, system in enumerate(systems):
            out.add_row(system, *(column[index] for column in columns))
    shared = [str(whole[name].iloc[0]) for name in ("suite", "model") if name not in names]
    warning = f" ({style.CPU_WARNING})" if cpu else ""
    _print_line(console, f"{', '.join(shared)}: tokens/s, whole run, median{warning}".removeprefix(": "))
    console.print(out)


def _text(part: object) -> str:
    return "" if pd.isna(part) else str(part)


def _entries(cells: pd.DataFrame, systems: list[str]) -> list[Text]:
    """Each system's number in one group of cells, the best that trains bold; empty where it is none of them."""
    entries = cells.set_index("system")
    best = entries["value"].drop(FROZEN, errors="ignore").max()
    return [_entry(entries.loc[system], best) if system in entries.index else Text("") for system in systems]


def _entry(row: pd.Series, best: float) -> Text:
    if row["status"] != "ok":
        return Text(style.status_label(row["status"]), style="red")
    return Text(f"{row['value']:,.0f}", style="bold" if row["value"] == best else "")


def _print_failures(table: pd.DataFrame, console: Console) -> None:
    """One line a failed cell: what its first failed run said, and the files that say more."""
    runs = table[table["statistic"] == "single"].drop_duplicates(["suite", "kind", "cell", "repeat"])
    cells = list(runs[runs["status"] != "ok"].groupby(["suite", "kind", "cell"], sort=False))
    if cells:
        _print_line(console, f"{len(cells)} failed cell{'s' * (len(cells) > 1)}:")
    for _, failed in cells:
        first = failed.iloc[0]
        every = (runs["cell"] == first["cell"]) & (runs["kind"] == first["kind"])
        note = "" if pd.isna(first["note"]) else f": {first['note']}"
        share = f"{len(failed)} of {every.sum()} repeats"
        _print_line(console, f"- {first['cell']}: {style.status_label(first['status'])} in {share}{note}")
        for name in ("result", "log"):
            if not pd.isna(first[name]):
                _print_line(console, f"  {name}: {first[name]}")


def _print_disturbed(table: pd.DataFrame, console: Console) -> None:
    """Whose clocks others may have disturbed."""
    runs = table[table["statistic"] == "single"].drop_duplicates(["kind", "cell", "repeat"])
    disturbed = runs[runs["note"].str.contains(BESIDE, na=False, regex=False)]
    if not disturbed.empty:
        cell, note = disturbed.iloc[0][["cell", "note"]]
        example = f"as {cell}, {note[note.index(BESIDE) :]}"
        _print_line(console, f"{len(disturbed)} of {len(runs)} runs were measured beside others, {example}")


def _print_line(console: Console, text: str) -> None:
    """Print text as it is: a path that is wrapped or marked up cannot be copied."""
    console.print(text, soft_wrap=True, markup=False, highlight=False)
