"""Unsloth, where it is installed: its LoRA operations in the layers of every other system."""
