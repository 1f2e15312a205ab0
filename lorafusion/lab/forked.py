"""The fork server of the laboratory: its processes have imported what the tasks and systems here need besides."""

from lorafusion.engine.fork_server import FORKSERVER, launch, preload

__all__ = ["FORKSERVER", "MODULES", "launch"]

MODULES = (
    "lorafusion.lab.cost",
    "lorafusion.lab.trials",
    "baselines.mlora.lora",
    "baselines.megatron.sharded",
    "baselines.megatron.pipeline",
)

preload(*MODULES)
