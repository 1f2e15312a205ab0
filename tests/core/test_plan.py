"""The plan checker: what it accepts, and that it sees each breach of each rule."""

from __future__ import annotations

import json

import pytest

from lorafusion.core.plan import Microbatch, Plan, PlanError, Segment, check, make_plan, violations
from lorafusion.core.schema import UserError
from lorafusion.planning import first_fit
from lorafusion.planning.common import segment

NOOP = Microbatch(noop=True)


def one_adapter(make_job, make_workload):
    """Four samples of 2 tokens, global batches of 2: positions 0 1 | 2 3."""
    return make_workload(make_job("a", (2, 2, 2, 2), global_batch_size=2))


def microbatch(workload, positions, step=(), adapter=0):
    return Microbatch(segments=(segment(workload, adapter, positions),), step_after=step)


def planned(workload, microbatches, stages=1, capacity=8, **options):
    return make_plan("test", workload, microbatches, stages=stages, capacity=capacity, **options)


def test_statistics_and_round_trip(make_workload, tmp_path):
    workload = make_workload()
    plan = first_fit.plan(workload, "lorafusion", 2, 16)
    path = tmp_path / "plan.json"
    path.write_text(plan.to_json())
    again = Plan.read(path)
    assert again == plan
    assert again.content_hash == plan.content_hash
    check(again, workload)
    assert plan.statistics.tokens == workload.tokens
    assert plan.statistics.fill == pytest.approx(workload.tokens / (16 * len(plan.microbatches)))


@pytest.mark.parametrize("stages", [1, 2, 3, 4])
def test_the_dependency_rule_needs_as_many_slots_as_stages(make_job, make_workload, stages):
    workload = one_adapter(make_job, make_workload)
    first, second = microbatch(workload, [0, 1], (0,)), microbatch(workload, [2, 3], (0,))
    planned(workload, [first, *[NOOP] * (stages - 1), second], stages)
    if stages > 1:
        with pytest.raises(PlanError, match=f"{stages - 1} after the end of batch 0; {stages} stages need {stages}"):
            planned(workload, [first, *[NOOP] * (stages - 2), second], stages)
        planned(workload, [first, second], stages, flush=True)


def test_batches_that_interleave_break_the_rule_even_on_one_stage(make_job, make_workload):
    workload = one_adapter(make_job, make_workload)
    both = microbatch(workload, [0, 1, 2, 3], (0,))
    with pytest.raises(PlanError, match="steps after slots"):
        planned(workload, [both])


BREACHES = {
    "a sample is missing": (
        lambda w: [microbatch(w, [0, 1], (0,)), microbatch(w, [2], (0,))],
        "1 of the 4 samples",
    ),
    "a sample comes twice": (
        lambda w: [microbatch(w, [0, 1], (0,)), microbatch(w, [1, 2, 3], (0,))],
        "sample 1 of 'a' comes twice",
    ),
    "a step is missing": (
        lambda w: [microbatch(w, [0, 1]), microbatch(w, [2, 3], (0,))],
        "steps after slots [1]",
    ),
    "a step comes early": (
        lambda w: [microbatch(w, [0], (0,)), microbatch(w, [1]), microbatch(w, [2, 3], (0,))],
        "steps after slots [0, 2], its global batches end at [1, 2]",
    ),
    "a step comes twice": (
        lambda w: [microbatch(w, [0, 1], (0, 0)), microbatch(w, [2, 3], (0,))],
        "steps after slots [0, 0, 1]",
    ),
    "an empty microbatch is no no-op": (lambda w: [Microbatch()], "holds no samples and is not marked"),
    "a no-op steps": (lambda w: [Microbatch(noop=True, step_after=(0,))], "a no-op holds no samples"),
    "an adapter does not exist": (
        lambda w: [Microbatch(segments=(Segment(adapter=3, samples=(0,), tokens=2),))],
        "adapter 3, but the workload has 1",
    ),
    "a position does not exist": (
        lambda w: [Microbatch(segments=(Segment(adapter=0, samples=(4,), tokens=2),))],
        "sample 4 of 'a', whose stream has 0 to 3",
    ),
    "the tokens are wrong": (
        lambda w: [Microbatch(segments=(Segment(adapter=0, samples=(0,), tokens=3),))],
        "declares 3 tokens, its samples have 2",
    ),
    "an adapter has two segments": (
        lambda w: [
            Microbatch(segments=(segment(w, 0, [0]), segment(w, 0, [1])), step_after=(0,)),
            microbatch(w, [2, 3], (0,)),
        ],
        "two segments of one adapter",
    ),
}


@pytest.mark.parametrize("name", list(BREACHES))
def test_each_breach_is_seen(make_job, make_workload, name):
    workload = one_adapter(make_job, make_workload)
    make, message = BREACHES[name]
    with pytest.raises(PlanError) as caught:
        planned(workload, make(workload))
    assert message in str(caught.value)


def test_capacity_is_a_rule(make_job, make_workload):
    workload = one_adapter(make_job, make_workload)
    with pytest.raises(PlanError, match="microbatch 0: 4 tokens exceed the capacity of 3"):
        planned(workload, [microbatch(workload, [0, 1], (0,)), microbatch(workload, [2, 3], (0,))], capacity=3)


def test_a_plan_belongs_to_its_workload(make_job, make_workload):
    plan = first_fit.plan(make_workload(), "lorafusion", 1, 16)
    other = make_workload(make_job("z"))
    assert "made for workload" in violations(plan, other)[0]


def test_replicas_share_slots_and_steps(make_job, make_workload):
    """With two replicas the dependency rule counts slots, not microbatches, and a slot steps once."""
    workload = one_adapter(make_job, make_workload)
    order = [
        microbatch(workload, [0]),
        microbatch(workload, [1], (0,)),
        microbatch(workload, [2]),
        microbatch(workload, [3], (0,)),
    ]
    plan = planned(workload, order).model_copy(update={"data_parallel": 2})
    assert violations(plan, workload) == []
    assert "stages need 2" in violations(plan.model_copy(update={"stages": 2}), workload)[0]
    odd = plan.model_copy(update={"microbatches": plan.microbatches[:3]})
    assert "do not fill slots" in violations(odd, workload)[0]


def test_a_plan_of_another_version_is_refused(make_workload, tmp_path):
    data = json.loads(first_fit.plan(make_workload(), "lorafusion", 1, 16).to_json())
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(data | {"version": 2}))
    with pytest.raises(UserError, match="plan of version 2, expected version 1; make it again"):
        Plan.read(path)


def test_statistics_that_are_not_the_plans_own_are_refused(make_workload):
    """Throughputs are computed from them."""
    plan = first_fit.plan(make_workload(), "lorafusion", 1, 16)
    more = plan.statistics.model_copy(update={"tokens": 1000 * plan.statistics.tokens})
    found = violations(plan.model_copy(update={"statistics": more}), make_workload())
    assert found == ["its statistics are not those of its microbatches"]
