"""A base model described by the config.json of its Hugging Face folder or repository."""

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig

from lorafusion.core.config import ModelConfig
from lorafusion.core.hub import HUB_ERRORS
from lorafusion.core.schema import UserError, validated
from lorafusion.model.pretrained import look_at
from lorafusion.model.stage import hf_config


def huggingface_model(source: str, revision: str | None = None) -> ModelConfig:
    """The model in a local folder or a repository of the hub, with its weights.

    Raises `UserError` for one that cannot be had, is of another architecture, or differs from its family in something
    that a stage would not compute.
    """
    look_at(source, revision, weights=False)
    try:
        config = AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=False)
    except (*HUB_ERRORS, StrictDataclassError, ValueError, TypeError, LookupError, AttributeError) as error:
        reason = " ".join(str(error).split())[:120]
        raise UserError(f"model {source!r}: no description to be had from its config.json ({reason})") from None
    values = config.to_dict()
    fields = {name: values[name] for name in ModelConfig.model_fields if name in values}
    described = {"architecture": config.model_type, "weights": source, "revision": revision}
    model = validated(ModelConfig, fields | described, f"{source}/config.json")
    layers = hf_config(model).to_dict().get("layer_types")
    if values.get("layer_types") != layers:
        raise UserError(f"{source}/config.json: layer_types is {values.get('layer_types')!r}, supported is {layers!r}")
    return model
