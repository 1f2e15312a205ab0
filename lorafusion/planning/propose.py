"""How to run a workload on some GPUs: stages, replicas and capacity, by memory and by simulated throughput.

Every division of the GPUs into stages times replicas is tried with the largest capacity whose activations fit, and
below it with what `fast` finds fastest. No GPU is asked: memory is counted, time is the cost model's. So the capacity
is an estimate, to choose by before there is a GPU; `planning.capacity` lists the other answers.
"""

from __future__ import annotations

from typing import NamedTuple

from lorafusion.core.config import ModelConfig
from lorafusion.core.schema import UserError
from lorafusion.core.workload import Job, Workload
from lorafusion.planning.capacity import USABLE, rounded_down
from lorafusion.planning.fast import Trials
from lorafusion.planning.simulator.costs import CostModel, model_costs

WORKSPACE = 2 << 30  # bytes: products on their way
ADAPTER_BYTES = 4 * 4  # of a parameter in float32: itself, its gradient, AdamW's two moments
LOGIT_BYTES = 2 + 4 + 4 + 2  # of a logit: in 16 bits, in float32 for the loss, and the gradients of both


class Choice(NamedTuple):
    """A way to run a workload: predicted tokens a second, steady bubble, bytes of the fullest GPU; or why it fails."""

    stages: int
    data_parallel: int
    capacity: int
    largest_capacity: int
    throughput: float
    bubble: float
    memory: int
    reason: str = ""


def saved_bytes(config: ModelConfig, checkpointing: bool = False) -> float:
    """Bytes of a token that a decoder layer keeps for its backward pass, in 16 bits with the fused kernels.

    Seven tensors as wide as the model and two as wide as the MLP, and a bit an element of the linears' inputs as
    dropout masks: within 1 % of what layers of three models kept (results/reference/nvidia-h200/kernels.parquet).
    Checkpointing keeps a layer's input alone.
    """
    hidden, inner = config.hidden_size, config.intermediate_size
    if checkpointing:
        return 2 * hidden
    return 2 * (7 * hidden + 2 * inner) + (6 * hidden + inner) / 8


def stage_bytes(config: ModelConfig, model: CostModel, stage: int, jobs: tuple[Job, ...]) -> int:
    """Bytes of a stage's weights in 16 bits, and of its adapters with their optimizer states."""
    layers, table, shapes = model.layers[stage], config.vocab_size * config.hidden_size, config.linears
    weights = layers * sum(a * b for a, b in shapes.values())
    weights += table * ((stage == 0) + (stage == model.stages - 1 and not (config.tie_word_embeddings and stage == 0)))
    adapters = sum(
        job.rank * sum(sum(shapes[name]) for name in job.target_modules if name in shapes) * layers for job in jobs
    )
    return 2 * weights + ADAPTER_BYTES * adapters


def token_bytes(config: ModelConfig, model: CostModel, stage: int, checkpointing: bool) -> float:
    """Bytes that a token of the capacity takes on a stage, of which 1F1B holds S - stage microbatches."""
    kept = model.layers[stage] * saved_bytes(config, checkpointing) * (model.stages - stage)
    if checkpointing:
        kept += saved_bytes(config)  # the layer that is computed again
    return kept + (LOGIT_BYTES * config.vocab_size if stage == model.stages - 1 else 0)


def largest_capacity(
    config: ModelConfig, model: CostModel, jobs: tuple[Job, ...], memory: int, checkpointing: bool
) -> int:
    """The most tokens of a microbatch whose activations fit on every stage; below 1 where the weights do not."""
    room = [
        (memory * USABLE - WORKSPACE - stage_bytes(config, model, stage, jobs))
        / token_bytes(config, model, stage, checkpointing)
        for stage in range(model.stages)
    ]
    return rounded_down(min(room))


def propose(
    workload: Workload, config: ModelConfig, gpus: int, memory: int, checkpointing: bool = False
) -> list[Choice]:
    """All divisions of the GPUs, the fastest first and those that do not fit last. memory: bytes of a GPU.

    Raises `UserError` where none fits."""
    longest = max(sample.tokens for job in workload.jobs for sample in job.samples)
    choices = []
    for stages in (count for count in range(1, gpus + 1) if gpus % count == 0 and count <= config.num_hidden_layers):
        replicas = gpus // stages
        model = model_costs(config, stages, checkpointing=checkpointing)
        largest = largest_capacity(config, model, workload.jobs, memory, checkpointing)
        if largest < longest:
            reason = "the weights do not fit" if largest < 1 else f"holds {largest} tokens, a sample has {longest}"
            choices.append(Choice(stages, replicas, 0, max(largest, 0), 0.0, 0.0, 0, reason))
            continue
        trial = Trials(workload.jobs, stages, largest, replicas).fastest(model)
        used = max(
            stage_bytes(config, model, stage, workload.jobs)
            + max(trial.way.target, longest) * token_bytes(config, model, stage, checkpointing)
            for stage in range(stages)
        )
        choices.append(
            Choice(stages, replicas, trial.way.target, largest, trial.throughput, trial.bubble, int(used + WORKSPACE))
        )
    choices.sort(key=lambda choice: (-choice.throughput, choice.stages))
    if not choices[0].throughput:
        reasons = "; ".join(f"{c.stages} stages x {c.data_parallel}: {c.reason}" for c in choices)
        raise UserError(f"{gpus} GPUs of {memory / 2**30:.0f} GiB: nothing fits ({reasons})")
    return choices
