"""Files are read strictly and written whole.

Reading: a key that comes twice, a number that is none or an alias that blows up is an error. YAML and JSON that people
or other programs may have written are parsed here alone. Writing: a file is there as a whole or not at all, and never
replaces something that is not a file of the kind that is written.
"""

import errno
import json
import math
import os
import re
import shutil
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import yaml
from safetensors import SafetensorError

from lorafusion.core.schema import UserError, shown

MOST_YAML = 2**22  # bytes of a file that people write
MOST_JSON = 2**28  # bytes of one that programs write: twenty million samples
MOST_VALUES = 200_000  # of a YAML file, its aliases written out: a dozen lines of them can stand for millions
MOST_NESTED = 100  # lists and mappings in one another
MOST_DIGITS = 4300  # of an integer, as Python reads and writes them
MERGE = "tag:yaml.org,2002:merge"  # of `<<`, which stands for no value
INTEGER = "tag:yaml.org,2002:int"
TAGS = (None, INTEGER, "tag:yaml.org,2002:str", "tag:yaml.org,2002:float")  # that a file may write
Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def read_bytes(path: str | Path, kind: str = "text", most: int = MOST_JSON) -> bytes:
    """The content of a file; `UserError` names one that is not there, no regular file, or longer than `most` bytes.
    kind: of file, as `plan`."""
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):  # a pipe would be waited for, a device may never end
            raise UserError(f"{path}: expected a {kind} file, found {_kind_of(status.st_mode)}")
        if status.st_size > most:
            raise UserError(f"{path}: {status.st_size} bytes, expected a {kind} file of {most} at most")
        return Path(path).read_bytes()
    except FileNotFoundError:
        raise UserError(f"{path}: no such {kind} file") from None
    except (OSError, ValueError) as error:  # of a path with a NUL
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}: cannot be read as a {kind} file ({_reason(error)})") from None


def read_text(path: str | Path, kind: str = "text", most: int = MOST_JSON) -> str:
    """The text of a file in UTF-8; raises as `read_bytes` does, and for other encodings."""
    data = read_bytes(path, kind, most)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        wide = " (UTF-16 by its beginning)" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else ""
        raise UserError(f"{path}: expected a {kind} file in UTF-8, found other bytes at {error.start}{wide}") from None


def read_yaml(path: str | Path, may_be_empty: bool = False) -> dict:
    """The mapping in a YAML file; `UserError` names the file and the line. may_be_empty: as where all keys have
    defaults; such a file may have comments."""
    text = read_text(path, "YAML", MOST_YAML)
    loader = Loader(text)
    try:
        _require_small(text, path)
        node = loader.get_single_node()
        if node is not None:
            _require_sound(node, loader, path)
        data = None if node is None else loader.construct_document(node)
    except (yaml.YAMLError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}: not valid YAML: {error}") from None
    finally:
        loader.dispose()
    if data is None and may_be_empty:
        return {}
    if not isinstance(data, dict):
        raise UserError(f"{path}: expected a mapping, found {shown(data)}")
    return data


def _require_small(text: str, path: str | Path) -> None:
    """Raise `UserError` where a YAML text stands for too much. Its parser calls itself for what is nested, and would
    end the process; so this looks at its events, one after the other."""
    sizes: dict[str | None, int | None] = {}  # by anchor; none while it is counted
    open_nodes = [(None, 0)]  # anchor and size, from the outside in
    for event in yaml.parse(text, Loader):
        line = f"{path}: line {event.start_mark.line + 1}"
        size = 1
        if getattr(event, "tag", None) not in TAGS:
            raise UserError(f"{line}: not valid YAML: expected a plain value, found the tag {event.tag!r}")
        if isinstance(event, yaml.CollectionStartEvent):
            open_nodes.append((event.anchor, 1))
            sizes[event.anchor] = None
            if len(open_nodes) > MOST_NESTED:
                raise UserError(f"{line}: not valid YAML: nested too deeply, expected {MOST_NESTED} levels at most")
            continue
        if isinstance(event, yaml.CollectionEndEvent):
            anchor, size = open_nodes.pop()
            sizes[anchor] = size
        elif isinstance(event, yaml.AliasEvent):
            if (inner := sizes.get(event.anchor, 1)) is None:
                raise UserError(f"{line}: an alias stands for what it is a part of")
            size = inner
        elif isinstance(event, yaml.ScalarEvent):
            sizes[event.anchor] = 1
        else:
            continue
        anchor, outer = open_nodes[-1]
        open_nodes[-1] = anchor, outer + size
        if outer + size > MOST_VALUES:
            raise UserError(f"{line}: {outer + size} values, aliases written out; expected {MOST_VALUES} at most")


def _require_sound(root: yaml.Node, loader: yaml.SafeLoader, path: str | Path) -> None:
    """Raise `UserError` for a key that comes twice, and for an integer that Python cannot write."""
    nodes, seen = [root], {id(root)}
    for node in nodes:  # which grows
        below: list[yaml.Node] = []
        if isinstance(node, yaml.MappingNode):
            _require_distinct_keys(node, loader, path)
            below = [part for pair in node.value for part in pair]
        elif isinstance(node, yaml.SequenceNode):
            below = node.value
        elif node.tag == INTEGER and len(node.value) > MOST_DIGITS:
            line = f"{path}: line {node.start_mark.line + 1}"
            raise UserError(f"{line}: not valid YAML: an integer of {len(node.value)} digits, expected {MOST_DIGITS}")
        nodes += [part for part in below if id(part) not in seen]
        seen.update(map(id, below))


