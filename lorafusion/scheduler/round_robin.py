"""mLoRA's order (LoRAPP of arXiv 2312.02515, 1F1B mode): adapters take turns by whole global batches.

A microbatch holds a fixed number of consecutive samples of one adapter, packed without padding here. Where too few
adapters are left to cover the S-1 slots between two global batches of one, the pipeline waits: those no-ops are
mLoRA's own bubble, not a fault of the plan.
"""

from __future__ import annotations

from itertools import zip_longest

from lorafusion.plan import Plan, make_plan
from lorafusion.scheduler.common import fixed_size_batches, insert_noops, require_samples_fit
from lorafusion.workload import Workload


def plan(workload: Workload, system: str, stages: int, capacity: int, data_parallel: int = 1) -> Plan:
    """Batch j of every adapter in turn, then batch j+1."""
    require_samples_fit(workload, capacity)
    by_adapter = [fixed_size_batches(workload, adapter, capacity) for adapter in range(len(workload.jobs))]
    order = [
        microbatch
        for round_of_batches in zip_longest(*by_adapter, fillvalue=[])
        for batch in round_of_batches
        for microbatch in batch
    ]
    microbatches = insert_noops(order, workload, stages, data_parallel)
    return make_plan(system, workload, microbatches, stages=stages, capacity=capacity, data_parallel=data_parallel)
