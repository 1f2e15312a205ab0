"""The seal of a table: a file beside it with its hash and its number of rows, so that one that was cut or edited shows.

A seal is what `sha256sum` writes, with the number of rows as a comment: `sha256sum -c NAME.csv.sha256` compares the two
without this project. Whatever draws, publishes or prints a table reads it through its seal. A JSON file, as of a run or
a verdict, has its seal in itself. Seals show accidents and careless edits; whoever means to forge can seal again.
"""

import csv
import hashlib
import io
import json
import re
from pathlib import Path
from typing import NamedTuple

from lorafusion.core.files import read_bytes, write
from lorafusion.core.schema import UserError
from lorafusion.core.workload import content_hash

SUFFIX = ".sha256"
FORM = re.compile(r"# (\d+) rows(?:; (.+))?\n([0-9a-f]{64})  (.+)\n")


class Seal(NamedTuple):
    """What a table had when it was sealed. remark: what its readers must know, as that runs are missing; or empty."""

    rows: int
    digest: str
    remark: str = ""


def seal_path(path: Path) -> Path:
    return path.with_name(path.name + SUFFIX)


def seal(path: Path, remark: str = "") -> Seal:
    """Seal a file that was just written whole: a CSV, or another table, whose rows are then not counted."""
    sealed = Seal(_rows(path), _digest(path), remark)
    comment = f"# {sealed.rows} rows" + (f"; {remark}" if remark else "")
    write(seal_path(path), f"{comment}\n{sealed.digest}  {path.name}\n")
    return sealed


def require_seal(path: Path) -> Seal:
    """The seal of a file; raises `UserError` where there is none, or where the file is not what was sealed."""
    sidecar = seal_path(path)
    if not sidecar.is_file():
        raise UserError(f"{path}: expected its seal {sidecar.name} beside it, as what wrote it makes one; found none")
    parsed = FORM.fullmatch(read_bytes(sidecar, "seal").decode(errors="replace"))
    if parsed is None or parsed[4] != path.name:
        raise UserError(
            f"{sidecar}: expected the number of rows, a SHA-256 and the name {path.name}, found another text"
        )
    sealed = Seal(int(parsed[1]), parsed[3], parsed[2] or "")
    if sealed.digest != _digest(path):
        rows = _rows(path)
        what = f"{rows} rows" if rows != sealed.rows else "other content"
        raise UserError(
            f"{path}: cut or edited since it was written: expected {sealed.rows} rows as in {sidecar.name}, "
            f"found {what}; write it again"
        )
    return sealed


def sealed(data: dict) -> dict:
    """The content of a JSON file with the key `seal`, a hash of all the rest."""
    rest = {key: value for key, value in json.loads(json.dumps(data)).items() if key != "seal"}
    return rest | {"seal": content_hash(rest)}


def require_own_seal(data: dict, source: str | Path) -> None:
    """Raise `UserError` unless the content of a JSON file is what it was sealed with."""
    stored, expected = data.get("seal"), sealed(data)["seal"]
    if stored != expected:
        raise UserError(f"{source}: seal: found {stored}, expected {expected}; it was changed since, make it again")


def _digest(path: Path) -> str:
    return hashlib.sha256(read_bytes(path, "table")).hexdigest()


def _rows(path: Path) -> int:
    """The records of a CSV without its header, the last one also where it was cut; 0 for another file."""
    if path.suffix != ".csv":
        return 0
    text = read_bytes(path, "table").decode(errors="replace")
    try:
        return max(0, sum(1 for _ in csv.reader(io.StringIO(text, newline=""))) - 1)
    except csv.Error:  # a field that is longer than any of a table
        return text.count("\n")
