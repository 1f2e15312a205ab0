"""Whose an output folder is. A training writes only into a folder that was empty when it began, which it marks before
anything else, and never through a link: so it replaces nothing but what a training has made."""

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

from lorafusion.core.files import require_writable
from lorafusion.core.manifest import MANIFEST
from lorafusion.core.schema import UserError
from lorafusion.launch.lock import LOCK
from lorafusion.train.config import TrainConfig

PROGRESS = "progress.json"  # the mark, and what is done
DECORATION = 32  # bytes that the longest file name has besides the job's name: a hash, endings, a process id
# Attributes of torch's modules: PEFT keeps adapters in one by their names.
RESERVED = re.compile(
    "T_destination|add_module|apply|bfloat16|buffers|call_super_init|children|clear|compile|cpu|cuda|double|"
    "dump_patches|eval|extra_repr|float|forward|get_(buffer|extra_state|parameter|submodule)|half|ipu|items|keys|"
    "load_state_dict|modules|mtia|named_(buffers|children|modules|parameters)|parameters|pop|"
    r"register_(buffer|module|parameter|\w+_hook)|requires_grad_|set_(extra_state|submodule)|share_memory|smart_apply|state_dict|to|"
    "to_empty|train|training|type|update|values|xpu|zero_grad"
)
WANDBS = "wandb"  # has links of its own making


def require_own(config: TrainConfig) -> None:
    """Raise `UserError` where the output folder of a jobs file holds what no training has made, has a link in it or is
    read as well. Touches nothing."""
    folder, where = config.output, f"{config.path}: output"
    try:
        names = set(os.listdir(folder))
    except FileNotFoundError:
        names = set()
        try:
            require_writable(folder)
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
    except OSError as error:  # a file, or under one
        raise UserError(f"{where}: {folder} is no folder to write to ({error.strerror})") from None
    # What the marking of a folder leaves when it is interrupted is nothing.
    is_new = all(name == LOCK or name.startswith(f".{PROGRESS}.") for name in names)
    if not (is_new or is_own(folder)):
        raise UserError(
            f"{where}: {folder} holds files, but not those of a training ({sorted(names)[0]}); expected a new or an "
            "empty folder"
        )
    for path in _links(folder):
        raise UserError(f"{where}: {path} is a link, expected a file or folder of the training's own")
    inside = folder.resolve()
    for path in _inputs(config):
        if inside in path.resolve().parents or path.resolve() == inside:
            raise UserError(f"{where}: {folder} holds {path}, which is read; keep what is read in another folder")


def is_own(folder: Path) -> bool:
    """Has a training marked the folder? Its mark may be damaged, or of an earlier version; that is told when it is
    read."""
    path = folder / PROGRESS
    try:
        data = json.loads(path.read_text())
    except (ValueError, OSError):
        return path.is_file() and any(folder.glob(f"runs/*/{MANIFEST}"))
    return isinstance(data, dict) and {"settings", "jobs"} <= data.keys()


def _links(folder: Path) -> Iterator[Path]:
    for parent, folders, files in os.walk(folder):
        yield from (Path(parent, name) for name in (*folders, *files) if os.path.islink(Path(parent, name)))
        if Path(parent) == folder and WANDBS in folders:
            folders.remove(WANDBS)


def _inputs(config: TrainConfig) -> Iterator[Path]:
    """Every file and folder that a jobs file names, and itself."""
    yield config.path
    for job in config.jobs:
        for block in (job.data, job.evaluation_data):
            yield from (*getattr(block, "jsonl", ()), *getattr(block, "text", ()))
    yield from (Path(name) for name in (config.model, config.tokenizer) if name and Path(name).is_absolute())


def require_names(folder: Path, names: list[str], source: Path) -> None:
    """Raise `UserError` where the files of a job cannot have its name in this folder: it is too long for the file
    system, is another's but for its case (adapters are copied to file systems that ignore it), or is one that torch has
    a use for."""
    nearest = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    most = os.pathconf(nearest, "PC_NAME_MAX") - DECORATION
    spellings: dict[str, str] = {}
    for name in names:
        where = f"{source}: jobs.{name[:40]}{'...' * (len(name) > 40)}: name"
        if len(os.fsencode(name)) > most:
            raise UserError(
                f"{where}: it has {len(os.fsencode(name))} bytes, the most is {most}: files are named by it"
            )
        if name.lower() in spellings:
            raise UserError(f"{where}: it differs from {spellings[name.lower()][:40]!r} only in case")
        if RESERVED.fullmatch(name):
            raise UserError(f"{where}: torch's modules have an attribute of this name; choose another")
        spellings[name.lower()] = name
