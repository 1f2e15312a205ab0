"""What of a jobs file must fit its base model, and a job's settings each other. Nothing here imports torch."""

import math
from functools import partial

import regex

from lorafusion.core.config import ModelConfig
from lorafusion.core.schema import Mistakes, UserError, shown
from lorafusion.core.workload import ALL_LINEAR
from lorafusion.data.blocks import Data, JsonlData, SyntheticData, TextData
from lorafusion.train.config import DEFAULT_MAX_LENGTH, TrainConfig, TrainJob

IN_MLP = ("gate_proj", "up_proj", "down_proj")
MOST_SECONDS = 0.5  # that a regular expression may take for a name: some take for ever
PART = 1 << 20  # bytes that are read at once to count lines


def fitted(config: TrainConfig, model: ModelConfig) -> TrainConfig:
    """A jobs file whose jobs name the model's linears and say how long a sample may be. Raises `UserError` with all
    that does not fit the model."""
    mistakes, jobs = Mistakes(), []
    with mistakes.gathered():
        if config.stages > model.num_hidden_layers:
            raise UserError(
                f"{config.path}: processes: {config.stages} stages, but the model has {model.num_hidden_layers} layers"
            )
    for job in config.jobs:
        fit: dict[str, object] = {}
        with mistakes.gathered():
            fit["target_modules"] = _linears(config, job, model.num_hidden_layers)
        with mistakes.gathered():
            fit["max_length"] = max_length_of(config, job, model)
        jobs.append(job.model_copy(update=fit))
    mistakes.require_none()
    return config.model_copy(update={"jobs": tuple(jobs)})


def require_warm_ups(config: TrainConfig) -> None:
    """Raise `UserError` for warm-ups that cannot end, however many of the rows become samples."""
    mistakes = Mistakes()
    for job in config.jobs:
        if job.warmup_steps or job.warmup_ratio:
            samples = _most_samples(job.data, (job.warmup_steps + 1) * job.global_batch_size)
            with mistakes.gathered():
                warm_up(config, job, steps_of(job, samples))
    mistakes.require_none()


def warm_up(config: TrainConfig, job: TrainJob, steps: float) -> int:
    """The steps of a job's warm-up. Raises `UserError` where it has no step after it."""
    warmup_steps = job.warmup_steps
    if job.warmup_ratio and steps < math.inf:
        warmup_steps = math.ceil(job.warmup_ratio * steps)  # as transformers rounds it
    if warmup_steps >= steps:
        stated = "warmup_steps:" if job.warmup_steps else f"warmup_ratio: {job.warmup_ratio} means"
        raise UserError(
            f"{where(config, job)}: {stated} {warmup_steps}, but the job has {steps} step(s), so that its learning "
            "rate would never be reached; expected fewer"
        )
    return warmup_steps


def steps_of(job: TrainJob, samples: float) -> float:
    """How many steps a job of so many samples makes."""
    epochs = job.epochs or (1 if job.steps is None else math.inf)
    of_an_epoch = samples if samples == math.inf else math.ceil(samples / job.global_batch_size)
    return min(epochs * of_an_epoch, math.inf if job.steps is None else job.steps)


def _most_samples(data: Data, enough: int) -> float:
    """How many samples data may have, where that is to be known without a tokenizer; or so many that it is enough."""
    if isinstance(data, SyntheticData):
        return data.synthetic.samples
    if not isinstance(data, JsonlData):
        return math.inf
    lines = 0
    for path in data.jsonl:
        with open(path, "rb") as file:
            for part in iter(partial(file.read, PART), b""):
                lines += part.count(b"\n")
                if lines > enough:
                    return math.inf
        lines += 1  # it may end without a line's end
    return lines


def _linears(config: TrainConfig, job: TrainJob, layers: int) -> tuple[str, ...]:
    """The linears that have the job's adapter. A regular expression means, as in PEFT, those whose whole name it
    matches; here an adapter is on a linear of all layers."""
    if {*job.target_modules} <= {*ALL_LINEAR}:
        return job.target_modules
    (pattern,) = job.target_modules
    place = f"{where(config, job)}: target_modules: {shown(pattern)} matches"
    blocks = {name: "mlp" if name in IN_MLP else "self_attn" for name in ALL_LINEAR}
    try:
        counts = {
            name: sum(
                bool(regex.fullmatch(pattern, f"model.layers.{layer}.{block}.{name}", timeout=MOST_SECONDS))
                for layer in range(layers)
            )
            for name, block in blocks.items()
        }
    except TimeoutError:
        raise UserError(f"{place} nothing within {MOST_SECONDS} s; expected a simpler regular expression") from None
    if not any(counts.values()):
        raise UserError(f"{place} no linear; the model has {', '.join(ALL_LINEAR)}, as model.layers.0.self_attn.q_proj")
    for name, count in counts.items():
        if 0 < count < layers:
            raise UserError(f"{place} {name} of {count} layers; expected all {layers} or none")
    return tuple(name for name, count in counts.items() if count)


def max_length_of(config: TrainConfig, job: TrainJob, model: ModelConfig) -> int:
    """Tokens that a sample of the job may have."""
    positions = model.max_position_embeddings
    limit = job.max_length or min(DEFAULT_MAX_LENGTH, positions)
    if limit > positions:
        raise UserError(f"{where(config, job)}: max_length: {limit} tokens, but the model has {positions} positions")
    for key, block in (("data", job.data), ("evaluation", job.evaluation_data)):
        if isinstance(block, TextData) and block.block > limit:
            raise UserError(f"{where(config, job)}: {key}.block: {block.block} tokens, more than max_length {limit}")
    return limit


def where(config: TrainConfig, job: TrainJob) -> str:
    return f"{config.path}: jobs.{job.name}"
