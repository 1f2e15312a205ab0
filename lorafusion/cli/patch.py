"""`lorafusion patch`: what the kernels would do for an adapter."""

import re
from pathlib import Path
from typing import Annotated

import typer

from lorafusion.cli.common import CommandLine
from lorafusion.core.schema import MOST_LAYERS, UserError, shown

LAYERS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers")  # the names that models have for their number

patch_app = CommandLine()


@patch_app.command("patch", example="lorafusion patch out/adapters/mine")
def patch(
    adapter: Annotated[str, typer.Argument(help="a PEFT adapter: its folder, or its repository on the hub")],
    base: Annotated[str | None, typer.Option(help="the base model: by default the one that the adapter names")] = None,
) -> None:
    """Say which LoRA linears of an adapter the kernels compute in training, and why they leave others to PEFT.

    No weights are read. In your own training write, after the model has its adapter:

    from fused_lora import patch; print(patch(model))"""
    if not Path(adapter).exists() and "/" not in adapter:
        raise UserError(f"{adapter}: expected the folder of an adapter, or a repository OWNER/NAME")
    import torch
    from huggingface_hub.errors import StrictDataclassError
    from peft import PeftConfig, PeftType, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    from fused_lora import patch
    from lorafusion.core.hub import HUB_ERRORS

    try:
        kind = _required(adapter, "adapter_config.json").get("peft_type")
        if kind != PeftType.LORA:
            raise UserError(f"{adapter}/adapter_config.json: peft_type: expected LORA, found {shown(kind)}")
        config = PeftConfig.from_pretrained(adapter)
        name = base or config.base_model_name_or_path
        if not name:
            raise UserError(f"{adapter}: expected an adapter that names its base model; or give --base")
        _require_size(_required(name, "config.json"), name)
        settings = AutoConfig.from_pretrained(name, trust_remote_code=False)
        with torch.device("meta"):
            model = get_peft_model(AutoModelForCausalLM.from_config(settings, trust_remote_code=False), config)
    except (
        *HUB_ERRORS,
        StrictDataclassError,
        ValueError,
        TypeError,
        KeyError,
        AttributeError,
        ArithmeticError,
        RuntimeError,
        re.error,
    ) as error:
        if isinstance(error, UserError):
            raise
        reason = str(error).partition("\n")[0]  # of torch, the frames of its stack follow
        raise UserError(f"{adapter}: cannot be read as an adapter with its base model: {reason}") from None
    print(patch(model))


def _required(source: str, name: str) -> dict:
    from lorafusion.core.hub import absent, read_settings

    settings = read_settings(source, name)
    if settings is None:
        raise absent(source, f"no {name}")
    return settings


def _require_size(settings: dict, source: str) -> None:
    """Each layer is built, if without its weights."""
    text = settings.get("text_config")
    values = settings | text if isinstance(text, dict) else settings
    for key in LAYERS:
        layers = values.get(key, 0)
        if isinstance(layers, int) and layers > MOST_LAYERS:
            raise UserError(f"{source}/config.json: {key}: expected at most {MOST_LAYERS}, found {shown(layers)}")
