"""What a worker is told: everything that one run needs, in one JSON file."""

from typing import Any, Literal

from pydantic import Field

from lorafusion.core.config import Attention
from lorafusion.core.schema import Config
from lorafusion.launch.lock import Lock

TRAIN = "lorafusion.engine.task:train"
PROBE_MEMORY = "lorafusion.engine.memory_probe:probe"
STOP_FILE = "stop"  # in the folder of checkpoints: somebody wants the run to save and end
DType = Literal["float64", "float32", "bfloat16", "float16"]


class Saving(Config):
    """Checkpoints of a run, and where it can be asked to stop."""

    folder: str = Field(description="holds the checkpoints; the run resumes from the newest whole one of the same plan")
    every: int = Field(default=100, ge=1, description="slots between two checkpoints")
    keep: int = Field(default=2, ge=1, description="checkpoints that are kept")


class RunSpec(Config):
    """One run of one system. Paths are absolute or relative to the working directory."""

    system: str = Field(description="a name of configs/systems.yaml")
    model: str = Field(description="a name of configs/models, or the path of such a file")
    workload: str = Field(description="path of the workload file")
    task: str = Field(
        default=TRAIN, pattern=r"^[\w.]+:\w+$", description="module:function, what the processes do (`engine.task`)"
    )
    options: dict[str, Any] = Field(default={}, description="the task's own settings, which it checks")
    plan: str | None = Field(default=None, description="path of the plan file, for tasks that run one")
    tokens: str | None = Field(default=None, description="folder of the samples' tokens; synthetic where there is none")
    device: Literal["cpu", "cuda"] = "cpu"
    dtype: DType = "float32"
    adapter_dtype: DType = "float32"
    seed: int = Field(default=1, ge=0, description="draws the base model's random weights")
    checkpointing: float = Field(default=0.0, ge=0, le=1, description="share of the layers that are recomputed")
    attention: Attention = Field(default="flash", description="`model.attention.chosen_backend`")
    needs_graphs: bool = Field(
        default=False, description="a stage that cannot be captured though its plan has buckets is an error"
    )
    saving: Saving | None = None
    lock: Lock | None = Field(default=None, description="of the folder that the run writes to, where it may be shared")
    initial: str | None = Field(default=None, description="folder of adapters that are trained in part already")
    save_gradients: str | None = Field(
        default=None, description="folder to write the gradient of each adapter's first step to, before the step"
    )
    save_adapters: str | None = Field(default=None, description="folder to write the trained adapters to")
    events: str | None = Field(default=None, description="folder for what becomes known while the run goes on")
