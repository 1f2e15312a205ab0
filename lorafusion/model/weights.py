"""Weights of one stage from a Hugging Face checkpoint: tensor by tensor, from the shards that hold them."""

import torch
from safetensors import SafetensorError, safe_open

from lorafusion.core.config import ModelConfig
from lorafusion.core.hub import file_of
from lorafusion.core.schema import UserError
from lorafusion.model.pretrained import shard_of_each_tensor


def checkpoint_weights(config: ModelConfig):
    """A function (name, shape, device, dtype) -> tensor that reads from a local folder or the hub.

    A shard is opened, and from the hub fetched, when the first tensor of it is asked for, so that host memory never
    holds more than one tensor and a stage fetches no shard that it does not need.
    """
    shards = shard_of_each_tensor(config.weights, config.revision)

    def fill(name: str, shape: torch.Size, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
        source = name
        if name == "lm_head.weight" and name not in shards and config.tie_word_embeddings:
            source = "model.embed_tokens.weight"
        if source not in shards:
            raise UserError(f"{config.weights}: the checkpoint has no tensor {source!r}")
        path = file_of(config.weights, shards[source], config.revision)
        if path is None:
            raise UserError(f"{config.weights}: no file {shards[source]}, which has tensor {source!r}")
        try:
            with safe_open(path, framework="pt") as shard:
                value = shard.get_tensor(source)
        except SafetensorError as error:
            raise UserError(f"{path}: damaged, expected a whole safetensors file ({error})") from None
        if value.shape != shape:
            raise UserError(
                f"{config.weights}: {source} has shape {tuple(value.shape)}, the model expects {tuple(shape)}"
            )
        return value.to(device=device, dtype=dtype)

    return fill
