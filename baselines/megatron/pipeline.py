"""Megatron-LM's pipeline parallelism: megatron-core's 1F1B schedule, unmodified, with a flush at each global batch.

Reproduced, from megatron-core 0.16.1: `get_forward_backward_func()` (1F1B without interleaving, or no pipelining on
one stage), its point-to-point communication with the exchange of shapes that variable lengths need, its deallocation of
pipeline outputs, its `DistributedDataParallel` with a gradient buffer for each adapter, and `finalize_model_grads`.
Adapters are trained one after another, as Megatron has no way to share a base model among them.

Not reproduced: Megatron's own transformer layers (without Transformer Engine they have no packed attention), tensor
parallelism, and its optimizer, whose float32 copies and state would be another training than everybody else's. AdamW
is that of every other system, on the buffers that Megatron's reduction filled: a plain optimizer beside that
`DistributedDataParallel` finds no gradients at all and changes nothing, as in the published comparison.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import NamedTuple

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads

from baselines.megatron.device import device_of
from baselines.megatron.schedule import MegatronStage, forward_and_backward, global_batches, initialise
from baselines.megatron.waits import waits_noted
from lorafusion.core.schema import UserError
from lorafusion.engine.adapters import AdapterTraining
from lorafusion.engine.executor import prepared_by
from lorafusion.engine.training import TrainingRun


class Wrapped(NamedTuple):
    """The stage as megatron-core's schedules take it, and as its `DistributedDataParallel` has it for each adapter."""

    stage: MegatronStage
    models: list[DistributedDataParallel]


@contextmanager
def wrapped(run: TrainingRun) -> Iterator[Wrapped]:
    """The stage in Megatron's hands: its process groups, and a buffer for each adapter's gradients."""
    if run.active.stacks:
        raise UserError("megatron-pp: adapters in stacks have no gradients of their own; take a LoRA kind without them")
    initialise(run.pipeline)
    stage = MegatronStage(run.stage, run.pipeline)
    stage.run = run
    with device_of(run.pipeline.device):
        models = [_data_parallel(stage, adapter) for adapter in run.adapters]
        try:
            with waits_noted(run):
                yield Wrapped(stage, models)
        finally:
            for model, adapter in zip(models, run.adapters, strict=True):
                _unwrap(model, adapter)
            stage.config.no_sync_func = None  # a method of a model, which has the stage, which has this


@prepared_by(wrapped)
def execute(run: TrainingRun, around: Wrapped) -> None:
    """Train a sequential plan on this stage, global batch by global batch; every stage calls this."""
    for last, slots in global_batches(run):
        (index,) = run.steps[last]
        _train_batch(run, around.stage, around.models[index], slots)
        _step(run, last, run.adapters[index])


def _train_batch(run: TrainingRun, stage: MegatronStage, model: DistributedDataParallel, slots: list[int]) -> None:
    """The gradients of one global batch, in the adapter's buffer and summed over the replicas."""
    stage.config.no_sync_func = model.no_sync
    finalize = partial(_finalize, run, slots[-1])
    stage.config.finalize_model_grads_func = finalize
    model.zero_grad_buffer()
    busy = [slot for slot in slots if not run.microbatches[slot].noop]
    if busy:
        forward_and_backward(model, stage, busy)
    else:
        finalize([model])


def _finalize(run: TrainingRun, slot: int, *arguments: object, **options: object) -> None:
    """Megatron's end of a global batch, in which it sums the gradients over the replicas."""
    alone = run.pipeline.replicas == 1
    with nullcontext() if alone else run.waiting(f"the other replicas' gradients after microbatch {slot}"):
        finalize_model_grads(*arguments, **options)


def _data_parallel(stage: MegatronStage, adapter: AdapterTraining) -> DistributedDataParallel:
    """The stage as Megatron wraps it to train one adapter, for which the others are frozen."""
    trained = {id(parameter) for parameter in adapter.parameters.values()}
    others = [item for item in stage.parameters() if item.requires_grad and id(item) not in trained]
    for parameter in others:
        parameter.requires_grad_(False)
    model = DistributedDataParallel(stage.config, DistributedDataParallelConfig(), stage)
    for parameter in others:
        parameter.requires_grad_(True)
    for parameter in adapter.parameters.values():
        parameter.grad = None  # autograd's, which goes into the buffer
    return model


def _step(run: TrainingRun, slot: int, adapter: AdapterTraining) -> None:
    """The optimizer's step on the gradients in Megatron's buffer, which are the sums over the replicas."""
    for parameter in adapter.parameters.values():
        parameter.grad = parameter.main_grad
    norms = run.squared_norms(slot)
    with run.waiting(f"the other stages' norms after microbatch {slot}"):
        run.pipeline.sum_over_stages(norms)
    run.update(slot, norms)
    for parameter in adapter.parameters.values():
        parameter.grad = None


def _unwrap(model: DistributedDataParallel, adapter: AdapterTraining) -> None:
    """Leave the parameters as they were found. Megatron's hooks go with the nodes of autograd that it keeps for them;
    else they were called in every later run, and held this one with all its memory."""
    model.grad_accs.clear()
    model.param_to_bucket_group.clear()
    for parameter in adapter.parameters.values():
        del parameter.main_grad
        parameter.grad = torch.zeros_like(parameter)
