"""`lorafusion patch`: what the kernels would do for an adapter."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from lorafusion.cli.common import CommandLine
from lorafusion.core.schema import UserError

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
    from peft import LoraConfig, PeftConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    from fused_lora import patch
    from lorafusion.core.hub import HUB_ERRORS, read_settings

    try:
        config = PeftConfig.from_pretrained(adapter)
        name = base or config.base_model_name_or_path
        if not isinstance(config, LoraConfig) or not name:
            raise UserError(f"{adapter}: expected a LoRA adapter that names its base model; or give --base")
        read_settings(name, "config.json")
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
