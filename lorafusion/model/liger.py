"""Liger's norms, rotations and activations in a stage, which keep less for the backward pass than transformers' own.

The RMSNorm keeps its input and one number a token, where transformers' keeps a float32 copy; the gate of an MLP keeps
gate and up, and not silu(gate); queries and keys are rotated where they are, in one kernel instead of ten.
"""

import importlib.util
from functools import partial

import torch
from torch import nn

from lorafusion.core.schema import UserError
from lorafusion.data.packing import SampleBorders
from lorafusion.model.attention import packed_attention
from lorafusion.model.stage import ARCHITECTURES, Stage, is_gated_mlp


def use_liger(stage: Stage) -> None:
    """Replace the forwards of a stage's norms, attentions and gated MLPs. Parameters and modules stay what they are.

    To be called before `inject_adapters`: the kind `fused` then gives an MLP a forward that keeps still less. Raises
    `UserError` where the stage is on no GPU (it may have no storage yet) or Liger is not installed.
    """
    device = next(stage.parameters()).device
    if device.type not in ("cuda", "meta"):
        raise UserError(f"liger: its kernels need a GPU, but the stage is on {device.type}")
    if not is_installed():
        raise UserError("liger: not installed; pip install liger-kernel, in the version of requirements.lock")
    install(stage)


def is_installed() -> bool:
    return importlib.util.find_spec("liger_kernel") is not None


def is_used(stage: Stage) -> bool:
    """Are the forwards of a stage's norms Liger's?"""
    return any(isinstance(module.forward, partial) and module.forward.func is _norm for module in stage.modules())


def install(stage: Stage) -> None:
    """What `use_liger` does, unchecked."""
    norms = tuple(parts.norm for parts in ARCHITECTURES.values())
    attentions = tuple(parts.attention for parts in ARCHITECTURES.values())
    for module in stage.modules():
        if isinstance(module, norms):
            module.forward = partial(_norm, module)
        elif isinstance(module, attentions):
            module.forward = partial(_attention, module)
        elif is_gated_mlp(module):
            module.forward = partial(_gated_mlp, module)


def _norm(norm: nn.Module, x: torch.Tensor) -> torch.Tensor:
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    # In place: its backward pass writes dx over the gradient of its result, which comes from linears alone and which
    # nobody else holds; it is not that of the residual stream, which two hold.
    return LigerRMSNormFunction.apply(x, norm.weight, norm.variance_epsilon, 0.0, "llama", True)


def _attention(
    attention: nn.Module,
    hidden_states: torch.Tensor,
    position_embeddings: tuple[torch.Tensor, torch.Tensor],
    attention_mask: torch.Tensor | None = None,
    *,
    borders: SampleBorders,
    **_: object,
) -> tuple[torch.Tensor, None]:
    """The forward of Llama's and Qwen2's attention, over packed samples."""
    from liger_kernel.ops.rope import LigerRopeFunction

    shape = (*hidden_states.shape[:-1], -1, attention.head_dim)
    linears = (attention.q_proj, attention.k_proj, attention.v_proj)
    query, key, value = (linear(hidden_states).view(shape).transpose(1, 2) for linear in linears)
    # In place, in both passes: no linear keeps its result, nor attention the gradients that it returns.
    query, key = LigerRopeFunction.apply(query, key, *position_embeddings)
    out, _ = packed_attention(attention, query, key, value, None, borders=borders, scaling=attention.scaling)
    return attention.o_proj(out.reshape(*hidden_states.shape[:-1], -1)), None


def _gated_mlp(mlp: nn.Module, x: torch.Tensor) -> torch.Tensor:
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    # Its backward pass writes the gradients over gate and up. Neither the linears that made them keep them, nor the
    # one that follows; and whatever runs again, a CUDA graph or a checkpointed layer, makes them anew.
    return mlp.down_proj(LigerSiLUMulFunction.apply(mlp.gate_proj(x), mlp.up_proj(x)))
