"""Notes how long a run waits for other processes within megatron-core and torch's FSDP2, which say nothing of it.

Their own code stays as it is. What is replaced are the methods in which they wait: a mark before and one behind.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from torch.distributed.fsdp._fully_shard import _fsdp_param_group

from baselines.megatron.device import replaced
from lorafusion.engine.record import WAIT
from lorafusion.engine.training import TrainingRun

WAITING: tuple[tuple[Any, str], ...] = (
    (P2PCommunicator, "_communicate"),  # with the stages before and after
    # Within a pass a layer's weights are gathered and its gradients reduced. A CPU waits where that begins, a GPU where
    # it ends.
    (_fsdp_param_group.FSDPParamGroup, "unshard"),
    (_fsdp_param_group.FSDPParamGroup, "wait_for_unshard"),
    (_fsdp_param_group, "foreach_reduce"),
    (_fsdp_param_group.FSDPParamGroup, "finalize_backward"),
)


@contextmanager
def waits_noted(run: TrainingRun) -> Iterator[None]:
    """Within it a run's record tells them, if there is anybody to wait for."""

    def noted(function: Callable) -> Callable:
        @wraps(function)
        def called(*arguments, **options):
            with run.record.timing(WAIT):
                return function(*arguments, **options)

        return called

    places = WAITING if run.pipeline.size * run.pipeline.replicas > 1 else ()
    with replaced(*((owner, name, noted(getattr(owner, name))) for owner, name in places)):
        yield
