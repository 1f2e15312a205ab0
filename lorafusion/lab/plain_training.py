"""One job trained the way anybody would: the whole model of transformers, PEFT's LoRA, torch's optimizer, one sample at
a time. Nothing here packs, plans, cuts or fuses, so that what does can be held against it.

What the outcome is a function of, such as the rule that dropout masks follow, comes from `definitions`: from
the code that is judged nothing is taken but the model's shape and the fields of a job.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import Linear
from torch import nn
from transformers import AutoModelForCausalLM, get_scheduler

from lorafusion.core.config import ModelConfig
from lorafusion.core.workload import Job
from lorafusion.lab import definitions
from lorafusion.lab.definitions import LabelledText, Placed
from lorafusion.model.stage import hf_config

ADAPTER = "default"  # PEFT's name for the one adapter of a model
CPU = torch.device("cpu")
SEED = 1  # of the base model's weights, as in the runs of checks
Weights = dict[str, torch.Tensor]  # of an adapter, under the names of PEFT's file format


class PlainlyTrained(NamedTuple):
    """The loss of each global batch, the adapter's weights, and the loss on the evaluation samples by the number of
    optimizer steps before it."""

    losses: list[float]
    weights: Weights
    evaluations: dict[int, float]


class Base(NamedTuple):
    """A base model: its shape, and the dtype and the device that its random weights are drawn in, as a run there draws
    them."""

    model: ModelConfig
    drawn: torch.dtype
    device: torch.device = CPU


def train_plainly(job: Job, base: Base, dtype: torch.dtype) -> PlainlyTrained:
    """Train a job alone on synthetic tokens and in a dtype, from its beginning whatever `job.start` says."""
    whole, place = build_model(job, base)
    convert(whole, dtype)
    parameters = [parameter for parameter in whole.parameters() if parameter.requires_grad]
    batches = definitions.global_batches(job)
    optimizer, scheduler = optimizer_of(parameters, job, len(batches))
    losses, evaluations = [], {}
    for step, batch in enumerate(batches, start=1):
        losses.append(backward(whole, place, job, batch))
        if job.max_grad_norm:
            nn.utils.clip_grad_norm_(parameters, job.max_grad_norm)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        due = step == len(batches) or (job.evaluate_every and step % job.evaluate_every == 0)
        if job.evaluation and due:
            evaluations[step] = evaluation_loss(whole, job)
    return PlainlyTrained(losses, adapter_weights(whole), evaluations)


def gradients_plainly(job: Job, base: Base, weights: Weights, dtype: torch.dtype) -> Weights:
    """The gradient, computed in a dtype, of the first global batch after `job.start`, at given weights of the adapter,
    by their names."""
    whole, place = build_model(job, base)
    convert(whole, dtype)
    set_peft_model_state_dict(whole, {name: value.to(dtype) for name, value in weights.items()}, ADAPTER)
    backward(whole, place, job, definitions.global_batches(job)[job.start])
    trained = [(name, parameter) for name, parameter in whole.named_parameters() if parameter.requires_grad]
    return {name.replace(f".{ADAPTER}.", "."): parameter.grad.cpu() for name, parameter in trained}


def backward(whole: PeftModel, place: Place, job: Job, batch: list[Placed]) -> float:
    """Add a global batch's gradients to the parameters', sample after sample; returns its loss."""
    texts = [definitions.synthetic_text(job, item.sample, whole.config.vocab_size) for item in batch]
    labels, total = label_tokens(texts), 0.0
    for item, text in zip(batch, texts, strict=True):
        place.offset = item.offset
        loss = summed_loss(whole, text) / labels
        loss.backward()
        total += loss.item()
    return total


def optimizer_of(
    parameters: Iterable[nn.Parameter], job: Job, steps: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """AdamW, and transformers' schedule of its learning rate."""
    optimizer = torch.optim.AdamW(parameters, lr=job.learning_rate, weight_decay=job.weight_decay)
    # The schedule that is named "constant" has no warm-up.
    name = "constant_with_warmup" if job.schedule == "constant" else job.schedule
    return optimizer, get_scheduler(name, optimizer, job.warmup_steps, steps)


def summed_loss(whole: PeftModel, text: LabelledText) -> torch.Tensor:
    """The losses of a sample's label tokens, added up, in at least float32."""
    ids = text.ids.to(whole.device)
    logits = whole(input_ids=ids[None]).logits[0, text.first_label - 1 : -1]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits, ids[text.first_label :], reduction="sum")


def label_tokens(texts: list[LabelledText]) -> int:
    return sum(len(text.ids) - text.first_label for text in texts)


def evaluation_loss(whole: PeftModel, job: Job) -> float:
    """The mean loss of the label tokens of all evaluation samples, without dropout."""
    texts = [definitions.synthetic_text(job, sample, whole.config.vocab_size) for sample in job.evaluation]
    whole.eval()
    with torch.no_grad():
        total = sum(summed_loss(whole, text).item() for text in texts)
    whole.train()
    return total / label_tokens(texts)


@dataclass
class Place:
    """Where the sample whose forward runs now begins in its job's own stream of tokens."""

    offset: int = 0


class StatelessDropout(nn.Module):
    """Dropout whose mask is a function of the token's place in its job's stream."""

    def __init__(self, job: Job, layer: int, module: str, place: Place) -> None:
        super().__init__()
        self.job, self.layer, self.module, self.place = job, layer, module, place

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return x
        mask = definitions.keep_mask(self.job, self.layer, self.module, self.place.offset, *x.shape[1:])
        return x * mask.to(x.device) / (1 - self.job.dropout)


def build_model(job: Job, base: Base) -> tuple[PeftModel, Place]:
    """transformers' whole model with PEFT's adapter, both with the weights that training begins from; and where the
    model is told which sample it sees."""
    place, (config, dtype, device) = Place(), base
    # PyTorch's attention: transformers' own rounds to float32.
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(hf_config(config), dtype=dtype, attn_implementation="sdpa")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            std = model.config.initializer_range
            parameter.copy_(definitions.base_weight(name, parameter.shape, std, SEED, dtype, device))
    whole = get_peft_model(model, peft_config(job), ADAPTER, autocast_adapter_dtype=False)
    for name, layer in whole.named_modules():
        if isinstance(layer, Linear):
            name = name.removeprefix("base_model.model.")
            a, b = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
            with torch.no_grad():
                a.copy_(definitions.first_a(job, name, a.shape[1], dtype, device))
                b.zero_()
            layer.scaling[ADAPTER] = definitions.scaling(job)
            if job.dropout:
                index, _, module = name.partition(".layers.")[2].partition(".")
                layer.lora_dropout[ADAPTER] = StatelessDropout(job, int(index), module, place)
    convert(whole, dtype)
    return whole.train(), place


def convert(whole: nn.Module, dtype: torch.dtype) -> None:
    """Change the parameters' dtype. Not the buffers': the rotations' frequencies are float32 in every model."""
    for parameter in whole.parameters():
        parameter.data = parameter.data.to(dtype)


def peft_config(job: Job) -> LoraConfig:
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=job.rank,
        lora_alpha=job.alpha,
        lora_dropout=job.dropout,
        use_rslora=job.rslora,
        target_modules=list(job.target_modules),
    )


def adapter_weights(whole: PeftModel) -> Weights:
    return {name: value.detach().cpu().clone() for name, value in get_peft_model_state_dict(whole).items()}
