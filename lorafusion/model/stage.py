"""One pipeline stage of a causal language model: some decoder layers, and the embedding or the head at the ends.

The layers are transformers' own. Only this stage's parameters ever exist: they are built without storage, then
filled one by one, from a seeded generator or from the tensors of a checkpoint. Module names are those of the whole
Hugging Face model (`model.layers.7.self_attn.q_proj`), so that checkpoints and adapters keep their format.
"""

import hashlib
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import NamedTuple

import torch
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.checkpoint import checkpoint
from transformers.activations import SiLUActivation
from transformers.models.llama import modeling_llama
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.qwen2 import modeling_qwen2
from transformers.models.qwen2.configuration_qwen2 import Qwen2Config

from lorafusion.core.config import ModelConfig
from lorafusion.core.workload import MERGED, MERGED_PARTS
from lorafusion.data.packing import SampleBorders
from lorafusion.model import attention
from lorafusion.planning.partition import layer_range


class Architecture(NamedTuple):
    """The transformers classes that a model family is made of."""

    config: type
    layer: type[nn.Module]
    attention: type[nn.Module]
    norm: type[nn.Module]
    mlp: type[nn.Module]
    rotary: type[nn.Module]


ARCHITECTURES = {
    "llama": Architecture(
        LlamaConfig,
        modeling_llama.LlamaDecoderLayer,
        modeling_llama.LlamaAttention,
        modeling_llama.LlamaRMSNorm,
        modeling_llama.LlamaMLP,
        modeling_llama.LlamaRotaryEmbedding,
    ),
    "qwen2": Architecture(
        Qwen2Config,
        modeling_qwen2.Qwen2DecoderLayer,
        modeling_qwen2.Qwen2Attention,
        modeling_qwen2.Qwen2RMSNorm,
        modeling_qwen2.Qwen2MLP,
        modeling_qwen2.Qwen2RotaryEmbedding,
    ),
}


class Stage(nn.Module):
    """Decoder layers [first, last) of a model on stage `index` of `count`.

    forward(x, position_ids, borders): x is token ids [1, T] on the first stage, else hidden states [1, T, H];
    returns hidden states [1, T, H], on the last stage those that the head takes. checkpointing: the share of the
    layers, from the first on, whose activations are not kept but computed again in the backward pass.

    heads: of its attention. attention: of `attention.BACKENDS`, what computes it on a GPU.

    draws: does a layer draw from torch's generator, whose state computing it again must then begin with? It cannot be
    read while a CUDA graph is captured.
    """

    def __init__(self, config: ModelConfig, index: int, count: int, checkpointing: float = 0.0) -> None:
        super().__init__()
        parts = ARCHITECTURES[config.architecture]
        self.hf_config = hf_config(config)
        self.heads, self.attention = attention.Heads.of(config), "flash"
        self.first, self.last = layer_range(config, index, count)
        self.is_first, self.is_last = index == 0, index == count - 1
        self.draws = True
        self.recompute(checkpointing)
        # The parameters have no storage until `fill_weights`.
        with torch.device("meta"):
            self.model = nn.Module()
            self.model.layers = nn.ModuleDict(
                {str(i): parts.layer(self.hf_config, i) for i in range(self.first, self.last)}
            )
            if self.is_first:
                self.model.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
            if self.is_last:
                self.model.norm = parts.norm(config.hidden_size, eps=config.rms_norm_eps)
                self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.requires_grad_(False)
        # Its frequencies are computed, not loaded, so it is built with storage and stays float32.
        self.rotary = parts.rotary(self.hf_config)

    def recompute(self, share: float) -> None:
        """From now on compute the activations of this share of the layers again in the backward pass."""
        self.checkpointed = self.first + math.ceil(share * (self.last - self.first))

    @contextmanager
    def first_layers_alone(self) -> Iterator[None]:
        """Within it the stage has its first two layers only, which do what all of them do: the model's first one has no
        gradient for its input, all others have."""
        layers = self.model.layers
        self.model.layers = nn.ModuleDict(dict(islice(layers.items(), 2)))
        try:
            yield
        finally:
            self.model.layers = layers

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor, borders: SampleBorders) -> torch.Tensor:
        hidden = self.model.embed_tokens(x) if self.is_first else x
        rotation = self.rotary(hidden, position_ids)
        borders = attention.prepared(borders, self.attention, self.heads, hidden)
        for index, layer in enumerate(self.model.layers.values(), self.first):
            if index < self.checkpointed and torch.is_grad_enabled():
                hidden = checkpoint(layer, hidden, position_embeddings=rotation, borders=borders, use_reentrant=False,
                                    preserve_rng_state=self.draws)  # fmt: skip
            else:
                hidden = layer(hidden, position_embeddings=rotation, borders=borders)
        return self.model.norm(hidden) if self.is_last else hidden


