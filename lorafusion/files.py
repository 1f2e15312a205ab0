"""Files are written whole or not at all, and never over something that is not a file of the kind that is written."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lorafusion.errors import FOUND, UserError, shortened


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A path to write a file to, in one step to be the one at `path`, whose folder is made. On an error nothing is.
    Raises `UserError` where a device, a pipe or a folder is at `path`: it would be gone."""
    require_replaceable(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    short = path.name.encode()[:200].decode(errors="ignore")  # of 255 bytes that a name may have
    partial = path.with_name(f".{short}.{os.getpid()}")
    try:
        yield partial
        with open(partial, "rb+") as file:
            os.fsync(file.fileno())  # else a power cut may leave an empty file of this name
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write(path: Path, text: str) -> None:
    """Write a text file in one step, making its folder."""
    with whole(path) as partial:
        partial.write_text(text)


def require_outputs(outputs: Iterable[Path], inputs: Iterable[Path]) -> None:
    """Raise `UserError` unless each output can be written, and nothing is lost by that: it is none of the inputs, nor
    another output, under whichever name or link. Touches nothing."""
    read = [path for path in inputs if os.path.exists(path)]  # false for a value that can be no path
    places: set[Path] = set()
    for path in outputs:
        require_replaceable(path)
        place = _place(path)
        for source in read:
            if place.exists() and place.samefile(source):
                raise UserError(f"{path}: is to be written, but it is read too ({source}); name another file")
        if place in places:
            raise UserError(f"{path}: is to be written twice, expected a file for each output")
        places.add(place)


def require_replaceable(path: Path) -> None:
    """Raise `UserError` unless `path` is a regular file, or nothing in a folder that is there or can be made. A link is
    neither: it would be gone, and what it leads to may be anything, as of /dev/stdout."""
    try:
        mode = _place(path).lstat().st_mode
    except FileNotFoundError:
        _require_folder(path)
        return
    except OSError as error:  # a file as its folder, a name that is too long, links in a circle
        raise UserError(f"{path}: cannot be written ({error.strerror})") from None
    if not stat.S_ISREG(mode):
        kind = "a folder" if stat.S_ISDIR(mode) else "a link" if stat.S_ISLNK(mode) else "a device or a pipe"
        raise UserError(f"{path}: expected a file to write, found {kind}")
    _require_folder(path)


def _place(path: Path) -> Path:
    """Where a file will be when the folders of its path have been made: `new/../x` is `x`, though there is no `new`
    yet."""
    return path.resolve() if path.name == ".." else path.parent.resolve() / path.name


def named_path(folder: Path, name: str | Path, where: str) -> Path:
    """The path that a file in `folder` means by a name: relative to the folder, `~` for a home. Raises `UserError` that
    begins with `where` for a name that no file can have."""
    try:
        path = folder / Path(name).expanduser()
        with suppress(FileNotFoundError, NotADirectoryError):
            path.lstat()
    except (OSError, ValueError, RuntimeError) as error:  # too long or not allowed, a NUL in it, nobody's home
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"{where}: not a path ({reason}; found {shortened(repr(str(name)), FOUND)})") from None
    return path


def _require_folder(path: Path) -> None:
    nearest = next(folder for folder in path.absolute().parents if folder.exists())
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise UserError(f"{path}: cannot be written (no permission in {nearest})")
