"""Kernels in Triton, for any GPU."""
