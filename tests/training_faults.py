"""Faults of a training that a check must see, on any device; and runs in this process, which they reach."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fused_lora import LoRABatch, ops
from lorafusion.core.workload import Job
from lorafusion.data.packing import BatchBuilder, SampleBorders
from lorafusion.engine.process import WorkerProcess
from lorafusion.engine.task import train
from lorafusion.launch.heartbeat import Position
from lorafusion.launch.outcome import Outcome
from lorafusion.launch.spec import RunSpec
from lorafusion.model import attention

Fault = Callable[[pytest.MonkeyPatch], None]
FAULTS: dict[str, Fault] = {}


def launched_here(spec: RunSpec, processes: int, *_: object, folder: Path, **__: object) -> Outcome:
    """`lorafusion.launch.launch.launch` for one process: this one."""
    assert processes == 1
    device = torch.device("cuda", 0) if spec.device == "cuda" else torch.device("cpu")
    report = train(WorkerProcess(spec, device, Position(folder, 0)))
    return Outcome("ok", report=report)


def fault(made: Fault) -> Fault:
    FAULTS[made.__name__] = made
    return made


@fault
def scale_times_1_02(patches):
    original = Job.scaling
    patches.setattr(Job, "scaling", property(lambda job: original.fget(job) * 1.02))


@fault
def da_times_0_98(patches):
    def shorter(backward):
        def run(*arguments):
            inputs, da, db = backward(*arguments)
            return inputs, da * 0.98, db

        return run

    _around(patches, ops.linear_backward, shorter)


@fault
def dx_without_lora(patches):
    def base_alone(backward):
        def run(operands, settings, dys, inputs, weights, *rest):
            gradients, da, db = backward(operands, settings, dys, inputs, weights, *rest)
            if len(inputs) == 1:
                gradients = [sum(dy @ weight for dy, weight in zip(dys, weights, strict=True))]
            return gradients, da, db

        return run

    _around(patches, ops.linear_backward, base_alone)


@fault
def attention_across_samples(patches):
    original = attention.packed_attention

    def across(*arguments, borders, **options):
        first, *others = borders.lengths
        lengths = [first + others[0], *others[1:]] if others else [first]
        return original(*arguments, borders=SampleBorders.of(lengths, borders.offsets.device), **options)

    _everywhere(patches, "packed_attention", across)


@fault
def swapped_adapters(patches):
    _with_owners(patches, lambda segments: [replace(segment, adapter=1 - segment.adapter) for segment in segments])


@fault
def border_off_by_one(patches):
    def shifted(segments):
        first, *others = segments
        if others:
            first, second = replace(first, stop=first.stop + 1), replace(others[0], start=others[0].start + 1)
            others = [second, *others[1:]]
        return [first, *others]

    _with_owners(patches, shifted)


def _with_owners(patches, changed) -> None:
    """Have kernels take a microbatch's segments for others."""
    original = BatchBuilder.build

    def build(*arguments):
        batch = original(*arguments)
        return replace(batch, lora=LoRABatch.of(changed(batch.segments), batch.positions))

    patches.setattr(BatchBuilder, "build", build)


def _around(patches, operator, made) -> None:
    """Have an operator's kernels, on each device, be what is made of them."""
    for (one, device), kernel in list(ops.KERNELS.items()):
        if one is operator:
            patches.setitem(ops.KERNELS, (one, device), made(kernel))


def _everywhere(patches, name, value) -> None:
    """transformers' interface has the function itself, Liger's attention a name of its module."""
    from transformers import AttentionInterface

    from lorafusion.model import liger

    patches.setattr(liger, name, value)
    patches.setitem(AttentionInterface._global_mapping, attention.NAME, value)
