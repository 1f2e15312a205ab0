"""A folder that is replaced as a whole, and only if it holds just what was written there before, unchanged.

A manifest in it lists all of its content: each file by its hash, each link by its target, each folder.
"""

import hashlib
import json
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lorafusion.core.files import parse_json
from lorafusion.core.schema import UserError

FILES = "files"  # key of the manifest
# What others add to a publication: wandb beside a run that it has sent, Snakemake in a folder that it has made.
SENT, STAMP = ".synced", ".snakemake_timestamp"


def content(folder: Path, manifest: str) -> dict[str, str]:
    """All that is in a folder but the manifest: path to hash, link's target, or kind."""
    return {name: _described(folder / name) for name in sorted(_names(folder)) if name != manifest}


def require_own(folder: Path, manifest: str) -> None:
    """Raise `UserError` unless a folder is new, empty, or holds just what its manifest lists. Touches nothing, and
    reads no file that is not listed: it may be a folder with all that a user has."""
    try:
        if not folder.exists():
            return
        if not folder.is_dir():
            raise UserError(f"{folder}: expected a folder to publish to, found a file")
        listed = _listed(folder / manifest) if (folder / manifest).exists() else {}
        for name in _names(folder):
            if name != manifest and not _is_known(folder, name, listed):
                raise UserError(f"{folder}: {name} was not published there as it is; name a new or an empty folder")
    except OSError as error:
        raise UserError(f"{folder}: cannot be published to ({error.strerror})") from None


@contextmanager
def replaced(folder: Path, manifest: str) -> Iterator[Path]:
    """The folder, empty, to publish to. At the end what was there before is deleted; after an error it is back.
    `write_manifest` comes last. Raises `UserError` as `require_own` does.

    Written in its own place, as wandb keeps absolute paths.
    """
    require_own(folder, manifest)
    earlier = folder.with_name(f".{folder.name}.earlier-{os.getpid()}")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        if folder.exists():
            folder.rename(earlier)
        folder.mkdir()
    except OSError as error:
        raise UserError(f"{folder}: cannot be replaced ({error.strerror})") from None
    whole = False
    try:
        yield folder
        whole = True
    finally:
        if whole and earlier.exists():
            require_own(earlier, manifest)  # nobody has put anything there meanwhile
            shutil.rmtree(earlier)
        elif not whole:
            shutil.rmtree(folder)
            if earlier.exists():
                earlier.rename(folder)


def write_manifest(folder: Path, manifest: str, described: dict) -> None:
    """Say what the folder holds; the presence of the manifest says that the publication is whole."""
    text = json.dumps(described | {FILES: content(folder, manifest)}, indent=1)
    (folder / manifest).write_text(text + "\n")


def _names(folder: Path) -> Iterator[str]:
    """The paths of all that is in a folder, relative to it."""

    def fail(error: OSError) -> None:
        raise error

    for parent, folders, files in os.walk(folder, onerror=fail):
        folders.sort()
        for name in sorted((*folders, *files)):
            yield str(Path(parent, name).relative_to(folder))


def _described(path: Path) -> str:
    mode = path.lstat().st_mode
    if stat.S_ISLNK(mode):
        return f"-> {os.readlink(path)}"
    if stat.S_ISREG(mode):
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "blake2b").hexdigest()[:32]
    return "folder" if stat.S_ISDIR(mode) else "device or pipe"


def _listed(manifest: Path) -> dict[str, str]:
    """What a manifest lists. Raises `UserError` for a file of that name that is none."""
    try:
        listed = parse_json(manifest.read_text(), manifest)[FILES]
    except (OSError, ValueError, KeyError, TypeError):
        listed = None
    if not isinstance(listed, dict):
        raise UserError(f"{manifest}: does not list what was published beside it; name a new or an empty folder")
    return listed


def _is_known(folder: Path, name: str, listed: dict[str, str]) -> bool:
    """Is a path in a folder as the manifest lists it, or what others add to a publication?"""
    if name in listed:
        return listed[name] == _described(folder / name)
    if name == STAMP:
        return _described(folder / name) == hashlib.blake2b(b"").hexdigest()[:32]
    return name.endswith(SENT) and name.removesuffix(SENT) in listed
