"""LoRA kinds that need nothing but torch and PEFT."""
