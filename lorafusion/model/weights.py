"""Weights of one stage from a Hugging Face checkpoint: tensor by tensor, from the shards that hold them."""

from __future__ import annotations

from pathlib import Path

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from safetensors import safe_open

from lorafusion.core.config import ModelConfig
from lorafusion.core.files import read_json
from lorafusion.core.hub import HUB_ERRORS
from lorafusion.core.schema import UserError

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"


def checkpoint_weights(config: ModelConfig):
    """A function (name, shape, device, dtype) -> tensor that reads from a local folder or the hub.

    A shard is opened, and from the hub fetched, when the first tensor of it is asked for, so that host memory never
    holds more than one tensor and a stage fetches no shard that it does not need.
    """
    shards = _shard_of_each_tensor(config)

    def fill(name: str, shape: torch.Size, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
        source = name
        if name == "lm_head.weight" and name not in shards and config.tie_word_embeddings:
            source = "model.embed_tokens.weight"
        if source not in shards:
            raise UserError(f"{config.weights}: the checkpoint has no tensor {source!r}")
        with safe_open(_file(config, shards[source]), framework="pt") as shard:
            value = shard.get_tensor(source)
        if value.shape != shape:
            raise UserError(
                f"{config.weights}: {source} has shape {tuple(value.shape)}, the model expects {tuple(shape)}"
            )
        return value.to(device=device, dtype=dtype)

    return fill


def _shard_of_each_tensor(config: ModelConfig) -> dict[str, str]:
    index = _file_if_any(config, INDEX)
    if index is not None:
        shards = read_json(index, "list of shards").get("weight_map")
        if not isinstance(shards, dict):
            raise UserError(f"{index}: weight_map: expected the file of each tensor, found {type(shards).__name__}")
        return shards
    with safe_open(_file(config, SINGLE), framework="pt") as shard:
        return dict.fromkeys(shard.keys(), SINGLE)


def _file_if_any(config: ModelConfig, filename: str) -> Path | None:
    """A file of the checkpoint, None where it has none of this name: locally, on the hub, or offline in its cache."""
    local = Path(config.weights)
    if local.is_dir():
        return local / filename if (local / filename).exists() else None
    try:
        return _fetched(config, filename)
    except EntryNotFoundError:
        return None
    except HUB_ERRORS as error:
        raise _unreachable(config, error) from None


def _file(config: ModelConfig, filename: str) -> Path:
    local = Path(config.weights)
    if local.is_dir():
        if not (local / filename).exists():
            raise UserError(f"{local}: no {INDEX} and no {filename}; is it a safetensors checkpoint?")
        return local / filename
    try:
        return _fetched(config, filename)
    except (*HUB_ERRORS, EntryNotFoundError) as error:
        raise _unreachable(config, error) from None


def _fetched(config: ModelConfig, filename: str) -> Path:
    return Path(hf_hub_download(config.weights, filename, revision=config.revision))


def _unreachable(config: ModelConfig, error: Exception) -> UserError:
    reason = " ".join(str(error).split())[:200]
    revision = f" of revision {config.revision!r}" if config.revision else ""
    return UserError(
        f"weights {config.weights!r}{revision}: neither a local folder nor to be had from the hub ({reason})"
    )
