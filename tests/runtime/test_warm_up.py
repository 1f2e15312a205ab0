"""What is run before the clock starts."""

from __future__ import annotations

import pytest

from lorafusion.plan import Microbatch, Segment
from lorafusion.runtime.training import of_each_size


def microbatch(*tokens: int) -> Microbatch:
    parts = tuple(Segment(adapter=index, samples=(0,), tokens=one) for index, one in enumerate(tokens))
    return Microbatch(segments=parts) if parts else Microbatch(noop=True)


@pytest.mark.parametrize(
    ("sizes", "most", "expected"),
    [
        ([(5,), (5,), (3,)], 9, [2, 0]),
        ([(5,), (2, 3), (), (4, 1)], 9, [0, 1]),  # as long, but of more adapters
        ([(5,), (3,)], 0, []),
        ([(length,) for length in range(9, 0, -1)], 3, [8, 5, 2]),
        ([(length,) for length in range(1, 11)], 4, [0, 3, 6, 9]),
        ([()], 9, []),
    ],
)
def test_a_microbatch_of_each_size_is_met(sizes, most, expected):
    assert of_each_size([microbatch(*one) for one in sizes], most) == expected
