"""Writes docs/reference/planted-errors.md, every planted error and its tests: `python -m tests.planted.table`."""

from __future__ import annotations

from collections.abc import Iterable

from tests.planted.plant import ROOT, Planted, every_error

DOCUMENT = ROOT / "docs" / "reference" / "planted-errors.md"
HEAD = """# Planted errors

Each line is an error that the tests put into the code on purpose, by replacing one symbol when its module is imported.
The tests in the last column fail on it. `make planted` tries all of them, `make test` a sample; those marked "GPU" need
one: [their log](../../results/reference/nvidia-h200/planted_errors.log).

To add an error, write a function in a file of `tests/planted/`, run its line with `make planted ARGS="-k NAME"`, and
write this page anew with `make planted-table`.
"""


def document(errors: Iterable[Planted]) -> str:
    """The page as Markdown."""
    lines, area = [HEAD], ""
    count = 0
    for error in errors:
        count += 1
        if error.name.partition(".")[0] != area:
            area = error.name.partition(".")[0]
            lines += ["", f"## {area}", "", "| error | what is replaced | noticed by |", "|---|---|---|"]
        tests = "<br>".join(f"`{test}`" for test in error.caught_by)
        lines.append(f"| {error.statement}{' (GPU)' if error.gpu else ''} | `{error.symbol}` | {tests} |")
    lines += ["", f"{count} errors."]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    DOCUMENT.write_text(document(every_error().values()))
