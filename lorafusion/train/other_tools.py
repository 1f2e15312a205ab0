"""Keys of other tools in a jobs file: those that mean what keys of ours mean, and what to say of the others.

The tools are transformers (`TrainingArguments`), PEFT (`LoraConfig`), TRL, axolotl, LLaMA-Factory, unsloth and
torchtune. All that is behind the reader of the file knows our keys alone.
"""

from typing import Any, NamedTuple

from lorafusion.core.schema import Mistakes, UserError, meant, shown, unknown_key

PER_DEVICE, ACCUMULATION = BATCH = ("per_device_train_batch_size", "gradient_accumulation_steps")
# Our keys, and those of the same meaning. The two of `BATCH` together are `global_batch_size`.
KEYS: dict[str, tuple[str, ...]] = {
    "model": ("base_model", "base_model_name_or_path", "model_name_or_path", "model_name"),
    "revision": ("model_revision", "revision_of_model"),
    "tokenizer": ("tokenizer_name_or_path", "tokenizer_name"),
    "output": ("output_dir",),
    "dtype": ("torch_dtype", "bf16", "fp16"),
    "checkpointing": ("gradient_checkpointing", "enable_activation_checkpointing"),
    "keep": ("save_total_limit",),
    "processes": ("num_processes", "nproc_per_node"),
    "wandb": ("report_to",),
    "rank": ("r", "lora_r", "lora_rank"),
    "alpha": ("lora_alpha",),
    "dropout": ("lora_dropout",),
    "rslora": ("use_rslora",),
    "target_modules": ("lora_target", "lora_target_modules", "lora_target_linear"),
    "learning_rate": ("lr",),
    "schedule": ("lr_scheduler_type", "lr_scheduler"),
    "max_grad_norm": ("clip_grad_norm",),
    "epochs": ("num_train_epochs", "num_epochs"),
    "steps": ("max_steps",),
    "max_length": ("max_seq_length", "max_seq_len", "cutoff_len", "sequence_len"),
    "evaluation": ("val_set_size", "val_size"),
    "evaluate_every": ("eval_steps",),
    "learn_prompt": ("train_on_inputs", "train_on_prompt"),
    PER_DEVICE: ("micro_batch_size", "batch_size"),
}
OURS = {theirs: ours for ours, every in KEYS.items() for theirs in every}
UNSTATED = object()  # as if the key were not there
_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "auto": UNSTATED}
_SCHEDULES = {"constant_with_warmup": "constant"}
_CHECKPOINTING: dict[Any, Any] = {True: "all", False: "none"}
# Values that are written otherwise here, by the key in the file.
VALUES: dict[str, dict[Any, Any]] = {
    "dtype": _DTYPES,
    "torch_dtype": _DTYPES,
    "bf16": {True: "bfloat16", False: UNSTATED, "auto": UNSTATED},
    "fp16": {True: "float16", False: UNSTATED},
    "gradient_checkpointing": _CHECKPOINTING,
    "enable_activation_checkpointing": _CHECKPOINTING,
    "report_to": {"wandb": "online", "none": "off"},
    "lora_target_linear": {True: "all-linear", False: UNSTATED},
    "schedule": _SCHEDULES,
    "lr_scheduler_type": _SCHEDULES,
    "lr_scheduler": _SCHEDULES,
    "max_steps": {-1: UNSTATED},
    "load_in_4bit": {False: UNSTATED},
    "load_in_8bit": {False: UNSTATED},
}
# Keys of which only these values are understood.
CLOSED = ("bf16", "fp16", "gradient_checkpointing", "enable_activation_checkpointing", "report_to",
          "lora_target_linear")  # fmt: skip
