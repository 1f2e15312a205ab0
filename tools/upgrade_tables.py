"""Give tables of an older version the columns and the seals of this one. No number changes.

    python tools/upgrade_tables.py results/reference/*/*.csv

A measurement table gets the columns that it lacks, from the names of its cells, and its seal. Another CSV, which a
figure was drawn from, gets a seal alone. What is sealed already stays as it is, and has to be what was sealed.
"""

from __future__ import annotations

import sys
from pathlib import Path

from lorafusion.core.files import write
from lorafusion.core.schema import UserError
from lorafusion.core.seals import require_seal, seal, seal_path
from lorafusion.lab.table.table import csv_text, gaps, read_unsealed


def upgrade(path: Path) -> str:
    """Upgrade a file in place; returns what was done. Raises `UserError` for a table that is none."""
    if seal_path(path).exists():
        require_seal(path)
        return "sealed already"
    header = path.read_text().partition("\n")[0].split(",")
    if not {"cell", "statistic"} <= set(header):
        return f"sealed, {seal(path).rows} rows"
    table = read_unsealed(path)
    added = [name for name in table.columns if name not in header and table[name].notna().any()]
    if added:
        write(path, csv_text(table))
    if not read_unsealed(path).equals(table):
        raise UserError(f"{path}: is not the same when it is read again")
    sealed = seal(path, gaps(table))
    return (
        f"sealed, {sealed.rows} rows; filled: {', '.join(added) or 'no column'}; {sealed.remark or 'no run is missing'}"
    )


if __name__ == "__main__":
    for name in sys.argv[1:]:
        print(f"{name}: {upgrade(Path(name))}")
