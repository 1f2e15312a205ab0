"""The jobs file as `lorafusion train` takes it: read, and looked at beside the output folder that it names.

Nothing here imports torch: a mistake in the file is told at once.
"""

import os
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from lorafusion.core.config import ModelConfig, read_model, require_attention
from lorafusion.core.schema import Mistakes, UserError
from lorafusion.launch.lock import locked
from lorafusion.train.config import TrainConfig, read_train_config
from lorafusion.train.fit import fitted, require_warm_ups
from lorafusion.train.ownership import is_own, require_names, require_own
from lorafusion.train.status import STATUS, digest_of, output_named_in, refuse

MOST_PROCESSES = max(64, os.cpu_count() or 1)  # on a machine: each imports torch


class JobsFile(NamedTuple):
    """A jobs file as it was read, its `digest_of`, and why a later one was not taken in its place."""

    config: TrainConfig
    digest: str
    remark: str = ""


def read_jobs(path: Path, before: Path | None = None) -> JobsFile:
    """The jobs file. One that cannot be taken is a `UserError` with all its mistakes, and who watches the folder is
    told. before: the folder that it named when it was read before."""
    folder, digest = before or output_named_in(path), digest_of(path)
    try:
        config = read_train_config(path)
        folder = config.output
        _require_possible(config)
        return JobsFile(config, digest)
    except UserError as error:
        if folder is not None and is_own(folder) and (folder / STATUS).is_file():
            with suppress(UserError, OSError), locked(folder):  # unless another training is at work there
                refuse(folder, path, error)
        raise


def _require_possible(config: TrainConfig) -> None:
    mistakes = Mistakes()
    with mistakes.gathered():
        require_own(config)
    with mistakes.gathered():
        require_names(config.output, [job.name for job in config.jobs], config.path)
    with mistakes.gathered():
        if config.processes > MOST_PROCESSES:
            raise UserError(
                f"{config.path}: processes: {config.processes} on this machine, expected {MOST_PROCESSES} at most"
            )
    model = read_model(config.model) if config.is_described else None
    with mistakes.gathered():
        config.uses_graphs(config.without_graphs(model))
    with mistakes.gathered():
        require_attention(config.attention, config.chosen_device, f"{config.path}: attention")
    with mistakes.gathered():
        require_warm_ups(config)
    if model:
        with mistakes.gathered():
            fitted(config, model)
    mistakes.require_none()
    _require_model(config, model)


def _require_model(config: TrainConfig, model: ModelConfig | None) -> None:
    """Raise `UserError` where the base model's files are damaged, or are of a model that cannot be trained."""
    from lorafusion.model.pretrained import look_at, require_weights  # imports the hub's library, so only now

    try:
        if model is None:
            look_at(config.model, config.revision, weights=config.weights is None)
        elif "random" not in (model.weights, config.weights):
            require_weights(model.model_copy(update={"revision": config.revision or model.revision}))
    except UserError as error:
        raise UserError(*(f"{config.path}: {mistake}" for mistake in error.mistakes)) from None
