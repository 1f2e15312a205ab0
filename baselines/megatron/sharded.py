"""Megatron-LM's fully sharded data parallelism: `--use-torch-fsdp2`, which the paper calls Megatron-LM (FSDP).

Reproduced, from megatron-core 0.16.1: `TorchFullyShardedDataParallel`, which shards the embedding, each decoder layer,
and norm and head as one, by PyTorch's FSDP2, and `forward_backward_no_pipelining`, in which gradients are reduced at
every microbatch (its `no_sync` does nothing). Adapters are trained one after another. On one GPU nothing is sharded: it
is plain training.

Not reproduced: Megatron's own layers and optimizer (see `pipeline`), and its other, CUDA-only `--use-megatron-fsdp`.
megatron-core's gradient finalisation is left out, since in 0.16.1 it fails with this class (Megatron-LM issue 4669),
and for LoRA without tied embeddings it has nothing to do.

Differs from a run of Megatron for each adapter: all adapters are there, so that a layer's gathering brings the factors
of those at rest too, 84 MB each beside 16 GB of Llama-3.1-8B with rank 16. A replica that has no microbatch where
others have one computes theirs without a loss, as all must gather the layers together.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from megatron.core.distributed import DistributedDataParallelConfig, TorchFullyShardedDataParallel

from baselines.megatron.device import device_of
from baselines.megatron.schedule import MegatronStage, forward_and_backward, global_batches, initialise
from baselines.megatron.waits import waits_noted
from lorafusion.engine.executor import prepared_by
from lorafusion.engine.pipeline import Pipeline
from lorafusion.engine.training import TrainingRun
from lorafusion.model.stage import Stage


class Sharded:
    """A whole model, and what megatron-core made of it: called with a slot, it is that slot's forward pass."""

    def __init__(self, stage: MegatronStage, model: torch.nn.Module) -> None:
        self.stage, self.model = stage, model

    def attach(self, run: TrainingRun) -> None:
        self.stage.run = run

    def __call__(self, slot: int) -> torch.Tensor:
        return self.model(slot)


def shard(stage: Stage, pipeline: Pipeline) -> Sharded:
    """Spread a stage that is the whole model over the replicas; weights without storage stay so."""
    whole = MegatronStage(stage, pipeline)
    if pipeline.replicas == 1:
        return Sharded(whole, whole)
    units = {torch.nn.Embedding, *(type(layer) for layer in stage.model.layers.values())}
    with device_of(pipeline.device):
        model = TorchFullyShardedDataParallel(
            whole.config,
            DistributedDataParallelConfig(),
            whole,
            sub_modules_to_wrap=units,
            process_group=pipeline.replica_group,
        )
    return Sharded(whole, model)


@contextmanager
def with_process_groups(run: TrainingRun) -> Iterator[Sharded]:
    """The sharded model, with Megatron's process groups and on its device."""
    initialise(run.pipeline)
    with device_of(run.pipeline.device), waits_noted(run):
        yield run.around


@prepared_by(with_process_groups)
def execute(run: TrainingRun, sharded: Sharded) -> None:
    """Train a sequential plan of one stage, global batch by global batch; every replica calls this."""
    for last, slots in global_batches(run):
        forward_and_backward(sharded.model, sharded.stage, slots)
        norms = run.squared_norms(last)
        with run.waiting(f"the other replicas' norms after microbatch {last}"):
            run.pipeline.sum_over_replicas([norms])  # of the parts of the gradients
        run.update(last, norms)
