"""What both of Megatron's arms share: our stage as a model of megatron-core, and its schedule by global batches."""

from collections.abc import Iterator

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.enums import ModelType
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import unwrap_model

from lorafusion.core.schema import UserError
from lorafusion.engine.pipeline import Pipeline
from lorafusion.engine.training import TrainingRun
from lorafusion.model.stage import Stage


class MegatronStage(torch.nn.Module):
    """A stage as megatron-core's schedules want their model: with a config and a way to hand over its input."""

    def __init__(self, stage: Stage, pipeline: Pipeline) -> None:
        super().__init__()
        self.stage = stage
        self.model_type = ModelType.encoder_or_decoder
        self.share_embeddings_and_output_weights = False
        self.pre_process, self.post_process = pipeline.is_first, pipeline.is_last
        self.config = _config(stage, pipeline)
        self.run: TrainingRun | None = None
        self.input: torch.Tensor | None = None
        self.microbatches = 0  # of the global batch

    def set_input_tensor(self, tensors: list[torch.Tensor | None]) -> None:
        (self.input,) = tensors

    def forward(self, slot: int) -> torch.Tensor:
        if self.run.microbatches[slot].noop:
            return self.run.forward_of_an_idle_replica(slot)
        return self.run.forward(slot, self.input)


def initialise(pipeline: Pipeline) -> None:
    """Make megatron-core's process groups, once a process: stages of a replica next to each other, as ours are."""
    if parallel_state.model_parallel_is_initialized():
        return
    if not dist.is_initialized():
        backend = "nccl" if pipeline.device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel(pipeline_model_parallel_size=pipeline.size, order="tp-cp-ep-pp-dp")
    # Communicators are made at the first message, which no clock should see.
    for group in (parallel_state.get_pipeline_model_parallel_group(), parallel_state.get_data_parallel_group()):
        dist.all_reduce(torch.zeros(1, device=pipeline.device), group=group)


def forward_and_backward(model: torch.nn.Module, stage: MegatronStage, slots: list[int]) -> None:
    """Some slots' microbatches, at least one, through megatron-core's schedule; model: the stage with what is around
    it."""
    stage.microbatches = len(slots)
    get_forward_backward_func()(
        forward_step_func=_forward_step,
        data_iterator=iter(slots),
        model=model,
        num_microbatches=len(slots),
        seq_length=1,  # ignored: variable_seq_lengths
        micro_batch_size=1,
    )


def _forward_step(slots: Iterator[int], model: torch.nn.Module):
    """Megatron's forward step: the output, and how the loss is read off the last stage's.

    The schedule divides a loss by the number of microbatches of the global batch, and the gradients are averaged over
    the replicas. Ours is already each token's share of its global batch, so it is multiplied by both first. (The
    schedule's own normalisation by tokens does nothing under fully sharded data parallel.)
    """
    output = model(next(slots))
    stage = unwrap_model(model)
    factor = stage.microbatches * stage.run.pipeline.replicas

    def loss(value: torch.Tensor) -> tuple[torch.Tensor, dict]:
        return value * factor, {}

    return output, loss


def global_batches(run: TrainingRun) -> Iterator[tuple[int, list[int]]]:
    """The last slot and all slots of each global batch; the pipeline is flushed after each."""
    if any(job.evaluation for job in run.workload.jobs):
        raise UserError(f"the executor of {run.plan.system} does not evaluate; leave evaluation samples out")
    slots: list[int] = []
    for slot, stepping in enumerate(run.steps):
        slots.append(slot)
        if len(stepping) > 1:
            raise UserError(f"the plan of {run.plan.system}: {len(stepping)} adapters step in slot {slot}, not one")
        if stepping:
            yield slot, slots
            slots = []


def _config(stage: Stage, pipeline: Pipeline) -> TransformerConfig:
    model = stage.hf_config
    recompute = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    return TransformerConfig(
        num_layers=model.num_hidden_layers,
        hidden_size=model.hidden_size,
        num_attention_heads=model.num_attention_heads,
        pipeline_model_parallel_size=pipeline.size,
        pipeline_dtype=pipeline.dtype,
        params_dtype=pipeline.dtype,
        variable_seq_lengths=True,
        moe_token_dispatcher_type="alltoall",  # megatron-core wants it for variable lengths, experts or not
        deallocate_pipeline_outputs=True,
        # The stage recomputes its layers itself; this is for those who need to know.
        **(recompute if stage.checkpointed > stage.first else {}),
    )
