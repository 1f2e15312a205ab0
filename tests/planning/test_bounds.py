"""The bounds: no plan needs fewer slots or less time, and where the best plan is known the bound of time is near it."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorafusion.core.config import read_model
from lorafusion.planning import STRATEGIES, plan_workload
from lorafusion.planning.bounds import fewest_microbatches, time_bound
from lorafusion.planning.simulator import CostModel, model_costs
from tests.planning.test_search import all_orders, best_of, makespan
from tests.planning.test_strategies import CAPACITY, workloads


@pytest.mark.parametrize("strategy", sorted(set(STRATEGIES) - {"sequential", "paper"}))
@settings(max_examples=15)
@given(workload=workloads(), stages=st.integers(1, 5))
def test_no_plan_takes_less_than_the_bound_of_time(strategy, workload, stages):
    model = CostModel(layers=(1,) * stages, token=1.0, square=0.01, fixed=0.3, head=0.2, adapter=0.5, tile=4, step=0.1,
                      host=3.0, host_adapter=0.4, host_backward=1.5, latency=0.2, transfer=0.05)  # fmt: skip
    plan = plan_workload(workload, strategy, stages=stages, capacity=CAPACITY, costs=model)
    assert makespan(plan, workload, model) >= time_bound(workload.jobs, model, CAPACITY) * (1 - 1e-9)


@pytest.mark.parametrize("seed", range(6))
def test_the_bound_of_one_global_batch_is_what_the_best_of_all_its_plans_takes(make_job, make_workload, seed):
    draw, stages = random.Random(seed), 3 + seed
    lengths = [draw.randint(400, 4000) for _ in range(4)]
    workload = make_workload(make_job("a", lengths, global_batch_size=4))
    model = model_costs(read_model("llama-3.1-70b"), stages)
    best = best_of(all_orders(workload), workload, model)
    assert best * 0.99 <= time_bound(workload.jobs, model, 1 << 20) <= best * (1 + 1e-9)


def test_a_batch_that_needs_more_microbatches_takes_longer(make_job):
    """Two of 120 tokens pass two stages in three turns; four of 60 take five, in each of which the host takes 200 s."""
    job, model = make_job("a", (60,) * 4, global_batch_size=4), CostModel(layers=(1, 1), token=1.0, host=100.0)
    assert time_bound([job], model, 240) == pytest.approx(3 * 120 * 2.07)
    assert time_bound([job], model, 60) == pytest.approx(5 * 200)


@pytest.mark.parametrize(
    ("tokens", "fewest"),
    [((9, 9, 9, 3, 3), 4), ((6, 6, 6), 3), ((5, 5, 5), 2), ((8, 8, 3, 3, 3), 3), ((1,), 1), ((7, 7, 4, 4), 3)],
)
def test_what_does_not_fit_beside_large_samples_needs_more_microbatches(tokens, fewest):
    assert fewest_microbatches(np.array(tokens), 10) == fewest


@given(tokens=st.lists(st.integers(1, 30), min_size=1, max_size=40))
def test_first_fit_never_needs_fewer_microbatches_than_the_bound(tokens):
    bins = []
    for count in sorted(tokens, reverse=True):
        place = next((index for index, held in enumerate(bins) if held + count <= 30), len(bins))
        bins[place:] = [bins[place] + count, *bins[place + 1 :]] if place < len(bins) else [count]
    assert -(-sum(tokens) // 30) <= fewest_microbatches(np.array(tokens), 30) <= len(bins)
