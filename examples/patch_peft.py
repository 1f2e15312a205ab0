"""Train a LoRA adapter with transformers' Trainer, with the fused kernels under PEFT: `python examples/patch_peft.py`.

On a CPU the same code runs the reference in plain PyTorch. The model is tiny and random, so nothing is downloaded.
"""

import sys

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import fused_lora


def samples(count: int, length: int) -> list[dict]:
    """Counting sequences, which a model can learn."""
    starts = torch.randint(0, 64, (count,), generator=torch.Generator().manual_seed(0))
    rows = [(start + torch.arange(length)) % 64 for start in starts]
    return [{"input_ids": row, "labels": row} for row in rows]


def main(output: str) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
    )
    lora = LoraConfig(r=8, lora_alpha=16, lora_dropout=0.1, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(LlamaForCausalLM(config), lora)

    print(fused_lora.patch(model))  # the only line that is not plain PEFT

    arguments = TrainingArguments(
        output, max_steps=20, per_device_train_batch_size=8, learning_rate=1e-2, logging_steps=5, report_to="none"
    )
    Trainer(model, arguments, train_dataset=samples(64, 32)).train()
    model.save_pretrained(output)  # PEFT's own format


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "adapter")
