"""Pages of the report: the measurements with where each comes from, and the checks."""

from html import escape
from pathlib import Path

import pandas as pd

from lorafusion.lab.checks.verdicts import read_verdict
from lorafusion.lab.table.vocabulary import IDENTITY

STYLE = """
body { font: 14px/1.4 system-ui, sans-serif; margin: 1rem; color: #1a1a1a; overflow-wrap: anywhere; }
h1 { font-size: 1.3rem; } h2 { font-size: 1.05rem; margin-top: 1.6rem; }
.table { overflow: auto; max-height: 80vh; max-width: 100%; }
table { border-collapse: collapse; overflow-wrap: normal; }
th, td { padding: .25rem .6rem; border-bottom: 1px solid #ddd; text-align: left; vertical-align: top; }
th { position: sticky; top: 0; background: #f4f4f4; white-space: nowrap; }
td.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
td.code { min-width: 14rem; } td.note { min-width: 12rem; }
code { font-size: 12px; overflow-wrap: anywhere; } .ok { color: #0a6b2d; } .failed { color: #b3261e; font-weight: 600; }
"""
# What tells the rows of a table apart, and what they say.
KEY_COLUMNS = [*IDENTITY, "implementation", "pass"]
NUMBER_COLUMNS = ["metric", "window", "value", "unit", "ci_low", "ci_high", "n", "status", "note"]
RUN_COLUMNS = ["repeat", "metric", "window", "value", "unit", "status", "note"]
ORIGIN_COLUMNS = ["cell", "repeat", "status", "result", "log", "command", "git_sha", "started_at"]
CODE_COLUMNS = {"cell", "result", "log", "command", "git_sha"}


def measurements_page(table: pd.DataFrame) -> str:
    """Medians, single runs, and for each run its result file, log, command and commit."""
    single = table["statistic"] == "single"
    shared = [name for name in KEY_COLUMNS if table[name].nunique(dropna=False) == 1]
    constants = "; ".join(f"{name}: {escape(str(table[name].iloc[0]))}" for name in shared if table[name].notna().any())
    key = [name for name in KEY_COLUMNS if name not in shared]
    origins = table[single][ORIGIN_COLUMNS].drop_duplicates(["cell", "repeat"])
    return page(
        "Measurements",
        f"<p>In every row: {constants}.</p>" if constants else "",
        "<h2>Medians over the fresh processes of a cell</h2>",
        _table(table[~single][[*key, *NUMBER_COLUMNS]]),
        "<h2>Single runs</h2>",
        _table(table[single][[*key, *RUN_COLUMNS]]),
        "<h2>Where the numbers of a run come from</h2>",
        _table(origins),
    )


def checks_page(paths: list[Path]) -> str:
    """The verdicts of the checks with their figures."""
    parts = []
    for path in paths:
        verdict = read_verdict(path)
        state = "<span class='ok'>passed</span>" if verdict.passed else "<span class='failed'>FAILED</span>"
        parts.append(f"<h2>{escape(verdict.check)}: {state}</h2><p>{escape(verdict.statement)}.</p>")
        rows = [(name, float(value), verdict.limits.get(name)) for name, value in verdict.figures.items()]
        parts.append(_table(pd.DataFrame(rows, columns=["figure", "value", "at most"])))
        parts.append(f"<p><code>{escape(str(path))}</code></p>")
    return page("Checks", *parts)


def page(title: str, *parts: str) -> str:
    body = "\n".join(parts)
    return (
        f"<!doctype html><html lang='en'><head><meta charset='utf-8'><title>{title}</title>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<style>{STYLE}</style></head><body><h1>{title}</h1>\n{body}\n</body></html>\n"
    )


def _table(frame: pd.DataFrame) -> str:
    """A frame as HTML, without the columns that are empty throughout."""
    frame = frame.dropna(axis="columns", how="all")
    head = "".join(f"<th>{escape(column)}</th>" for column in frame.columns)
    rows = [
        "<tr>" + "".join(_cell(column, value) for column, value in zip(frame.columns, row, strict=True)) + "</tr>"
        for row in frame.itertuples(index=False, name=None)
    ]
    body = f"<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody>"
    return f"<div class='table'><table>{body}</table></div>"  # a wide table scrolls, and the page does not


def _cell(column: str, value: object) -> str:
    if pd.isna(value):
        return "<td></td>"
    if isinstance(value, float):
        return f"<td class='number'>{value:,.4g}</td>" if abs(value) < 1e4 else f"<td class='number'>{value:,.0f}</td>"
    text = escape(str(value))
    if column in CODE_COLUMNS:
        return f"<td class='code'><code>{text}</code></td>"
    return f"<td class='note'>{text}</td>" if column == "note" else f"<td>{text}</td>"
