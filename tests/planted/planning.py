"""Errors in how plans are packed, searched and judged."""

from __future__ import annotations

from tests.planted.plant import planted

FAST = "tests/planning/test_fast.py"


@planted(
    "lorafusion.planning.fast:Trials._targets",
    caught_by=f"{FAST}::test_a_capacity_above_all_that_is_in_hand_is_not_filled",
)
def targets_are_parts_of_the_capacity(original):
    """Tokens of a microbatch are tried down to a sixth of the capacity, however little the jobs have in hand."""
    return lambda trials: (trials.capacity * part // 100 for part in (75, 55, 40, 30, 22, 16))
