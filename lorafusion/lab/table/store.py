"""The result files behind a table, kept beside it in one compressed file: their losses, their provenance, all of it.

`TABLE.results.jsonl.gz` holds one JSON object a line: first the table's name and hash, then each result file under the
name that the table's column `result` has for it. `lorafusion lab measure SUITE TABLE STORE --out FOLDER` makes the same
table again, to the last byte. Equal results give equal bytes.
"""

import gzip
import hashlib
import io
import json
import zlib
from pathlib import Path

import pandas as pd

from lorafusion.core.files import MOST_JSON, parse_json, read_bytes, whole
from lorafusion.core.schema import UserError

SUFFIX = ".results.jsonl.gz"


def store_path(table: str | Path) -> Path:
    """Where the results behind a table lie, if they do."""
    return Path(table).with_name(Path(table).stem + SUFFIX)


def write_store(csv: Path, results: dict[str, dict]) -> Path:
    """Keep the results that a table was made of. csv: the table, as it was just written; results: contents of result
    files, by the names that the table has for them."""
    head = {"table": csv.name, "sha256": _digest(csv)}
    entries = [{"result": name, "content": content} for name, content in sorted(results.items())]
    text = "".join(json.dumps(line, separators=(",", ":")) + "\n" for line in (head, *entries))
    path = store_path(csv)
    with whole(path) as partial:
        partial.write_bytes(gzip.compress(text.encode(), mtime=0))  # no name and no time: the same bytes again
    return path


def read_store(path: str | Path) -> dict[str, dict]:
    """The contents of the result files in a store, by name; `UserError` for a store that is cut or none."""
    _, *entries = _lines(Path(path))
    return {entry["result"]: entry["content"] for entry in entries}


def require_store(path: Path, table: pd.DataFrame) -> None:
    """Raise `UserError` unless a table's store, where it has one, is of this very table and has each of its runs."""
    store, csv = store_path(path), path.with_suffix(".csv")
    if not store.exists():
        return
    head, *entries = _lines(store)
    if csv.exists() and head["sha256"] != _digest(csv):
        raise UserError(f"{csv}: expected the table that {store.name} was written with ({head['sha256'][:16]}), found "
                        f"another ({_digest(csv)[:16]}); make it again from that file")  # fmt: skip
    missing = set(table["result"].dropna()) - {entry["result"] for entry in entries}
    if missing:
        raise UserError(f"{path}: result: found {min(missing)}, which is not in {store.name}")


def _lines(path: Path) -> list[dict]:
    content = read_bytes(path, "store of results")
    try:
        with gzip.open(io.BytesIO(content)) as file:
            data = file.read(MOST_JSON + 1)
        if len(data) > MOST_JSON:
            raise OSError(f"more than {MOST_JSON} bytes of text")
        text = data.decode()
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise UserError(f"{path}: expected a whole store of results ({error}); write it again") from None
    lines = text.split("\n")[:-1]
    head, *entries = [parse_json(line, f"{path}: line {n}") for n, line in enumerate(lines, 1)] or [None]
    if (
        not entries
        or not _has(head, table=str, sha256=str)
        or not all(_has(entry, result=str, content=dict) for entry in entries)
    ):
        raise UserError(f"{path}: expected a table's name and hash and then its results, found other lines")
    return [head, *entries]


def _has(line: object, **kinds: type) -> bool:
    """Is a line an object with these keys, and values of these kinds?"""
    if not isinstance(line, dict) or line.keys() != kinds.keys():
        return False
    return all(isinstance(line[key], kind) for key, kind in kinds.items())


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
