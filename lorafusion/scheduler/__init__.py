"""From a workload to a plan. Every strategy is a function `plan(workload, system, stages, capacity)` that returns a
checked plan, or raises `UserError` for an input that no plan can serve. Pure Python: no torch, no clock, no randomness.
"""
