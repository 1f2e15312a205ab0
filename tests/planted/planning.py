"""Errors in how plans are packed, searched and judged."""

from __future__ import annotations

import numpy as np

from tests.planted.plant import planted

FAST = "tests/planning/test_fast.py"


@planted(
    "lorafusion.planning.fast:Trials._targets",
    caught_by=f"{FAST}::test_a_capacity_above_all_that_is_in_hand_is_not_filled",
)
def targets_are_parts_of_the_capacity(original):
    """Tokens of a microbatch are tried down to a sixth of the capacity, however little the jobs have in hand."""
    return lambda trials: (trials.capacity * part // 100 for part in (75, 55, 40, 30, 22, 16))


@planted(
    "lorafusion.planning.simulator.stream:_passes",
    caught_by="tests/planning/simulator/test_stream.py::test_empty_slots_may_be_left_out",
)
def empty_slots_that_are_left_out_take_no_turn(original):
    """The simulator takes slots between which there are empty ones for neighbours."""
    return lambda stages, busy, turns: original(stages, busy, np.arange(len(turns)))
