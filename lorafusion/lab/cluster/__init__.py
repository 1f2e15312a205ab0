"""Slurm: what a cluster is, what it is asked for, and what runs there."""
