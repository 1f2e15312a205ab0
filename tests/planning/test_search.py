"""Local search: it judges changes as the simulator does, keeps the rules, and comes near the best plan there is."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorafusion.core.config import read_model
from lorafusion.core.plan import check, make_plan
from lorafusion.planning import fast, plan_workload
from lorafusion.planning.bounds import time_bound
from lorafusion.planning.common import by_adapter, insert_noops, microbatches_of
from lorafusion.planning.search import Search
from lorafusion.planning.simulator import CostModel, costs_of, even_costs, model_costs, simulate
from lorafusion.planning.simulator.waves import Times, Waves, empty_pipeline
from tests.planning.test_fast import odd_workload
from tests.planning.test_strategies import CAPACITY, workloads

WITH_ALL = CostModel(layers=(2, 1, 3, 1), token=1.0, square=0.01, fixed=0.3, head=0.2, adapter=0.5, tile=4,
                     step=0.1, latency=0.2, transfer=0.05)  # fmt: skip


def searched(workload, way, stages, model, capacity=CAPACITY):
    slots = list(fast.Trials(workload.jobs, stages, capacity).slots(way))
    return Search([bins[0] if bins else [] for bins, _ in slots], stages, capacity, model, workload.jobs)


def plan_of(workload, search):
    microbatches = [
        microbatch for bins, ended in search.result() for microbatch in fast.slot_microbatches(workload, bins, ended, 1)
    ]
    return make_plan("x", workload, microbatches, stages=search.stages, capacity=search.capacity)


def makespan(plan, workload, model):
    return simulate(plan, costs_of(plan, workload, model)).makespan


@given(workload=workloads(), stages=st.integers(2, 5), target=st.integers(1, CAPACITY), budget=st.integers(0, 2000))
def test_what_is_searched_stays_a_plan_and_gets_no_slower(workload, stages, target, budget):
    search = searched(workload, fast.Way(target, "longest-way", 0), stages, even_costs(stages))
    before = plan_of(workload, search)
    search.run(budget)
    after = plan_of(workload, search)
    check(after, workload)
    seconds = [makespan(plan, workload, even_costs(stages)) for plan in (before, after)]
    assert seconds[1] <= seconds[0] * (1 + 1e-9)


@pytest.mark.parametrize("seed", range(8))
def test_a_change_is_judged_as_it_is_simulated(seed, monkeypatch):
    """Of each change that is made the makespan that it was chosen for is that of the plan that it makes."""
    model = WITH_ALL.model_copy(update={"step": 0.0})  # steps are taken to stay where they are
    workload, judged = odd_workload(seed, 3), []
    search = searched(workload, fast.Way(900, "longest-way", 0), 4, model, 8000)
    search.left = search._paths()
    assert search._now(0, empty_pipeline(4))[0] == pytest.approx(makespan(plan_of(workload, search), workload, model))
    judge = Search._judge

    def remembered(self, state, waves, begin, turns, left, changes=1):
        found = judge(self, state, waves, begin, turns, left, changes)
        judged.append(found[0])
        return found

    monkeypatch.setattr(Search, "_judge", remembered)
    state, seen = empty_pipeline(4), set()
    for place in itertools.count():
        if place >= len(search.slots):
            break
        for change in (search._exchange, search._divide, search._close):
            judged.clear()
            before = [slot[:] for slot in search.slots]
            change(place, state)
            if search.slots != before:
                seen.add(change.__name__)
                real = makespan(plan_of(workload, search), workload, model)
                assert np.isclose(judged[0], real, rtol=1e-12).any(), (place, change.__name__)
                search.left = search._paths()
        search.walk.go(state, place, 0)
        search.walk.go(state, place, 1)
    assert "_exchange" in seen


def test_waves_backwards_are_the_longest_paths():
    """A run cut after any turn: what is done plus what is left is the makespan, or less on a stage that may wait."""
    draw, stages, slots = np.random.default_rng(1), 5, 9
    pad, count = stages, slots + 4 * stages
    real = np.zeros(count)
    real[pad : pad + slots] = draw.random(slots) < 0.8
    times = Times(
        *(draw.random((stages, count, 1)) * real[:, None] for _ in range(3)), np.where(real, 0.1, -np.inf)[:, None]
    )
    waves, state, cuts = Waves(times), empty_pipeline(stages), []
    turns = slots + 2 * stages
    for turn in range(turns):
        waves.go(state, turn, 0)
        cuts.append(state.spread(1))
        waves.go(state, turn, 1)
    end = max(rows.max() for rows in state.free)
    left = empty_pipeline(stages)
    for turn in range(turns - 1, -1, -1):
        waves.back(left, turn, 1)
        paths = [done + rest for pair, rests in zip(cuts[turn], left, strict=True)
                 for done, rest in zip(pair, rests, strict=True)]  # fmt: skip
        assert max(path.max() for path in paths) == pytest.approx(end)
        waves.back(left, turn, 0)


def tiny_workload(make_job, make_workload, seed):
    draw = random.Random(seed)
    adapters, samples = draw.choice([1, 2, 3]), draw.choice([6, 7])
    sizes = [samples // adapters + (index < samples % adapters) for index in range(adapters)]
    return make_workload(
        *(
            make_job(
                f"a{index}",
                [min(4000, max(2, int(draw.lognormvariate(6.5, 0.8)))) for _ in range(size)],
                global_batch_size=draw.choice([2, 3]),
            )
            for index, size in enumerate(sizes)
        )
    )


def all_orders(workload):
    """Every way to put the samples into microbatches in some order, as dictionaries of positions by adapter."""
    jobs = workload.jobs

    def orders(batches, left):
        ready = [(adapter, position) for adapter, positions in enumerate(left) for position in positions]
        if not ready:
            yield []
            return
        for size in range(1, len(ready) + 1):
            for chosen in itertools.combinations(ready, size):
                after = [[p for p in positions if (a, p) not in chosen] for a, positions in enumerate(left)]
                numbers = list(batches)
                for adapter, positions in enumerate(after):
                    if not positions and left[adapter] and batches[adapter] + 1 < len(jobs[adapter].batches):
                        numbers[adapter] += 1
                        after[adapter] = list(jobs[adapter].batches[numbers[adapter]])
                yield from ([by_adapter(chosen), *rest] for rest in orders(numbers, after))

    return orders([0] * len(jobs), [list(job.batches[0]) for job in jobs])


def best_of(orders, workload, model):
    """Seconds of the fastest of some orders, each with as many no-ops as it needs."""
    best, sizes = np.inf, {"stages": model.stages, "capacity": 1 << 20}
    for order in orders:
        microbatches = insert_noops(microbatches_of(workload, order), workload, model.stages)
        best = min(best, makespan(make_plan("x", workload, microbatches, **sizes), workload, model))
    return best


@pytest.mark.parametrize("seed", range(5))
def test_tiny_plans_are_near_the_best_of_all(make_job, make_workload, seed):
    workload, stages = tiny_workload(make_job, make_workload, seed), 2 + seed % 3
    model = model_costs(read_model("llama-3.1-70b"), stages)
    best = best_of(all_orders(workload), workload, model)
    assert time_bound(workload.jobs, model, 1 << 20) <= best * (1 + 1e-9)
    plan = plan_workload(workload, "fast", stages=stages, capacity=1 << 20, costs=model)
    assert best <= makespan(plan, workload, model) * (1 + 1e-9)
    assert makespan(plan, workload, model) <= best * 1.02
