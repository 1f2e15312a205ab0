"""Compile the kernels ahead of time, and tune them. For maintainers; no model needs them."""
