"""Parts by their import path, `package.module:function`, as configs/systems.yaml names them."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module

from lorafusion.errors import UserError


def load(path: str, role: str) -> Callable:
    """The function that an import path names; `role` says what it was wanted for."""
    module, _, name = path.partition(":")
    try:
        return getattr(import_module(module), name)
    except ModuleNotFoundError as error:
        raise UserError(f"{role} {path!r}: no module named {error.name!r}") from None
    except AttributeError:
        raise UserError(f"{role} {path!r}: {module} has no {name!r}") from None
