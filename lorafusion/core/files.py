"""Files are read strictly and written whole.

Reading: a key that comes twice, a number that is none or an alias that blows up is an error. YAML and JSON that people
or other programs may have written are parsed here alone. Writing: a file is there as a whole or not at all, and never
replaces something that is not a file of the kind that is written.
"""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import yaml

from lorafusion.core.schema import FOUND, UserError, shortened

# Values of a YAML file, its aliases written out. A dozen lines of aliases of aliases can stand for millions.
MOST_VALUES = 100_000
MERGE = "tag:yaml.org,2002:merge"  # of `<<`, which stands for no value
Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def read_text(path: str | Path) -> str:
    """The text of a file; `UserError` names one that is not there or no text."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read as text ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: cannot be read as text ({error})") from None


def read_yaml(path: str | Path) -> dict:
    """The mapping in a YAML file; `UserError` names the file and the line."""
    loader = Loader(read_text(path))
    try:
        node = loader.get_single_node()
        if node is not None:
            _Checker(loader, path).require(node)
        data = None if node is None else loader.construct_document(node)
    except (yaml.YAMLError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}: not valid YAML: {error}") from None
    except RecursionError:
        raise UserError(f"{path}: not valid YAML: nested too deeply") from None
    finally:
        loader.dispose()
    if not isinstance(data, dict):
        raise UserError(f"{path}: expected a mapping, found {type(data).__name__}")
    return data


class _Checker:
    """What a parsed YAML file must not have, and its parser does not mind."""

    def __init__(self, loader: yaml.SafeLoader, path: str | Path) -> None:
        self.loader, self.path = loader, path
        self.sizes: dict[int, int | None] = {}  # by node; none while it is counted

    def require(self, root: yaml.Node) -> None:
        written_out = self._size(root)
        if written_out > max(MOST_VALUES, 2 * len(self.sizes)):
            raise UserError(f"{self.path}: its aliases stand for {written_out} values, expected {MOST_VALUES} at most")

    def _size(self, node: yaml.Node) -> int:
        if id(node) not in self.sizes:
            self.sizes[id(node)] = None
            below: list[yaml.Node] = []
            if isinstance(node, yaml.MappingNode):
                self._require_distinct_keys(node)
                below = [part for pair in node.value for part in pair]
            elif isinstance(node, yaml.SequenceNode):
                below = node.value
            self.sizes[id(node)] = 1 + sum(map(self._size, below))
        size = self.sizes[id(node)]
        if size is None:
            raise UserError(f"{self.path}: line {node.start_mark.line + 1}: an alias stands for what it is a part of")
        return size

    def _require_distinct_keys(self, node: yaml.MappingNode) -> None:
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            value = key.value if key.tag == MERGE else self.loader.construct_object(key)
            if value in seen:
                raise UserError(f"{self.path}: line {key.start_mark.line + 1}: key {value!r} comes twice in a mapping")
            seen.add(value)


def parse_json(text: str | bytes, source: str | Path, kind: str = "JSON", finite: bool = True) -> Any:
    """The value of a JSON text; `UserError` names the source, what was expected, and what is wrong. finite: refuse NaN
    and Infinity, which Python writes and JSON does not have."""
    numbers: dict[str, Any] = {"parse_constant": _no_number, "parse_float": _finite} if finite else {}
    try:
        return json.loads(text, object_pairs_hook=distinct, **numbers)
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else error
        raise UserError(f"{source}: not {kind}: {reason}") from None


def read_json(path: str | Path, kind: str, finite: bool = True) -> dict:
    """The object in a JSON file. kind: what is expected in it, as `plan`; finite: as in `parse_json`."""
    try:
        text = Path(path).read_bytes()
    except FileNotFoundError:
        raise UserError(f"{path}: no such {kind} file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read as a {kind} file ({error.strerror})") from None
    data = parse_json(text, path, f"a {kind} file, as it is not JSON", finite)
    if not isinstance(data, dict):
        raise UserError(f"{path}: expected a JSON object with a {kind}, found a {type(data).__name__}")
    return data


def distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON, none of whose keys may come twice: its readers would take one of them, each its own."""
    data = dict(pairs)
    if len(data) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for index, key in enumerate(keys) if key in keys[:index])
        raise ValueError(f"key {twice!r} comes twice in an object")
    return data


def _no_number(word: str) -> float:
    raise ValueError(f"{word} is no number of JSON")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"expected a finite number, found {text}")
    return number


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
