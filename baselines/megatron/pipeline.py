"""Megatron-LM's pipeline parallelism: megatron-core's 1F1B schedule, unmodified, with a flush at each global batch.

Reproduced, from megatron-core 0.16.1: `get_forward_backward_func()` (1F1B without interleaving, or no pipelining on
one stage), its point-to-point communication with the exchange of shapes that variable lengths need, and its
deallocation of pipeline outputs. Not reproduced: Megatron's own transformer layers, tensor parallelism and its
distributed optimizer. The layers, the loss and AdamW are those of every other system here, so that schedules are
compared and nothing else; with one replica, its DDP has nothing to reduce and is left out.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.enums import ModelType
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func
from megatron.core.transformer.transformer_config import TransformerConfig

from baselines.megatron.device import device_of
from lorafusion.errors import UserError
from lorafusion.runtime.training import TrainingRun


def execute(run: TrainingRun) -> None:
    """Train a sequential plan on this stage, global batch by global batch; every stage calls this."""
    if run.pipeline.replicas > 1:
        raise UserError(
            f"the plan of {run.plan.system} is for {run.pipeline.replicas} replicas; this executor runs one"
        )
    _initialise(run.pipeline.size, run.pipeline.device)
    model = _MegatronStage(run)
    with device_of(run.pipeline.device):
        schedule = get_forward_backward_func()
        run.record.start()
        for batch in global_batches(run):
            model.microbatches = len(batch)
            schedule(
                forward_step_func=_forward_step,
                data_iterator=iter(batch),
                model=model,
                num_microbatches=len(batch),
                seq_length=1,  # ignored: variable_seq_lengths
                micro_batch_size=1,
            )
            run.step(batch[-1])


def global_batches(run: TrainingRun) -> list[list[int]]:
    """The plan's microbatches in runs that end with an optimizer step; the pipeline is flushed after each."""
    batches: list[list[int]] = [[]]
    for index, microbatch in enumerate(run.plan.microbatches):
        batches[-1].append(index)
        if microbatch.step_after:
            batches.append([])
    return batches[:-1]


class _MegatronStage(torch.nn.Module):
    """A stage as megatron-core's schedule wants its model: with a config and a way to hand over its input."""

    def __init__(self, run: TrainingRun) -> None:
        super().__init__()
        self.run = run
        self.model_type = ModelType.encoder_or_decoder
        self.share_embeddings_and_output_weights = False
        self.pre_process, self.post_process = run.pipeline.is_first, run.pipeline.is_last
        self.config = _config(run)
        self.input: torch.Tensor | None = None
        self.microbatches = 0

    def set_input_tensor(self, tensors: list[torch.Tensor | None]) -> None:
        (self.input,) = tensors

    def forward(self, index: int) -> torch.Tensor:
        return self.run.forward(index, self.input)


def _forward_step(indices: Iterator[int], model: _MegatronStage):
    """Megatron's forward step: the output, and how the loss is read off the last stage's.

    The schedule divides a loss by the number of microbatches of the global batch. Ours is already each token's share
    of its global batch, so it is multiplied by that number first.
    """
    output = model(next(indices))
    microbatches = model.microbatches

    def loss(value: torch.Tensor) -> tuple[torch.Tensor, dict]:
        return value * microbatches, {}

    return output, loss


def _config(run: TrainingRun) -> TransformerConfig:
    model = run.stage.hf_config
    return TransformerConfig(
        num_layers=model.num_hidden_layers,
        hidden_size=model.hidden_size,
        num_attention_heads=model.num_attention_heads,
        pipeline_model_parallel_size=run.pipeline.size,
        pipeline_dtype=run.pipeline.dtype,
        params_dtype=run.pipeline.dtype,
        variable_seq_lengths=True,
        moe_token_dispatcher_type="alltoall",  # megatron-core wants it for variable lengths, experts or not
        deallocate_pipeline_outputs=True,
    )


def _initialise(stages: int, device: torch.device) -> None:
    if not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel(pipeline_model_parallel_size=stages)
