"""What a folder holds, by name, size and hash, in a manifest that is written last; and JSON files that know their own.

A folder whose writing was interrupted has no manifest. One that was changed afterwards differs from it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

from pydantic import Field, ValidationError

from lorafusion.core.files import write
from lorafusion.core.schema import Config, UserError

MANIFEST = "manifest.json"
SEAL = "sha256"


class DamagedError(UserError):
    """A file that is not as it was written."""


class UnfinishedError(UserError):
    """A folder without a manifest: whoever wrote it did not come to the end."""


class FileEntry(Config):
    """A file, or the beginning of one: its length in bytes and the SHA-256 of them."""

    size: int = Field(ge=0)
    sha256: str

    @classmethod
    def of(cls, path: Path) -> FileEntry:
        with open(path, "rb") as file:
            return cls(size=path.stat().st_size, sha256=hashlib.file_digest(file, "sha256").hexdigest())

    def require(self, path: Path) -> None:
        """Raise `DamagedError` unless the file is there and is the one that was described."""
        if not path.is_file():
            raise DamagedError(f"{path}: missing")
        if path.stat().st_size != self.size:
            raise DamagedError(f"{path}: damaged, it has {path.stat().st_size} bytes, not {self.size}")
        if FileEntry.of(path) != self:
            raise DamagedError(f"{path}: damaged, its hash is not the one that was noted")


def write_sealed(path: Path, data: dict) -> None:
    """Write a JSON object with its own hash, so that `read_sealed` sees any change."""
    write(path, _sealed(data))


def read_sealed(path: Path) -> dict:
    """What `write_sealed` wrote. Raises `DamagedError` unless the file is the same to the last bit."""
    try:
        text = path.read_bytes().decode()
        data = json.loads(text)
    except FileNotFoundError:
        raise DamagedError(f"{path}: missing") from None
    except ValueError:
        raise DamagedError(f"{path}: damaged, not JSON") from None
    if isinstance(data, dict) and SEAL not in data:
        raise DamagedError(f"{path}: it has no hash of its own; it was written by another version, or changed")
    if not isinstance(data, dict) or _sealed({key: data[key] for key in data if key != SEAL}) != text:
        raise DamagedError(f"{path}: damaged, its hash is not the one that stands in it")
    del data[SEAL]
    return data


def _sealed(data: dict) -> str:
    text = json.dumps(data, sort_keys=True)
    return json.dumps(data | {SEAL: hashlib.sha256(text.encode()).hexdigest()}, sort_keys=True, indent=1) + "\n"


def entries(folder: Path, names: Iterable[str]) -> dict[str, FileEntry]:
    return {name: FileEntry.of(folder / name) for name in names}


def seal(folder: Path, files: dict[str, FileEntry], facts: dict) -> None:
    """Write the manifest of a folder: its files by their names in it, and what else is to be known."""
    described = {name: entry.model_dump() for name, entry in files.items()}
    write_sealed(folder / MANIFEST, {"files": described, "facts": facts})


def facts_of(folder: Path) -> dict:
    """The facts of a folder's manifest, whose files are not looked at. Raises as `verified` does."""
    return _manifest(folder)[1]


def verified(folder: Path) -> dict:
    """The facts of a folder whose files are all there, unchanged, and no others beside them (hidden ones apart).

    Raises `UnfinishedError` where there is no manifest, and `DamagedError` naming the first file that is wrong."""
    files, facts = _manifest(folder)
    for path in sorted(folder.iterdir()):
        if path.is_file() and not path.name.startswith(".") and path.name not in {MANIFEST, *files}:
            raise DamagedError(f"{path}: not a file of this folder, its manifest does not list it")
    for name, entry in files.items():
        entry.require(folder / name)
    return facts


def _manifest(folder: Path) -> tuple[dict[str, FileEntry], dict]:
    path = folder / MANIFEST
    if not path.exists():
        raise UnfinishedError(f"{folder}: not finished, it has no {MANIFEST}")
    data = read_sealed(path)
    try:
        return {name: FileEntry.model_validate(entry) for name, entry in data["files"].items()}, data["facts"]
    except (KeyError, AttributeError, ValidationError):
        raise DamagedError(f"{path}: not a manifest") from None
