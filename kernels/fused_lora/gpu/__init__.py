"""The Triton kernels of the LoRA linear, and how they are launched. Imported where a GPU runs them, not before."""
