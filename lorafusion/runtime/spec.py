"""What a worker is told: everything that one run needs, in one JSON file."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from lorafusion.config import Config

DType = Literal["float64", "float32", "bfloat16", "float16"]


class RunSpec(Config):
    """One run of one system. Paths are absolute or relative to the working directory."""

    system: str = Field(description="a name of configs/systems.yaml")
    model: str = Field(description="a name of configs/models, or the path of such a file")
    workload: str = Field(description="path of the workload file")
    plan: str = Field(description="path of the plan file")
    device: Literal["cpu", "cuda"] = "cpu"
    dtype: DType = "float32"
    adapter_dtype: DType = "float32"
    seed: int = Field(default=1, ge=0, description="draws the base model's random weights")
    checkpointing: bool = False
    save_adapters: str | None = Field(default=None, description="folder to write the trained adapters to")
