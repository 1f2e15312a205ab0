"""Kernels in Gluon, for sm_90 (H100, H200)."""