# What to say of keys that mean nothing here.
HINTS = {
    "load_in_4bit": "the base model is not quantised; did you mean dtype?",
    "load_in_8bit": "the base model is not quantised; did you mean dtype?",
    "save_steps": "did you mean save_every, in slots of the plan?",
    "eval_strategy": "did you mean evaluate_every?",
    "dataset": "did you mean data?",
    "datasets": "did you mean data?",
    "deepspeed": "did you mean processes and data_parallel?",
    "fsdp": "did you mean processes and data_parallel?",
    "optim": "delete it, the optimizer is AdamW",
    "optimizer": "delete it, the optimizer is AdamW",
    "packing": "delete it, samples are always packed",
    "sample_packing": "delete it, samples are always packed",
    "logging_steps": "delete it, metrics.jsonl has every step",
    "adapter": "delete it, adapters are LoRA",
    "peft_type": "delete it, adapters are LoRA",
    "finetuning_type": "delete it, adapters are LoRA",
    "bias": "delete it, biases are not trained",
    "task_type": "delete it, models are causal language models",
}
# Settings that two ways of keys can state. A job that uses one way overrides defaults in the other way.
WAYS = ((("global_batch_size",), BATCH), (("warmup_steps",), ("warmup_ratio",)))


class Stated(NamedTuple):
    """A value by our words, and the key in the file."""

    key: str
    value: Any


def translated(mapping: object, keys: set[str], elsewhere: dict[str, str], where: str, mistakes: Mistakes) -> dict:
    """What a mapping of a jobs file states, by our keys; mistakes about keys are gathered.

    keys: that the mapping may have; elsewhere: other keys of the file, and where they stand."""
    out: dict[str, Stated] = {}
    with mistakes.gathered():
        if not isinstance(mapping, dict):
            raise UserError(f"{where}: expected a mapping, found {shown(mapping)}")
        for key, value in mapping.items():
            with mistakes.gathered():
                ours: Any = OURS.get(key, key)
                value = _value(key, value, where)
                if value is not UNSTATED:
                    _require_known(key, value, keys, elsewhere, where)
                    if ours in out:
                        raise UserError(f"{where}: {key}: means the same as {out[ours].key}; expected one of them")
                    out[ours] = Stated(key, value)
    for first, second in WAYS:
        clash = [next((out[key].key for key in way if key in out), None) for way in (first, second)]
        if all(clash):
            with mistakes.gathered():
                raise UserError(f"{where}: {clash[1]}: states what {clash[0]} states; expected one of them")
    return out


def _require_known(key: Any, value: object, keys: set[str], elsewhere: dict[str, str], where: str) -> None:
    ours = OURS.get(key, key)
    if ours in keys:
        return
    if key in HINTS:
        message = f"{HINTS[key]} (found {shown(value)})"
    elif ours in elsewhere:
        message = f"expected {elsewhere[ours]}, not here (found {shown(value)})"
    else:
        message = unknown_key(key, value, keys, [theirs for theirs, mine in OURS.items() if mine in keys])
    raise UserError(f"{where}: {key}: {message}")


def _value(key: object, value: object, where: str) -> object:
    if key not in VALUES or isinstance(value, list | dict):
        return value
    if key in CLOSED and value not in VALUES[key]:
        expected = ", ".join(str(word).lower() for word in VALUES[key])
        raise UserError(f"{where}: {key}: expected one of {expected}, found {shown(value)}")
    return VALUES[key].get(value, value)


def over(defaults: dict[str, Stated], job: dict[str, Stated]) -> dict[str, Stated]:
    """A job over the defaults."""
    under = dict(defaults)
    for first, second in WAYS:
        for way, other in ((first, second), (second, first)):
            if any(key in job for key in way):
                under = {key: stated for key, stated in under.items() if key not in other}
    return under | job


def with_global_batch(job: dict[str, Stated], replicas: object, where: str) -> dict[str, Stated]:
    """A job whose batch may be stated by `BATCH`: with transformers too a global batch is the product with the devices.
    replicas: their number as the file has it."""
    parts = {key: job[key] for key in BATCH if key in job}
    if not parts:
        return job
    if PER_DEVICE not in parts:
        raise UserError(f"{where}: {ACCUMULATION}: needs {PER_DEVICE}; or state global_batch_size")
    size: Any = replicas
    for key, value in parts.values():
        number = meant(value, int)
        if type(number) is not int or number < 1:
            raise UserError(f"{where}: {key}: expected a whole number from 1 on, found {shown(value)}")
        size *= number
    rest = {key: stated for key, stated in job.items() if key not in BATCH}
    return rest | {"global_batch_size": Stated(parts[PER_DEVICE].key, size)}
