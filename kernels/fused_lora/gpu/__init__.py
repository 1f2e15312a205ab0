"""The GPU's kernels of the LoRA linear. Imported where a GPU runs them, not before."""
