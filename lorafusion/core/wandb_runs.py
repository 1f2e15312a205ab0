"""Runs of wandb that tell nothing but what is handed to them: neither of the machine, nor of who works on it, where and
by which command."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lorafusion.core.schema import UserError

USERS_OWN = {"WANDB_API_KEY", "WANDB_BASE_URL"}
INIT_SECONDS, FINISH_SECONDS = 60, 120


@contextmanager
def private_wandb(folder: Path, mode: Any) -> Iterator[Callable[..., Any]]:
    """A function that starts a run, as `wandb.init` does, while wandb keeps everything in `folder`/wandb, says nothing
    and looks at nothing. Raises `UserError` where a run cannot be begun or sent."""
    with environment(folder, mode):
        import wandb

        settings = wandb.Settings(
            silent=True,
            console="off",
            disable_git=True,
            disable_code=True,
            save_code=False,
            x_disable_stats=True,
            x_disable_meta=True,
            x_disable_machine_info=True,
            x_save_requirements=False,
            init_timeout=INIT_SECONDS,
            finish_timeout=FINISH_SECONDS,
            finish_timeout_raises=True,
        )

        def start(**arguments: Any) -> Any:
            return wandb.init(mode=mode, dir=folder, reinit="finish_previous", settings=settings, **arguments)

        try:
            yield start
        except (wandb.Error, TimeoutError) as error:
            raise UserError(f"wandb: {' '.join(str(error).split())}") from error
        finally:
            wandb.teardown()


@contextmanager
def environment(folder: Path, mode: str) -> Iterator[None]:
    """None of the user's settings of wandb, but for key and server online, and all of its files in `folder`/wandb."""
    before = {name: value for name, value in os.environ.items() if name.startswith("WANDB_")}
    kept = USERS_OWN if mode == "online" else set()
    places = {f"WANDB_{name.upper()}_DIR": name for name in ("data", "cache", "config", "artifact")}
    ours = {name: str(folder / "wandb" / place) for name, place in places.items()} | {"WANDB_DIR": str(folder)}
    ours |= {"WANDB_SILENT": "true", "WANDB_ERROR_REPORTING": "false", "WANDB_MODE": mode}
    try:
        for name in before.keys() - kept:
            del os.environ[name]
        os.environ.update(ours)
        yield
    finally:
        for name in before.keys() | ours.keys():
            os.environ.pop(name, None)
        os.environ.update(before)
