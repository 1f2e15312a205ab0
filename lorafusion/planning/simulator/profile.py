"""A cost profile: what a device took for the layers of some models, fitted (`lorafusion.lab.cost_profile`), as a file.

A fit is of a model's dimensions and of a way to compute adapters. From it follows the cost model of that model on any
number of stages.
"""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from lorafusion.core.config import ModelConfig
from lorafusion.core.files import read_yaml
from lorafusion.core.schema import Config, UserError, validated
from lorafusion.planning.partition import head_layers, split_layers
from lorafusion.planning.simulator.costs import CostModel, LayerCosts

DIMENSIONS = ("architecture", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads",
              "vocab_size")  # fmt: skip
VERSION: Literal[1] = 1


class CostFit(Config):
    """The costs of a model's layers in one implementation of adapters, and how well they fit what was measured."""

    model: str
    dimensions: dict[str, str | int] = Field(description="of the model, that the costs depend on")
    implementation: str = Field(description="as `SystemConfig.implementation`, or frozen")
    system: str | None = Field(default=None, description="whose executor's own work is among the costs")
    costs: LayerCosts
    points: int = Field(ge=1, description="microbatches that were measured")
    mean_error: float = Field(ge=0, description="of each point as the others predict it, relative")
    worst_error: float = Field(ge=0)
    saved_bytes: float = Field(default=0.0, ge=0, description="of a token in a layer, kept for the backward pass")


class CostProfile(Config):
    """A file of configs/machines, or one that `lorafusion lab profile-costs` has written."""

    version: Literal[1] = VERSION
    device: Literal["cpu", "cuda"]
    gpu_name: str | None = Field(default=None, description="as nvidia-smi says; none of a CPU")
    dtype: str
    made_from: dict[str, str | int | float | bool | None] = Field(default={}, description="suite, commit, versions")
    fits: Annotated[tuple[CostFit, ...], Field(min_length=1)]

    def fit(self, config: ModelConfig, implementation: str, system: str | None = None) -> CostFit | None:
        """That of a model and an implementation, if there is one; that of the system, if it has one of its own."""
        dimensions = dimensions_of(config)
        fits = {fit.system: fit for fit in reversed(self.fits)
                if fit.dimensions == dimensions and fit.implementation == implementation}  # fmt: skip
        return fits.get(system, fits.get(None))

    def require_fit(self, config: ModelConfig, implementation: str, source: str | Path) -> CostFit:
        """As `fit`; `UserError` says which there are."""
        fit = self.fit(config, implementation)
        if fit is None:
            others = sorted({f"{other.model} ({other.implementation})" for other in self.fits})
            wanted = f"hidden_size {config.hidden_size}, vocab_size {config.vocab_size} ({implementation})"
            raise UserError(f"{source}: fits: found {', '.join(others)}; expected a model of {wanted}")
        return fit


def dimensions_of(config: ModelConfig) -> dict[str, str | int]:
    """What the costs of a layer and of the head depend on."""
    return config.model_dump(mode="json", include=set(DIMENSIONS))


def stage_costs(fit: CostFit, config: ModelConfig, stages: int, checkpointing: bool) -> CostModel:
    """The cost model of a model on a number of stages."""
    layers = split_layers(config.num_hidden_layers, stages, head_layers(config))
    return CostModel(**fit.costs.model_dump() | {"layers": layers, "checkpointing": checkpointing})


def is_profile(path: Path) -> bool:
    """Is a file with costs a profile, and not a cost model?"""
    data = read_yaml(path)
    return isinstance(data, dict) and "fits" in data


def read_profile(path: str | Path) -> CostProfile:
    """A profile; `UserError` names the file and the key that is wrong."""
    return validated(CostProfile, read_yaml(path), path)
