"""A Hugging Face model as pipeline stages: its layers, attention over packed samples, the LoRA linears, the loss."""
