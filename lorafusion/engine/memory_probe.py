"""How many tokens a microbatch may hold: what a forward and backward pass takes, measured at two sizes.

Measured before a run of `lorafusion train` that states no capacity (`planning.capacity` lists the other answers). The
measuring needs the GPUs; `capacity_of`, what follows from the numbers, is a pure function.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch

from lorafusion.core.plan import Microbatch, Plan, Segment, make_plan
from lorafusion.core.schema import UserError
from lorafusion.core.workload import Sample, Workload
from lorafusion.engine.build import build_run
from lorafusion.engine.process import WorkerProcess, gathered
from lorafusion.engine.training import TrainingRun
from lorafusion.planning.capacity import USABLE, rounded_down

SIZES = (2048, 4096)  # tokens; the chunks of the head's logits are full from 2048 on
WANTED = 8192  # tokens for which layers are rather computed again than microbatches made smaller
MOST = 32768  # tokens; larger microbatches are no faster
SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)  # of the layers, that may be computed again


class Needs(NamedTuple):
    """Bytes on a stage: there without a microbatch; kept by one until its backward; taken beyond that while it runs.
    The latter two as (fixed, for each token)."""

    base: float
    kept: tuple[float, float]
    passing: tuple[float, float]


class Measured(NamedTuple):
    """What a stage measured: usable bytes, microbatches that it holds at most, and its needs without and with all
    layers computed again."""

    usable: float
    in_flight: int
    whole: Needs
    recomputed: Needs

    def to_json(self) -> list:
        return [self.usable, self.in_flight, *self.whole, *self.recomputed]

    @classmethod
    def from_json(cls, values: list) -> Measured:
        usable, in_flight, *needs = values
        base, *pairs = zip(needs[:3], needs[3:], strict=True)
        return cls(usable, in_flight, *(Needs(base[i], *(tuple(pair[i]) for pair in pairs)) for i in range(2)))


def probe_workload(workload: Workload) -> tuple[Workload, Plan]:
    """The same adapters on synthetic samples: two microbatches, of the sizes to measure, with tokens of all jobs."""
    lengths = [max(2 * place, size // len(workload.jobs)) for place, size in enumerate(SIZES, 1)]
    jobs = tuple(
        job.model_copy(
            update={"samples": tuple(Sample(i, tokens) for i, tokens in enumerate(lengths)), "global_batch_size": 1,
                    "epochs": 1, "steps": None, "start": 0, "evaluation": (), "evaluate_every": None}
        )
        for job in workload.jobs
    )  # fmt: skip
    synthetic = Workload(name="probe", jobs=jobs)
    adapters = tuple(range(len(jobs)))
    microbatches = []
    for i, tokens in enumerate(lengths):
        segments = tuple(Segment(adapter=adapter, samples=(i,), tokens=tokens) for adapter in adapters)
        microbatches.append(Microbatch(segments=segments, step_after=adapters))
    plan = make_plan("probe", synthetic, microbatches, stages=1, capacity=max(len(jobs) * tokens for tokens in lengths))
    return synthetic, plan


def probe(process: WorkerProcess) -> dict:
    """The task that measures what microbatches take on every stage of the model, for `capacity_of`."""
    if process.device.type != "cuda":
        raise UserError("capacity: it can be probed on a GPU only; state it")
    usable = torch.cuda.mem_get_info(process.device)[0]
    workload, plan = probe_workload(Workload.read(process.spec.workload))
    synthetic = replace(process, spec=process.spec.model_copy(update={"tokens": None}))
    run = build_run(synthetic, workload, plan.model_copy(update={"stages": process.world}))
    measured = measure(run, usable, in_flight=run.pipeline.size - run.pipeline.index)
    return {"stages": [stage.to_json() for stage in gathered(measured)]}


def measure(run: TrainingRun, usable: int, in_flight: int) -> Measured:
    """What microbatches take on this stage. run: of `probe_workload`, on its stage alone; usable: bytes that were free
    before the model."""
    needs = []
    for share in (0.0, 1.0):
        run.stage.recompute(share)
        needs.append(_needs(run))
    return Measured(USABLE * usable, in_flight, *needs)


def _needs(run: TrainingRun) -> Needs:
    run.backward_alone(0)
    for adapter in run.adapters:
        adapter.step(torch.zeros((), dtype=run.norm_dtype, device=run.pipeline.device))
    sizes = []
    for slot in range(len(SIZES)):
        gc.collect()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        kept = run.kept_by_forward(slot)
        sizes.append((run.microbatches[slot].tokens, kept, torch.cuda.max_memory_allocated() - before - kept))
    (tokens, *first), (more, *second) = sizes
    lines = []
    for small, large in zip(first, second, strict=True):
        slope = max(0.0, (large - small) / (more - tokens))
        lines.append((max(0.0, small - slope * tokens), slope))
    return Needs(float(before), *lines)


def capacity_of(
    stages: Sequence[Measured], longest: int, share: float | None, wanted: int | None = None, graphs: bool = False
) -> tuple[int, float]:
    """Tokens of a microbatch that fit on every stage, and the share of the layers that is computed again for that.

    longest: tokens of the longest sample, that must fit. share: as it was asked for, or None for the least with which
    the wanted tokens fit, by default WANTED. graphs: each microbatch in flight has a pool of memory of its own, which
    all buckets share. Raises `UserError` where the longest sample does not fit.
    """
    chosen = (0, 0.0)
    for tried in SHARES if share is None else (share,):
        capacity = min(_capacity(stage, tried, graphs) for stage in stages)
        chosen = max(chosen, (min(capacity, MOST), tried), key=lambda choice: choice[0])
        if capacity >= max(wanted or WANTED, longest):
            break
    capacity, used = chosen
    capacity = rounded_down(capacity)
    if capacity < longest:
        raise UserError(
            f"capacity: {max(0, capacity)} tokens of activations fit in the memory, {used:.0%} of the layers computed "
            f"again; the longest sample has {longest}. Take more processes, shorter samples (max_length) or fewer jobs"
        )
    return capacity, used


def _capacity(stage: Measured, share: float, graphs: bool) -> int:
    """Tokens that fit on one stage with a share of its layers computed again."""

    def mixed(index: int) -> float:
        return (1 - share) * stage.whole.kept[index] + share * stage.recomputed.kept[index]

    passing = (stage.recomputed if share else stage.whole).passing
    pools = stage.in_flight if graphs else 1  # that have what passes
    fixed = stage.whole.base + stage.in_flight * mixed(0) + pools * passing[0]
    each = stage.in_flight * mixed(1) + pools * passing[1]
    return int((stage.usable - fixed) / each)
