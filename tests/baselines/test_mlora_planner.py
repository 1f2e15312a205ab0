"""mLoRA's policy, rule by rule; what every strategy must do is in tests/planning."""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from baselines.mlora.planner import plan
from lorafusion.core.plan import check
from lorafusion.core.schema import UserError
from lorafusion.core.workload import Job, Sample, Workload

CAPACITY = 24


def planned(workload, stages=1, capacity=CAPACITY, data_parallel=1, **switches):
    return plan(workload, "mlora", stages, capacity, data_parallel, **switches)


def contents(found):
    """What each microbatch that is not a no-op holds, by adapter."""
    return [{part.adapter: part.samples for part in one.segments} for one in found.microbatches if not one.noop]


def groups(found):
    """The adapters of microbatches, in the order in which each such group comes first."""
    return list(dict.fromkeys(tuple(content) for content in contents(found)))


@pytest.mark.parametrize(
    ("lengths", "multiple", "rows"),
    [
        ((5, 3, 8, 2, 6), 8, [8, 8, 8]),
        ((9, 3, 2, 2, 17), 8, [16, 8, 24]),
        ((9, 3, 2, 2, 17), 1, [9, 2, 17]),
        ((5, 3, 4, 2), 4, [8, 4]),
        ((2,), 8, [8]),
        ((8, 8), 8, [8]),
        ((5, 3, 8, 2, 6), None, [None, None, None]),
    ],
)
def test_rows_are_as_long_as_the_longest_rounded_up(lengths, multiple, rows, make_job, make_workload):
    found = planned(make_workload(make_job("a", lengths)), capacity=32, row_multiple=multiple)
    assert [one.row_tokens for one in found.microbatches] == rows
    for one in found.microbatches:
        assert one.length == (one.tokens if multiple is None else one.rows * one.row_tokens)
    assert found.statistics.tokens == sum(lengths)


@pytest.mark.parametrize(
    ("capacity", "multiple", "expected"),
    [
        (32, 8, [(0, 1), (2, 3)]),  # two rows of 16
        (31, 8, [(0,), (1,), (2,), (3,)]),
        (31, None, [(0, 1, 2, 3)]),
        (19, None, [(0, 1, 2, 3)]),
        (18, None, [(0, 1), (2, 3)]),
        (12, None, [(0, 1), (2, 3)]),
        (10, None, [(0,), (1,), (2,), (3,)]),
    ],
)
def test_the_capacity_counts_padding(capacity, multiple, expected, make_job, make_workload):
    workload = make_workload(make_job("a", (9, 3, 5, 2), global_batch_size=4))
    found = planned(workload, capacity=capacity, row_multiple=multiple)
    assert [content[0] for content in contents(found)] == expected


def test_padding_of_one_sample_above_the_capacity_is_named(make_job, make_workload):
    workload = make_workload(make_job("a", (2, 9)))
    planned(workload, capacity=9)
    with pytest.raises(UserError) as caught:
        planned(workload, capacity=15, row_multiple=8)
    assert str(caught.value) == (
        "workload toy: sample 1 of 'a' has 9 tokens, padded to a multiple of 8, more than the capacity of 15; raise "
        "the capacity or drop the sample"
    )


@pytest.mark.parametrize(("replicas", "size"), [(1, 4), (2, 2), (3, 2), (4, 1), (8, 1)])
def test_samples_of_a_microbatch_are_a_power_of_two_within_a_replicas_share(replicas, size, make_job, make_workload):
    workload = make_workload(make_job("a", (2,) * 14, global_batch_size=7))
    found = planned(workload, data_parallel=replicas)
    cuts = [content[0] for content in contents(found)]
    batches = [range(7), range(7, 14)]
    assert cuts == [tuple(batch[at : at + size]) for batch in batches for at in range(0, 7, size)]


def test_without_split_a_microbatch_is_a_global_batch(make_job, make_workload):
    workload = make_workload(make_job("a", (4,) * 7, global_batch_size=3), make_job("b", (2,) * 5, global_batch_size=5))
    assert contents(planned(workload, split=False)) == [
        {0: (0, 1, 2)},
        {1: (0, 1, 2, 3, 4)},
        {0: (3, 4, 5)},
        {0: (6,)},
    ]
    together = planned(workload, split=False, batch_lora=True)
    assert contents(together) == [{0: (0, 1, 2), 1: (0, 1, 2, 3, 4)}, {0: (3, 4, 5)}, {0: (6,)}]