def _require_distinct_keys(node: yaml.MappingNode, loader: yaml.SafeLoader, path: str | Path) -> None:
    seen = set()
    for key, _ in node.value:
        if not isinstance(key, yaml.ScalarNode):
            continue
        value = key.value if key.tag == MERGE else loader.construct_object(key)
        if value in seen:
            raise UserError(f"{path}: line {key.start_mark.line + 1}: key {value!r} comes twice in a mapping")
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
    text = read_text(path, kind)
    data = parse_json(text, path, f"a {kind} file, as it is not JSON", finite)
    if not isinstance(data, dict):
        raise UserError(f"{path}: expected a JSON object with a {kind}, found {shown(data)}")
    if SURROGATE.search(text):
        try:
            json.dumps(data, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            half = ascii(error.object[error.start])
            raise UserError(f"{path}: found {half}, half of a character (a lone surrogate); expected text") from None
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


def _kind_of(mode: int) -> str:
    return "a folder" if stat.S_ISDIR(mode) else "a link" if stat.S_ISLNK(mode) else "a device or a pipe"


def _reason(error: Exception) -> str:
    return (isinstance(error, OSError) and error.strerror) or str(error)


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A path to write a file to, in one step to be the one at `path`, whose folder is made. Who may read it is as the
    umask says: safetensors would let nobody else. On an error nothing is written. Raises `UserError` where a device, a
    pipe or a folder is at `path`, as it would be gone, and an `OSError` that names `path` where the file system takes
    no file there."""
    require_replaceable(path)
    short = path.name.encode()[:200].decode(errors="ignore")  # of 255 bytes that a name may have
    partial = path.with_name(f".{short}.{os.getpid()}")
    try:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            partial.unlink(missing_ok=True)
            partial.touch()
            mode = stat.S_IMODE(partial.stat().st_mode)
            yield partial
            with open(partial, "rb+") as file:
                os.fchmod(file.fileno(), mode)
                os.fsync(file.fileno())  # else a power cut may leave an empty file of this name
            partial.replace(path)
    except OSError as error:
        if error.filename in (partial, str(partial)):
            error.filename, error.filename2 = str(path), None
        raise
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


class FullDiskError(OSError):
    """A file that could not be written for want of room; says how much there is."""


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Within it a file is written, or those of a folder. Errors of that name it; where a disk is full they are a
    `FullDiskError`, that of the writer of tensors too, which knows no `OSError`."""
    try:
        yield
    except FullDiskError:
        raise
    except (OSError, SafetensorError) as error:
        match = re.search(r"os error (\d+)", str(error))
        number = error.errno if isinstance(error, OSError) else match and int(match[1])
        if number in FULL:
            folder = next(parent for parent in path.absolute().parents if parent.exists())
            free = f"{shutil.disk_usage(folder).free / 2**20:.1f} MiB are free there"
            raise FullDiskError(number, f"{os.strerror(number)}, {free}", str(path)) from error
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(path)
        raise


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
        require_writable(path)
        return
    except (OSError, RuntimeError) as error:  # a file as its folder, a name that is too long, links in a circle
        raise UserError(f"{path}: cannot be written ({_reason(error)})") from None
    if not stat.S_ISREG(mode):
        raise UserError(f"{path}: expected a file to write, found {_kind_of(mode)}")
    require_writable(path)


def _place(path: Path) -> Path:
    """Where a file will be when the folders of its path have been made: `new/../x` is `x`, though there is no `new`
    yet."""
    try:
        return path.resolve() if path.name == ".." else path.parent.resolve() / path.name
    except RuntimeError:
        raise UserError(f"{path}: cannot be written (links of its path lead in a circle)") from None


def named_path(folder: Path, name: str | Path, where: str) -> Path:
    """The path that a file in `folder` means by a name: relative to the folder, `~` for a home. Raises `UserError` that
    begins with `where` for a name that no file can have."""
    try:
        path = folder / Path(name).expanduser()
        with suppress(FileNotFoundError, NotADirectoryError):
            path.lstat()
    except (OSError, ValueError, RuntimeError) as error:  # too long or not allowed, a NUL in it, nobody's home
        raise UserError(f"{where}: not a path ({_reason(error)}; found {shown(str(name))})") from None
    return path


def require_folder(path: Path) -> None:
    """Raise `UserError` unless `path` is a folder, or one can be made there, and Snakemake takes it as it is."""
    if {*"{}\n"} & {*str(path)}:
        raise UserError(f"{path}: expected a folder without braces and line breaks in its path")
    try:
        nearest = next(place for place in (path.absolute(), *path.absolute().parents) if os.path.lexists(place))
        mode = nearest.stat().st_mode
    except OSError as error:
        raise UserError(f"{path}: cannot be a folder ({_reason(error)})") from None
    if not stat.S_ISDIR(mode):
        what = "a file" if stat.S_ISREG(mode) else _kind_of(mode)
        raise UserError(f"{path}: expected a folder, found {what} at {nearest}")


def require_writable(path: Path) -> None:
    """Raise `UserError` unless a file or folder can be made at `path`, as far as that shows without making one."""
    nearest = next(folder for folder in path.absolute().parents if folder.exists())
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise UserError(f"{path}: cannot be written (no permission in {nearest})")
    system = os.statvfs(nearest)
    if system.f_flag & os.ST_RDONLY:
        raise UserError(f"{path}: cannot be written ({nearest} is mounted read-only)")
    if not system.f_blocks and not system.f_files:  # proc and sysfs, which let root try
        raise UserError(f"{path}: cannot be written ({nearest} keeps no files)")
