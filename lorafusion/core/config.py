"""Configuration files of the product: where they are, how they are read, and what models and systems may say."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, TypeVar

from pydantic import BeforeValidator, Field, model_validator

from lorafusion.core.files import read_yaml
from lorafusion.core.schema import MOST_LAYERS, MOST_PROCESSES, MOST_TOKENS, Config, UserError, one_of, validated
from lorafusion.core.source_tree import IS_CHECKOUT, ROOT

# The build copies the checkout's folder into the package (setup.py).
CONFIGS = (ROOT if IS_CHECKOUT else ROOT / "lorafusion") / "configs"
Name = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)  # a part of a file's
Size = Annotated[int, Field(ge=1, le=2**24)]  # of a model
Processes = Annotated[int, Field(ge=1, le=MOST_PROCESSES)]
Entry = TypeVar("Entry", bound=Config)


def _word_of_switch(value: object) -> object:
    """`on` or `off` of a YAML file, which YAML 1.1 takes for true and false."""
    return ("off", "on")[value] if isinstance(value, bool) else value


ASKING_ROPES = ("dynamic", "longrope")  # types of transformers' rotary embeddings
Graphs = Annotated[Literal["auto", "on", "off"], BeforeValidator(_word_of_switch)]
Attention = Literal["auto", "cudnn", "flash"]


class ModelConfig(Config):
    """A file of configs/models: the published dimensions of a base model, and where its weights come from."""

    architecture: Literal["llama", "qwen2"]
    hidden_size: Size
    intermediate_size: Size
    num_hidden_layers: int = Field(ge=1, le=MOST_LAYERS)
    num_attention_heads: Size
    num_key_value_heads: Size
    vocab_size: int = Field(ge=2, le=2**24)
    max_position_embeddings: int = Field(ge=1, le=MOST_TOKENS)
    rms_norm_eps: float = Field(gt=0, le=1)
    rope_parameters: dict[str, int | float | str]
    tie_word_embeddings: bool = False
    initializer_range: float = Field(default=0.02, gt=0, le=10, description="standard deviation of random weights")
    weights: str = Field(
        default="random", description="`random`, a local folder with safetensors, or a repository on the hub"
    )
    revision: str | None = Field(default=None, description="commit or tag on the hub")

    @model_validator(mode="after")
    def _has_whole_heads(self) -> ModelConfig:
        for key, of in (("hidden_size", "num_attention_heads"), ("num_attention_heads", "num_key_value_heads")):
            if getattr(self, key) % getattr(self, of):
                raise ValueError(f"{of}: expected a divisor of {key} {getattr(self, key)}, found {getattr(self, of)}")
        return self

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """(in, out) of the seven linears of a decoder layer, by the names that PEFT targets."""
        hidden, inner = self.hidden_size, self.intermediate_size
        keys = hidden * self.num_key_value_heads // self.num_attention_heads
        return {
            "q_proj": (hidden, hidden),
            "k_proj": (hidden, keys),
            "v_proj": (hidden, keys),
            "o_proj": (hidden, hidden),
            "gate_proj": (hidden, inner),
            "up_proj": (hidden, inner),
            "down_proj": (inner, hidden),
        }


class SystemConfig(Config):
    """An entry of configs/systems.yaml: planner, executor and LoRA kind by import path, and their settings."""

    description: str
    planner: str = Field(description="module:function, workload to plan")
    options: dict[str, bool | int | str | None] = Field(default={}, description="keyword arguments of the planner")
    executor: str = Field(description="module:function, runs a plan on a stage")
    lora: str = Field(description="module:function, installs the LoRA forward on a stage")
    shard: str | None = Field(
        default=None, description="module:function, spreads a stage's parameters over replicas before they have values"
    )
    wide_adapters: bool = Field(
        default=False, description="adapters in float32 whatever the model is in, under autocast: PEFT as shipped"
    )
    liger: bool = Field(default=True, description="Liger's kernels for norms, rotation and gates, where installed")
    ablation: bool = Field(default=False, description="a system with a part of another; not compared as a baseline")
    max_gpus: int | None = Field(default=None, ge=1)
    max_stages: int | None = Field(default=None, ge=1)
    requires: str | None = Field(default=None, description="a Python package; without it runs are skipped")
    no_graphs: str | None = Field(
        default=None, description="why its stages cannot be captured as CUDA graphs; none of those that can"
    )

    @property
    def implementation(self) -> str:
        """What cost profiles call its way to compute adapters."""
        return self.lora.rpartition(":")[2] + "-wide" * self.wide_adapters


def names_in(folder: str) -> set[str]:
    """The names that the files of a folder of configs define."""
    return {path.stem for path in (CONFIGS / folder).glob("*.yaml")}


def read_entries(path: str | Path, model: type[Entry]) -> dict[str, Entry]:
    """A file whose top keys name entries of one kind; `UserError` names the entry and the key that is wrong."""
    return {name: validated(model, entry, f"{path}: {name}") for name, entry in read_yaml(path).items()}


def read_systems(path: str | Path = CONFIGS / "systems.yaml") -> dict[str, SystemConfig]:
    return read_entries(path, SystemConfig)


def read_system(name: str) -> SystemConfig:
    """An entry of configs/systems.yaml; `UserError` for an unknown one."""
    systems = read_systems()
    one_of("system", name, set(systems), "configs/systems.yaml")
    return systems[name]


def config_path(kind: str, name: str) -> Path:
    """A file of configs/{kind}s by its name, or by the path of a file of that form."""
    if name.endswith(".yaml"):
        return Path(name)
    folder = CONFIGS / f"{kind}s"
    one_of(kind, name, names_in(folder.name), folder)
    return folder / f"{name}.yaml"


def model_path(name: str) -> Path:
    return config_path("model", name)


def read_model(name: str) -> ModelConfig:
    path = model_path(name)
    return validated(ModelConfig, read_yaml(path), path)


def require_possible(name: str, system: SystemConfig, stages: int, data_parallel: int) -> None:
    """Raise where a system cannot have so many stages and replicas."""
    if system.max_gpus is not None and stages * data_parallel > system.max_gpus:
        raise UserError(f"system {name} runs on {system.max_gpus} gpus at most, found {stages * data_parallel}")
    if system.max_stages is not None and stages > system.max_stages:
        raise UserError(
            f"system {name} has {system.max_stages} stages at most, found {stages}; replicas are its data_parallel"
        )


def no_graphs(name: str, system: SystemConfig, device: str, model: ModelConfig | None = None) -> str:
    """Why a system's stages run without CUDA graphs on a device; empty where they need not. model: if it is known."""
    if device != "cuda":
        return f"the device is {device}, and graphs need a GPU"
    if system.no_graphs:
        return f"system {name} has no graphs, {system.no_graphs}"
    rope = str(model.rope_parameters.get("rope_type")) if model else ""
    if rope in ASKING_ROPES:
        return f"the host asks the device for the longest position of a rotary embedding of type {rope}"
    return ""


def require_attention(setting: Attention, device: str, where: str) -> None:
    """Raise where a device cannot have the attention that is asked for; where: the file and the key."""
    if setting == "cudnn" and device != "cuda":
        raise UserError(f"{where}: found cudnn, expected auto or flash: the device is {device}, and cuDNN needs a GPU")


def uses_graphs(setting: Graphs, reason: str, where: str) -> bool:
    """Do stages replay graphs? reason: that they cannot, or empty. Raises `UserError` where they are to and cannot;
    where: the file and the key."""
    if setting == "on" and reason:
        raise UserError(f"{where}: found on, expected auto or off: {reason}")
    return setting != "off" and not reason