@pytest.mark.parametrize(
    ("lengths", "switches", "capacity"),
    [
        ((4, 4, 4, 4), {}, 7),
        ((2, 2, 4, 4), {}, 7),  # the second batch alone is too large
        ((2, 2, 9, 2), {"row_multiple": 8}, 31),
    ],
)
def test_without_split_a_global_batch_above_the_capacity_is_refused(
    lengths, switches, capacity, make_job, make_workload
):
    workload = make_workload(make_job("z", (2, 2)), make_job("a", lengths))
    planned(workload, capacity=capacity, **switches)
    planned(workload, capacity=capacity + 1, split=False, **switches)
    with pytest.raises(UserError) as caught:
        planned(workload, capacity=capacity, split=False, **switches)
    assert str(caught.value) == f"a global batch of a exceeds the capacity of {capacity}; raise it, or split batches"


@pytest.mark.parametrize(
    ("adapters", "stages", "expected"),
    [
        (1, 1, [(0,)]),
        (2, 1, [(0, 1)]),
        (4, 1, [(0, 1, 2, 3)]),
        (4, 2, [(0, 1), (2, 3)]),
        (5, 2, [(0, 1), (2, 3, 4)]),
        (4, 3, [(0,), (1,), (2, 3)]),
        (7, 3, [(0, 1), (2, 3), (4, 5, 6)]),
        (3, 3, [(0,), (1,), (2,)]),
        (2, 4, [(0,), (1,)]),
    ],
)
def test_neighbours_are_merged_into_as_many_groups_as_stages(adapters, stages, expected, make_job, make_workload):
    workload = make_workload(*(make_job(f"job-{index}", (2,) * 4) for index in range(adapters)))
    assert groups(planned(workload, stages, batch_lora=True)) == expected
    assert groups(planned(workload, stages)) == [(index,) for index in range(adapters)]


@pytest.mark.parametrize(
    ("lengths", "multiple", "expected"),
    [
        ([(6,), (6,), (6,), (6,)], None, [(0, 1, 2, 3)]),
        ([(7,), (7,), (7,), (7,)], None, [(0, 1), (2, 3)]),  # 24 are there, three are 21, four are 28
        ([(13,), (13,), (13,), (13,)], None, [(0,), (1,), (2,), (3,)]),
        ([(2,), (22,), (2,), (2,)], None, [(0, 1), (2, 3)]),
        ([(20,), (2,), (20,)], None, [(0,), (1, 2)]),
        ([(2,), (2,), (2,), (2,)], 8, [(0, 1), (2, 3)]),  # padded
        ([(20, 2), (4, 22)], None, [(0, 1)]),  # which samples meet, not the longest of each
        ([(20, 2), (22, 4)], None, [(0,), (1,)]),
    ],
)
def test_there_are_more_groups_where_one_sample_of_each_does_not_fit(
    lengths, multiple, expected, make_job, make_workload
):
    workload = make_workload(*(make_job(f"job-{index}", one) for index, one in enumerate(lengths)))
    assert groups(planned(workload, batch_lora=True, row_multiple=multiple)) == expected


def test_merged_adapters_have_the_same_number_of_samples_in_a_microbatch(make_job, make_workload):
    """Global batches of other sizes and numbers: who has no samples left is not there, and steps when its own end."""
    workload = make_workload(make_job("a", (3,) * 6, global_batch_size=4), make_job("b", (2,) * 3, global_batch_size=1))
    found = planned(workload, capacity=10, batch_lora=True)
    assert contents(found) == [{0: (0, 1), 1: (0,)}, {0: (2, 3)}, {0: (4, 5), 1: (1,)}, {1: (2,)}]
    assert [one.step_after for one in found.microbatches] == [(1,), (0,), (0, 1), (1,)]


def test_adapters_take_turns_by_whole_global_batches(make_job, make_workload):
    """Whose batches are at an end is passed over."""
    sizes = {"a": ((4,) * 6, 2), "b": ((3,) * 3, 3), "c": ((5,) * 2, 1)}
    workload = make_workload(
        *(make_job(name, lengths, global_batch_size=size) for name, (lengths, size) in sizes.items())
    )
    found = planned(workload, capacity=5)  # a sample a microbatch
    turns = [
        (part.adapter, workload.jobs[part.adapter].batch_of(part.samples[0]))
        for one in found.microbatches
        for part in one.segments
    ]
    assert turns == [(0, 0)] * 2 + [(1, 0)] * 3 + [(2, 0)] + [(0, 1)] * 2 + [(2, 1)] + [(0, 2)] * 2
    steps = [one.step_after for one in found.microbatches]
    assert steps == [(), (0,), (), (), (1,), (2,), (), (0,), (2,), (), (0,)]


def test_a_job_goes_on_where_it_was(make_job, make_workload):
    workload = make_workload(make_job("a", (2,) * 8, start=2), make_job("b", (2,) * 8, start=1))
    assert contents(planned(workload, batch_lora=True)) == [
        {0: (4, 5), 1: (2, 3)},
        {0: (6, 7), 1: (4, 5)},
        {1: (6, 7)},
    ]


