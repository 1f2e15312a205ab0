"""Medians and their intervals."""

from __future__ import annotations

import random

import pytest

from lorafusion.measure.statistics import fewest, interval, median


def test_median_of_odd_and_even_counts():
    assert median([3.0, 1.0, 2.0]) == 2.0
    assert median([4, 1, 2, 3]) == 2.5


def test_median_of_nothing_is_an_error():
    with pytest.raises(ValueError, match="no values"):
        median([])


@pytest.mark.parametrize("count", range(6))
def test_below_six_values_there_is_no_95_percent_interval(count):
    assert interval(list(range(count))) is None


@pytest.mark.parametrize(("count", "dropped"), [(6, 0), (8, 0), (9, 1), (12, 2), (15, 3), (20, 5)])
def test_interval_is_the_tabulated_pair_of_order_statistics(count, dropped):
    # The ranks of the sign test's interval at 95 %, as in any table of nonparametric statistics.
    values = random.Random(count).sample(range(count), count)
    assert interval(values) == (dropped, count - 1 - dropped)


def test_a_lower_confidence_takes_fewer_values():
    assert fewest() == 6
    assert fewest(0.75) == 3
    assert interval([5.0, 7.0, 6.0], confidence=0.75) == (5.0, 7.0)


def test_interval_holds_the_true_median_as_often_as_it_claims():
    generator, trials = random.Random(1), 4000
    held = 0
    for _ in range(trials):
        low, high = interval([generator.lognormvariate(0, 1) for _ in range(9)])
        held += low <= 1.0 <= high
    assert 0.95 <= held / trials <= 0.97  # 0.961 exactly
