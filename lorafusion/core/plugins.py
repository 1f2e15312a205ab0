"""Parts that may be missing: functions by the import path that configs/systems.yaml names, and packages of extras."""

import sys
from collections.abc import Callable
from importlib import import_module
from types import ModuleType

from lorafusion.core.schema import UserError
from lorafusion.core.source_tree import IS_CHECKOUT, ROOT


def load(path: str, role: str) -> Callable:
    """The function that an import path names; `role` says what it was wanted for."""
    module, _, name = path.partition(":")
    if IS_CHECKOUT and str(ROOT) not in sys.path:
        sys.path.append(str(ROOT))  # baselines/ is in the checkout, and not installed
    try:
        return getattr(import_module(module), name)
    except ModuleNotFoundError as error:
        if error.name == "baselines" and not IS_CHECKOUT:
            raise UserError(f"{role} {path!r}: baselines need a checkout of the repository") from None
        raise UserError(f"{role} {path!r}: no module named {error.name!r}") from None
    except AttributeError:
        raise UserError(f"{role} {path!r}: {module} has no {name!r}") from None


def import_extra(package: str, extra: str, purpose: str) -> ModuleType:
    """A package that an extra of lorafusion brings; `UserError` says how to get it, and what for."""
    try:
        return import_module(package)
    except ModuleNotFoundError:
        raise UserError(f"{purpose}: needs the package {package}: pip install 'lorafusion[{extra}]'") from None