@pytest.mark.parametrize("replicas", [1, 2])
@pytest.mark.parametrize(("adapters", "size"), [*product((1, 2, 3, 4), (1, 2, 3))])
@pytest.mark.parametrize("stages", [1, 2, 3, 4, 5])
def test_the_pipeline_waits_where_too_few_adapters_are_left(stages, adapters, size, replicas, make_job, make_workload):
    """Between two batches of an adapter come the others', (L - 1) N slots of them; S - 1 must."""
    batches = 3
    lengths = (4,) * (batches * size * replicas)
    workload = make_workload(
        *(make_job(f"job-{index}", lengths, global_batch_size=size * replicas) for index in range(adapters))
    )
    found = planned(workload, stages, 4, replicas)
    missing = max(0, stages - 1 - (adapters - 1) * size)
    assert found.statistics.noops == (batches - 1) * missing * replicas
    begins = [slot for slot, parts in enumerate(found.slots()) if parts[0].segments and 0 in contents_of(parts)]
    assert begins == [batch * (adapters * size + missing) + at for batch in range(batches) for at in range(size)]


def test_epochs_of_unequal_length_meet_within_the_capacity(make_job, make_workload):
    """In the third round the second epoch of the first job, four samples, meets a long sample of the other."""
    workload = make_workload(
        make_job("a", (2,) * 5, global_batch_size=4, epochs=2), make_job("b", (2, 2, 9), global_batch_size=1)
    )
    plan = planned(workload, 1, 64, row_multiple=8, batch_lora=True)
    check(plan, workload)
    assert max(microbatch.length for microbatch in plan.microbatches) <= 64


def contents_of(slot):
    return {part.adapter for microbatch in slot for part in microbatch.segments}


@st.composite
def workloads(draw) -> Workload:
    jobs = []
    for index in range(draw(st.integers(1, 5))):
        lengths = draw(st.lists(st.integers(2, CAPACITY), min_size=1, max_size=10))
        size, epochs = draw(st.integers(1, 6)), draw(st.integers(1, 2))
        batches = epochs * -(-len(lengths) // size)
        steps = draw(st.integers(1, batches))
        jobs.append(
            Job(
                name=f"job-{index}", dataset="toy", rank=4, alpha=1.0, epochs=epochs, global_batch_size=size,
                steps=steps, start=draw(st.integers(0, steps - 1)),
                samples=[Sample(at, tokens) for at, tokens in enumerate(lengths)],
            )
        )  # fmt: skip
    return Workload(name="drawn", jobs=tuple(jobs))


@settings(max_examples=150, deadline=None)
@given(
    workload=workloads(),
    stages=st.integers(1, 5),
    replicas=st.integers(1, 3),
    multiple=st.sampled_from([None, 1, 4, 8]),
    split=st.booleans(),
    batch_lora=st.booleans(),
)
def test_every_plan_of_every_switch_is_exact(workload, stages, replicas, multiple, split, batch_lora):
    switches = {"row_multiple": multiple, "split": split, "batch_lora": batch_lora}
    found, refusal = plan_or_refusal(workload, stages, CAPACITY, replicas, **switches)
    if found is None:
        assert not split
        assert "exceeds the capacity of 24" in refusal
        assert max(padded(workload, multiple, together=batch_lora)) > CAPACITY
        return
    check(found, workload)
    assert found.statistics.tokens == workload.tokens
    count = min(stages, len(workload.jobs)) if batch_lora else len(workload.jobs)
    most = -(-len(workload.jobs) // count)  # adapters of a group
    for one in (one for one in found.microbatches if not one.noop):
        adapters = [part.adapter for part in one.segments]
        assert set(adapters) <= set(range(adapters[0], adapters[0] + most))
        lengths = []
        for part in one.segments:
            assert part.samples == tuple(range(part.samples[0], part.samples[-1] + 1))
            lengths += [workload.jobs[part.adapter].sample_at(position).tokens for position in part.samples]
            if not split:
                assert part.samples == tuple(batch_of(workload.jobs[part.adapter], part.samples[0]))
        assert one.row_tokens == (multiple and -(-max(lengths) // multiple) * multiple)


def plan_or_refusal(*arguments, **switches):
    try:
        return planned(*arguments, **switches), None
    except UserError as error:
        return None, str(error)


def batch_of(job, position):
    return job.batches[job.batch_of(position)]


def padded(workload, multiple, together):
    """Tokens of each adapter's global batches; together: of one of each adapter, which is as much as a group has."""
    rounds = []
    for job in workload.jobs:
        lengths = [[job.sample_at(position).tokens for position in batch] for batch in job.batches[job.start :]]
        rounds.append(lengths)
    if together:
        most = max(map(len, rounds))
        whole = [sum((one[at] for one in rounds if at < len(one)), []) for at in range(most)]
    else:
        whole = [batch for one in rounds for batch in one]
    return [sum(one) if multiple is None else len(one) * -(-max(one) // multiple) * multiple for one in whole]
