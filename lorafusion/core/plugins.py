"""Parts by their import path, `package.module:function`, as configs/systems.yaml names them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

from lorafusion.core.schema import UserError

ROOT = str(Path(__file__).parents[2])


def load(path: str, role: str) -> Callable:
    """The function that an import path names; `role` says what it was wanted for."""
    module, _, name = path.partition(":")
    if ROOT not in sys.path:
        sys.path.append(ROOT)  # baselines/ is in the checkout, and not installed
    try:
        return getattr(import_module(module), name)
    except ModuleNotFoundError as error:
        raise UserError(f"{role} {path!r}: no module named {error.name!r}") from None
    except AttributeError:
        raise UserError(f"{role} {path!r}: {module} has no {name!r}") from None
