"""Errors in medians, intervals and ratios."""

from __future__ import annotations

from tests.planted.plant import planted

TESTS = "tests/lab/table/test_statistics.py"
MEAN = f"{TESTS}::test_the_interval_of_a_geometric_mean_is_that_of_the_tables_of_students_t"


@planted("lorafusion.lab.table.statistics:median", caught_by=f"{TESTS}::test_median_of_odd_and_even_counts")
def the_median_is_the_best(original):
    """The median of repeats is their maximum."""
    return max


@planted(
    "lorafusion.lab.table.statistics:interval",
    caught_by=f"{TESTS}::test_interval_is_the_tabulated_pair_of_order_statistics",
)
def intervals_of_medians_are_a_tenth(original):
    """The interval of a median is a tenth as wide."""

    def interval(values, *rest):
        found = original(values, *rest)
        middle = sorted(values)[len(values) // 2]
        return found and tuple(middle + (end - middle) / 10 for end in found)

    return interval


@planted("lorafusion.lab.table.statistics:geometric_mean_interval", caught_by=MEAN)
def intervals_of_means_are_a_tenth(original):
    """The interval of a geometric mean is a tenth as wide."""

    def geometric_mean_interval(values, *rest):
        found = original(values, *rest)
        if found is None:
            return None
        middle = (found[0] * found[1]) ** 0.5
        return tuple(middle * (end / middle) ** 0.1 for end in found)

    return geometric_mean_interval


@planted("lorafusion.lab.table.statistics:stdtrit", caught_by=MEAN)
def intervals_are_of_a_normal_distribution(original):
    """The interval of a mean takes the normal quantile in place of Student's t."""
    return lambda degrees, share: 1.959963984540054


@planted(
    "lorafusion.lab.table.statistics:_coverage",
    caught_by=f"{TESTS}::test_below_six_values_there_is_no_95_percent_interval",
)
def any_two_repeats_give_an_interval(original):
    """The extremes of two repeats pass for a 95 % interval."""
    return lambda count, dropped: 0.95 if dropped == 0 else 0.0
