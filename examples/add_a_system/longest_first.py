"""Longest job first: adapters one after another, the one with the most tokens first."""

from lorafusion.core.plan import Plan, make_plan
from lorafusion.core.workload import Workload
from lorafusion.planning.common import insert_noops, microbatches_of, require_samples_fit


def plan(workload: Workload, system: str, stages: int, capacity: int, data_parallel: int = 1) -> Plan:
    """One sample a microbatch: simple, and slow."""
    require_samples_fit(workload, capacity)
    order = sorted(range(len(workload.jobs)), key=lambda index: -workload.jobs[index].tokens)
    contents = [
        {adapter: [position]}
        for adapter in order
        for batch in workload.jobs[adapter].batches[workload.jobs[adapter].start :]
        for position in batch
    ]
    microbatches = insert_noops(microbatches_of(workload, contents), workload, stages, data_parallel)
    return make_plan(system, workload, microbatches, stages=stages, capacity=capacity, data_parallel=data_parallel)
