"""Errors that are put into the code on purpose, to see that something notices them.

An error replaces a symbol when its module is imported, in this process and in all that it starts, so it survives a move
of lines. `LORAFUSION_PLANTED=AREA.NAME` chooses it: `hook/sitecustomize.py` on the Python path reads that.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

FOLDER = Path(__file__).parent
ROOT = FOLDER.parent.parent
HOOK = FOLDER / "hook"
CHOSEN = "LORAFUSION_PLANTED"
MARK = "LORAFUSION_PLANTED_MARK"  # a file that is made once the symbol is replaced
NO_AREAS = {"plant", "table"}

Replace = Callable[[Any], Any]


@dataclass(frozen=True)
class Planted:
    """An error: what it replaces, by what, and the tests (pytest's node ids) that must fail on it, each of them."""

    name: str
    statement: str
    symbol: str
    caught_by: tuple[str, ...]
    replace: Replace
    gpu: bool = False

    @property
    def module(self) -> str:
        return self.symbol.partition(":")[0]


ERRORS: dict[str, Planted] = {}


def planted(symbol: str, caught_by: str | Sequence[str], gpu: bool = False) -> Callable[[Replace], Replace]:
    """Make a function an error. It is given the original of `module:name` or `module:Class.method` and returns what
    takes its place; its docstring says in one sentence what is wrong then. gpu: its tests need a GPU."""

    def register(replace: Replace) -> Replace:
        area = replace.__module__.rpartition(".")[2]
        name = f"{area}.{replace.__name__}"
        assert name not in ERRORS, f"two errors are named {name}"
        tests = (caught_by,) if isinstance(caught_by, str) else tuple(caught_by)
        ERRORS[name] = Planted(name, " ".join(replace.__doc__.split()), symbol, tests, replace, gpu)
        return replace

    return register


def every_error() -> dict[str, Planted]:
    """All errors of all areas, by name."""
    for path in sorted(FOLDER.glob("*.py")):
        if path.stem not in NO_AREAS and not path.stem.startswith(("test_", "_")):
            importlib.import_module(f"tests.planted.{path.stem}")
    return dict(sorted(ERRORS.items()))


def install(name: str) -> None:
    """Have the error's symbol replaced as soon as its module is imported."""
    area = name.partition(".")[0]
    importlib.import_module(f"tests.planted.{area}")
    error = ERRORS[name]
    assert error.module not in sys.modules, f"{error.module} is imported already"
    sys.meta_path.insert(0, _Finder(error))


class _Finder:
    """Finds the module as the others do, and has its loader replace the symbol at the end."""

    def __init__(self, error: Planted) -> None:
        self.error, self._searching = error, False

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != self.error.module or self._searching:
            return None
        self._searching = True
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self._searching = False
        execute = spec.loader.exec_module

        def execute_and_replace(module: ModuleType) -> None:
            execute(module)
            _replace(module, self.error)

        spec.loader.exec_module = execute_and_replace
        return spec


def _replace(module: ModuleType, error: Planted) -> None:
    *owners, last = error.symbol.partition(":")[2].split(".")
    owner: Any = module
    for part in owners:
        owner = getattr(owner, part)
    original = vars(owner)[last]  # as it stands there: a static method or a property stays one
    setattr(owner, last, error.replace(original))
    if MARK in os.environ:
        Path(os.environ[MARK]).touch()