def is_gated_mlp(module: nn.Module) -> bool:
    """Does it compute down_proj(silu(gate_proj(x)) * up_proj(x))?"""
    gated = tuple(parts.mlp for parts in ARCHITECTURES.values())
    return isinstance(module, gated) and isinstance(module.act_fn, nn.SiLU | SiLUActivation)


def hf_config(config: ModelConfig):
    """The transformers configuration of a model, with packed attention."""
    fields = config.model_dump(exclude={"architecture", "weights", "revision"})
    built = ARCHITECTURES[config.architecture].config(**fields)
    built._attn_implementation = attention.NAME
    return built


def build_stage(
    config: ModelConfig,
    *,
    index: int,
    count: int,
    device: torch.device,
    dtype: torch.dtype,
    seed: int,
    checkpointing: float = 0.0,
) -> Stage:
    """A frozen stage with its weights on `device`; random weights are the same however the model is cut."""
    stage = Stage(config, index, count, checkpointing)
    fill_weights(stage, config, device=device, dtype=dtype, seed=seed)
    return stage.train()


def fill_weights(stage: Stage, config: ModelConfig, *, device: torch.device, dtype: torch.dtype, seed: int) -> None:
    """Give the base model's parameters, which are without storage, their values on `device`.

    One whole parameter exists at a time: of one that is sharded over several processes only this one's part is kept.
    """
    if config.weights == "random":
        fill = _random_weights(seed, stage.hf_config.initializer_range)
    else:
        from lorafusion.model.weights import checkpoint_weights

        fill = checkpoint_weights(config)
    for name, parameter in [pair for pair in stage.named_parameters() if pair[1].is_meta]:
        parts = [fill(part, shape, device, dtype) for part, shape in _parts(name, parameter.shape, config)]
        value = parts[0] if len(parts) == 1 else torch.cat(parts)
        if isinstance(parameter, DTensor):
            # All processes make the same value, so that nothing is sent.
            value = distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)
        owner = stage.get_submodule(name.rpartition(".")[0])
        setattr(owner, name.rpartition(".")[2], nn.Parameter(value, requires_grad=False))
    stage.rotary.to(device)


def _parts(name: str, shape: torch.Size, config: ModelConfig) -> list[tuple[str, torch.Size]]:
    """The tensors of a checkpoint, with their shapes, that follow each other in a parameter's rows."""
    name = name.replace(".base_layer.", ".")
    if f".{MERGED}." not in name:
        return [(name, shape)]
    rows = [config.linears[part][1] for part in MERGED_PARTS]
    return [
        (name.replace(MERGED, part), torch.Size((count, *shape[1:])))
        for part, count in zip(MERGED_PARTS, rows, strict=True)
    ]


Fill = Callable[[str, torch.Size, torch.device, torch.dtype], torch.Tensor]


def _random_weights(seed: int, std: float) -> Fill:
    """Weights as transformers initialises them, each parameter a pure function of seed and name."""

    def fill(name: str, shape: torch.Size, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
        if name.endswith("norm.weight"):
            return torch.ones(shape, device=device, dtype=dtype)
        if name.endswith(".bias"):
            return torch.zeros(shape, device=device, dtype=dtype)
        value = torch.empty(shape, device=device, dtype=dtype)
        return value.normal_(0.0, std, generator=named_generator(seed, name, device))

    return fill


def named_generator(seed: int, name: str, device: torch.device) -> torch.Generator:
    """A generator for one parameter, the same whatever else is drawn or built."""
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=7).digest()
    return torch.Generator(device=device).manual_seed(int.from_bytes(digest, "little"))
