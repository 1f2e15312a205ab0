"""Jobs by group: each in one, evenly, with room for all; groups by node."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorafusion.planning.groups import distribute, nodes_of, places

JOBS = st.lists(st.tuples(st.floats(0.1, 1e4), st.integers(1, 100)), min_size=1, max_size=30)


@given(JOBS, st.integers(1, 8), st.integers(1, 400))
def test_every_job_is_in_one_group_and_no_group_is_over_its_room(jobs, groups, room):
    seconds, sizes = zip(*jobs, strict=True)
    members = distribute(seconds, sizes, groups, room)
    if members is None:
        assert sum(sizes) > room  # all of them in the first one
        return
    assert sorted(itertools.chain(*members)) == list(range(len(jobs)))
    assert len(members) == groups
    assert max(sum(sizes[job] for job in group) for group in members) <= room


@given(JOBS, st.integers(1, 8))
def test_the_longest_group_is_within_a_third_of_a_bound(jobs, groups):
    """Graham's bound, against what no division can beat: an even share, and the longest job."""
    seconds = [seconds for seconds, _ in jobs]
    members = distribute(seconds, [1] * len(jobs), groups, math.inf)
    longest = max(sum(seconds[job] for job in group) for group in members)
    assert longest <= sum(seconds) / groups + max(seconds) * (1 - 1 / groups) + 1e-6


def test_more_than_a_group_has_room_for_goes_to_the_next_one():
    assert distribute([3, 2, 1], [5, 5, 5], 2, 10) == [[0], [1, 2]]
    assert distribute([9, 1, 1], [6, 7, 4], 2, 10) == [[0, 2], [1]]  # the second has less to do, but no room
    assert distribute([1, 1, 1], [6, 6, 6], 2, 10) is None


@pytest.mark.parametrize(
    ("gpus", "size", "per_node", "count"),
    [
        (7, 2, 8, 3), (8, 3, 8, 2), (16, 3, 8, 4), (20, 3, 8, 5), (256, 4, 8, 64), (16, 16, 8, 1), (31, 16, 8, 1),
        (32, 12, 8, 2), (32, 9, 8, 0), (7, 8, 8, 0), (8, 1, 1, 8), (8, 2, 1, 4),
    ],
)  # fmt: skip
def test_groups_are_on_one_node_or_alike_on_several(gpus, size, per_node, count):
    assert places(gpus, size, per_node) == count
    assert size % nodes_of(size, per_node) == 0 or not count


@given(st.integers(1, 300), st.integers(1, 300), st.integers(1, 16))
def test_more_gpus_have_room_for_as_many_groups(gpus, size, per_node):
    assert places(gpus, size, per_node) <= places(gpus + 1, size, per_node)
    assert places(gpus, size, per_node) * size <= gpus
