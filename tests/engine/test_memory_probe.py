"""From what microbatches take on the stages to how many tokens they may hold."""

from __future__ import annotations

import json

import pytest

from lorafusion.core.plan import check
from lorafusion.core.schema import UserError
from lorafusion.engine.memory_probe import MOST, SIZES, Measured, Needs, capacity_of, probe_workload
from lorafusion.planning.capacity import STEP

MIB = 2.0**20


def stage(usable=64 * 1024, in_flight=1, base=16 * 1024, kept=4.0, recomputed=0.5) -> Measured:
    """A stage by its memory in MiB; activations in MiB a token."""
    whole = Needs(base * MIB, (0.0, kept * MIB), (100 * MIB, 0.5 * MIB))
    again = Needs(base * MIB, (0.0, recomputed * MIB), (100 * MIB, 1.0 * MIB))
    return Measured(usable * MIB, in_flight, whole, again)


def test_what_fits_is_taken_without_recomputing():
    capacity, share = capacity_of([stage()], 4096, None)
    assert share == 0.0
    assert capacity == int((48 * 1024 - 100) / 4.5) // STEP * STEP


def test_what_a_process_measured_is_handed_on():
    assert Measured.from_json(json.loads(json.dumps(stage().to_json()))) == stage()


def test_the_fullest_stage_decides():
    alone, _ = capacity_of([stage(in_flight=4)], 512, 0.0)
    together, _ = capacity_of([stage(in_flight=4), stage(in_flight=1)], 512, 0.0)
    assert together == alone


def test_graphs_have_a_pool_of_memory_for_each_microbatch_in_flight():
    """What passes is in each pool, and not only what is kept."""
    eager, captured = (capacity_of([stage(in_flight=3)], 512, 0.0, graphs=graphs)[0] for graphs in (False, True))
    assert eager == int((48 * 1024 - 100) / (3 * 4 + 0.5)) // STEP * STEP
    assert captured == int((48 * 1024 - 3 * 100) / (3 * 4 + 3 * 0.5)) // STEP * STEP
    assert capacity_of([stage()], 512, 0.0, graphs=True) == capacity_of([stage()], 512, 0.0)


def test_as_few_layers_as_need_be_are_computed_again():
    capacity, share = capacity_of([stage(kept=8.0)], 4096, None)
    assert (share, capacity >= 8192) == (0.5, True)
    assert capacity_of([stage(kept=8.0)], 4096, None, wanted=5000) == capacity_of([stage(kept=8.0)], 4096, 0.0)
    assert capacity_of([stage(kept=8.0)], 4096, 1.0)[1] == 1.0


def test_a_small_gpu_holds_what_it_can():
    capacity, share = capacity_of([stage(usable=20 * 1024)], 1024, None)
    assert share == 1.0
    assert 1024 <= capacity < 8192


def test_no_microbatch_is_larger_than_is_of_use():
    assert capacity_of([stage(kept=0.01)], 512, None)[0] == MOST


@pytest.mark.parametrize("usable", [16 * 1024, 17 * 1024])
def test_a_sample_that_does_not_fit_is_the_users_to_mend(usable):
    with pytest.raises(UserError, match="the longest sample has 4096. Take more processes, shorter samples"):
        capacity_of([stage(usable=usable)], 4096, None)


def test_the_microbatches_that_are_measured_hold_all_jobs(make_job, make_workload):
    workload, plan = probe_workload(make_workload(make_job("a", epochs=3, start=2), make_job("b"), make_job("c")))
    check(plan, workload)
    assert [microbatch.tokens for microbatch in plan.microbatches] == [size // 3 * 3 for size in SIZES]
    assert all(len(microbatch.segments) == 3 for microbatch in plan.microbatches)
