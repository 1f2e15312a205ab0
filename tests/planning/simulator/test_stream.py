"""The stream's own loop; test_schedules.py compares it with the one that goes through any order."""

from __future__ import annotations

import random

import numpy as np
import pytest

from lorafusion.planning.simulator import Costs
from lorafusion.planning.simulator.stream import simulate_stream
from tests.planning.simulator.test_schedules import a_plan, random_costs


@pytest.mark.parametrize("replicas", [1, 2])
def test_empty_slots_may_be_left_out(replicas):
    """Their places alone say the same of a run as no-ops do."""
    for seed in range(20):
        draw = random.Random(seed)
        slots, stages = draw.randint(2, 12), draw.randint(1, 6)
        places = np.array(sorted({0, slots - 1, *(slot for slot in range(slots) if draw.random() < 0.5)}))
        indices = (places[:, None] * replicas + np.arange(replicas)).ravel()
        noops = sorted(set(range(slots * replicas)) - set(indices.tolist()))
        plan = a_plan(slots * replicas, stages, indices[::replicas].tolist(), noops, replicas)
        costs, tokens = random_costs(plan, seed), np.array([microbatch.tokens for microbatch in plan.microbatches])
        few = Costs(*(array[..., indices] for array in (costs.forward, costs.backward, costs.step, costs.transfer)))
        whole = simulate_stream(costs, tokens, np.isin(np.arange(slots), places).tolist(), replicas)
        part = simulate_stream(few, tokens[indices], [True] * len(places), replicas, places)
        assert part.makespan == whole.makespan, seed
        for window in ("whole", "steady"):
            assert part.throughput(window) == pytest.approx(whole.throughput(window), rel=1e-12), seed
            assert part.bubble(window) == pytest.approx(whole.bubble(window), abs=1e-12), seed
