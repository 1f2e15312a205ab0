"""Checks: what is proved before a number counts."""
