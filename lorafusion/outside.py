"""One job trained the way anybody would: the whole model of transformers, PEFT's LoRA, torch's optimizer, one sample at
a time. Nothing here packs, plans, cuts or fuses, so that what does can be held against it.

Only what the outcome is a function of is ours: the weights that training begins from, the job's samples and global
batches, and the rule that dropout masks follow.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import Linear
from torch import nn
from transformers import AutoModelForCausalLM, get_scheduler

from fused_lora import keep_mask, mask_key
from lorafusion.config import ModelConfig
from lorafusion.data.tokens import Tokens, TokenSource
from lorafusion.models import lora
from lorafusion.models.stage import build_stage, hf_config
from lorafusion.workload import Job

ADAPTER = "default"  # PEFT's name for the one adapter of a model


class PlainlyTrained(NamedTuple):
    """The loss of each global batch, the adapter under the names of PEFT's file format, and the loss on the evaluation
    samples by the number of optimizer steps before it."""

    losses: list[float]
    weights: dict[str, torch.Tensor]
    evaluations: dict[int, float]


def train_plainly(
    job: Job, model: ModelConfig, source: TokenSource, dtype: torch.dtype, seed: int = 1
) -> PlainlyTrained:
    """Train a job alone on the CPU, from its beginning whatever `job.start` says, in float32 or float64."""
    place = Place()
    whole = build_model(job, model, dtype, seed, place)
    parameters = [parameter for parameter in whole.parameters() if parameter.requires_grad]
    optimizer, scheduler = optimizer_of(parameters, job)
    losses, evaluations = [], {}
    for step, positions in enumerate(job.batches, start=1):
        samples = [source.tokens(job, job.sample_at(position)) for position in positions]
        labels = label_tokens(samples)
        losses.append(0.0)
        for position, sample in zip(positions, samples, strict=True):
            place.offset = job.stream_offset(position)
            loss = summed_loss(whole, sample) / labels
            loss.backward()
            losses[-1] += loss.item()
        if job.max_grad_norm:
            nn.utils.clip_grad_norm_(parameters, job.max_grad_norm)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        due = step == len(job.batches) or (job.evaluate_every and step % job.evaluate_every == 0)
        if job.evaluation and due:
            evaluations[step] = evaluation_loss(whole, [source.tokens(job, sample) for sample in job.evaluation])
    weights = {name: value.detach().clone() for name, value in get_peft_model_state_dict(whole).items()}
    return PlainlyTrained(losses, weights, evaluations)


def optimizer_of(
    parameters: Iterable[nn.Parameter], job: Job
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """AdamW, and transformers' schedule of its learning rate."""
    optimizer = torch.optim.AdamW(parameters, lr=job.learning_rate, weight_decay=job.weight_decay)
    # The schedule that is named "constant" has no warm-up.
    name = "constant_with_warmup" if job.schedule == "constant" else job.schedule
    return optimizer, get_scheduler(name, optimizer, job.warmup_steps, len(job.batches))


def summed_loss(whole: PeftModel, sample: Tokens) -> torch.Tensor:
    """The losses of a sample's label tokens, added up."""
    logits = whole(input_ids=sample.ids[None]).logits[0]
    return F.cross_entropy(logits[sample.first_label - 1 : -1], sample.ids[sample.first_label :], reduction="sum")


def label_tokens(samples: list[Tokens]) -> int:
    return sum(len(sample.ids) - sample.first_label for sample in samples)


def evaluation_loss(whole: PeftModel, samples: list[Tokens]) -> float:
    """The mean loss of the label tokens of all samples, without dropout."""
    whole.eval()
    with torch.no_grad():
        total = sum(summed_loss(whole, sample).item() for sample in samples)
    whole.train()
    return total / label_tokens(samples)


@dataclass
class Place:
    """Where the sample whose forward runs now begins in its job's own stream of tokens."""

    offset: int = 0


class StatelessDropout(nn.Module):
    """Dropout whose mask is a function of the token's place in its job's stream."""

    def __init__(self, key: int, probability: float, place: Place) -> None:
        super().__init__()
        self.key, self.probability, self.place = key, probability, place

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return x
        positions = self.place.offset + torch.arange(x.shape[1])
        return x * keep_mask(self.key, positions, x.shape[2], self.probability) / (1 - self.probability)


def build_model(job: Job, model: ModelConfig, dtype: torch.dtype, seed: int, place: Place) -> PeftModel:
    """transformers' whole model with PEFT's adapter, both with the weights that a run of ours begins from."""
    stage = build_stage(model, index=0, count=1, device=torch.device("cpu"), dtype=dtype, seed=seed)
    # PyTorch's attention: transformers' own rounds to float32.
    base = AutoModelForCausalLM.from_config(hf_config(model), dtype=dtype, attn_implementation="sdpa")
    base.load_state_dict(stage.state_dict())
    lora.inject_adapters(stage, [job], dtype, lora.peft)
    whole = get_peft_model(base, lora.peft_config(job), ADAPTER)
    set_peft_model_state_dict(whole, lora.adapter_state(stage, job), ADAPTER)
    for name, layer in whole.named_modules():
        if isinstance(layer, Linear) and job.dropout:
            index, _, module = name.partition(".layers.")[2].partition(".")
            key = mask_key(job.seed, int(index), module)
            layer.lora_dropout[ADAPTER] = StatelessDropout(key, job.dropout, place)
    return whole.train()
