"""A base model described by the config.json of its Hugging Face folder or repository."""

from __future__ import annotations

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig

from lorafusion.core.config import ModelConfig
from lorafusion.core.hub import HUB_ERRORS
from lorafusion.core.schema import UserError, validated
from lorafusion.model.stage import ARCHITECTURES, hf_config

# What changes what a model of a known family computes, and is not among the dimensions of a `ModelConfig`.
FIXED = ("hidden_act", "attention_bias", "mlp_bias", "attention_dropout", "layer_types", "quantization_config")


def huggingface_model(source: str, revision: str | None = None) -> ModelConfig:
    """The model in a local folder or a repository of the hub, with its weights.

    Raises `UserError` for one that cannot be had, is of another architecture, or differs from its family in something
    that a stage would not compute.
    """
    try:
        config = AutoConfig.from_pretrained(source, revision=revision)
    except (*HUB_ERRORS, StrictDataclassError, ValueError) as error:
        reason = " ".join(str(error).split())[:120]
        raise UserError(f"model {source!r}: no description to be had from its config.json ({reason})") from None
    if config.model_type not in ARCHITECTURES:
        supported = ", ".join(sorted(ARCHITECTURES))
        raise UserError(
            f"model {source!r}: architecture {config.model_type!r} is not supported; supported: {supported}"
        )
    values = config.to_dict()
    fields = {name: values[name] for name in ModelConfig.model_fields if name in values}
    described = {"architecture": config.model_type, "weights": source, "revision": revision}
    model = validated(ModelConfig, fields | described, f"{source}/config.json")
    _require_equal(values, model, source)
    return model


def _require_equal(values: dict, model: ModelConfig, source: str) -> None:
    """Raise where the checkpoint's model is not the one that a stage would build."""
    built = hf_config(model).to_dict()
    for name in FIXED:
        if values.get(name) != built.get(name):
            raise UserError(
                f"{source}/config.json: {name} is {values.get(name)!r}, supported for {model.architecture} is "
                f"{built.get(name)!r}"
            )
    width = model.hidden_size // model.num_attention_heads
    if values.get("head_dim") not in (None, width):
        raise UserError(f"{source}/config.json: head_dim is {values['head_dim']}, supported is {width}")
