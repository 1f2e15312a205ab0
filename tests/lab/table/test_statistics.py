"""Medians and means, and their intervals."""

from __future__ import annotations

import math
import random
import statistics

import pytest

from lorafusion.lab.table.statistics import fewest, geometric_mean_interval, interval, median


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


def held(interval_of, count: int, seed: int) -> float:
    """How often the interval of some draws from a log-normal distribution holds its median, which is its geometric mean
    too: 1."""
    generator, trials = random.Random(seed), 4000
    found = [interval_of([generator.lognormvariate(0, 1) for _ in range(count)]) for _ in range(trials)]
    return sum(low <= 1.0 <= high for low, high in found) / trials


def test_interval_holds_the_true_median_as_often_as_it_claims():
    assert 0.95 <= held(interval, 9, seed=1) <= 0.97  # 0.961 exactly


@pytest.mark.parametrize(("count", "quantile"), [(3, 4.3027), (5, 2.7764), (15, 2.1448)])
def test_the_interval_of_a_geometric_mean_is_that_of_the_tables_of_students_t(count, quantile):
    values = [random.Random(index).lognormvariate(0, 0.3) for index in range(count)]
    logarithms = [math.log(value) for value in values]
    reach = math.exp(quantile * statistics.stdev(logarithms) / math.sqrt(count))
    middle = math.prod(values) ** (1 / count)
    assert geometric_mean_interval(values) == pytest.approx((middle / reach, middle * reach), rel=1e-4)


@pytest.mark.parametrize("count", range(3))
def test_from_two_values_there_is_no_interval_of_a_mean(count):
    assert geometric_mean_interval([1.0, 2.0][:count]) is None


def test_the_interval_of_a_mean_holds_it_as_often_as_it_claims():
    assert 0.94 <= held(geometric_mean_interval, 3, seed=2) <= 0.96
