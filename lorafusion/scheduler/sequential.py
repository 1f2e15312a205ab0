"""One adapter after another, in microbatches of a fixed number of samples: Megatron-LM, and PEFT on one device."""

from __future__ import annotations

from lorafusion.plan import Plan, make_plan
from lorafusion.scheduler.common import fixed_size_batches, require_samples_fit
from lorafusion.workload import Workload


def plan(workload: Workload, system: str, stages: int, capacity: int) -> Plan:
    """All global batches of the first adapter, then of the second; the pipeline drains after each (1F1B with flush)."""
    require_samples_fit(workload, capacity)
    microbatches = [
        microbatch
        for adapter in range(len(workload.jobs))
        for batch in fixed_size_batches(workload, adapter, capacity)
        for microbatch in batch
    ]
    return make_plan(system, workload, microbatches, stages=stages, capacity=capacity, flush=True)
