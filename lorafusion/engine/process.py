"""One process of a run, as the task that it runs gets it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from lorafusion.core.clock import Meter
from lorafusion.core.plan import Plan
from lorafusion.core.schema import UserError
from lorafusion.launch.heartbeat import Position
from lorafusion.launch.spec import RunSpec


@dataclass
class WorkerProcess:
    """meter: by default the device's. keep: is given a report that is to
    stand even if the process ends before its task does; the report's `pending` then names the part that is missing."""

    spec: RunSpec
    device: torch.device
    position: Position
    rank: int = 0
    world: int = 1
    meter: Meter | None = None
    keep: Callable[[dict], object] = lambda report: None

    def require_processes(self, plan: Plan, source: str) -> None:
        """Raise unless there are as many processes as a plan is made for."""
        if plan.stages * plan.data_parallel != self.world:
            raise UserError(
                f"{source}: made for {plan.stages} stages and {plan.data_parallel} replicas, "
                f"but the run has {self.world} processes"
            )


def gathered(part: Any) -> list[Any]:
    """What each process of the run has, in the order of their ranks; all of them call it."""
    if not dist.is_initialized():
        return [part]
    parts = [None] * dist.get_world_size()
    dist.all_gather_object(parts, part)
    return parts
