"""One adapter after another, in microbatches of a fixed number of samples: Megatron-LM, and PEFT on one device."""

from lorafusion.core.plan import Microbatch, Plan, make_plan
from lorafusion.core.workload import Workload
from lorafusion.planning.common import fixed_size_batches, insert_noops, require_samples_fit


def plan(workload: Workload, system: str, stages: int, capacity: int, data_parallel: int = 1) -> Plan:
    """All global batches of the first adapter, then of the second; the pipeline drains after each (1F1B with flush)."""
    require_samples_fit(workload, capacity)
    microbatches: list[Microbatch] = []
    for adapter in range(len(workload.jobs)):
        batches = fixed_size_batches(workload, adapter, capacity, data_parallel)
        order = [microbatch for batch in batches for microbatch in batch]
        # Slots of this adapter alone, and after a flush the next one sees the step.
        microbatches += insert_noops(order, workload, 1, data_parallel)
    return make_plan(
        system,
        workload,
        microbatches,
        stages=stages,
        capacity=capacity,
        data_parallel=data_parallel,
        flush=True,
    )
