"""What repeats of a measurement say together: their median or mean, and how well it is known."""

import math
import statistics
from collections.abc import Sequence

from scipy.special import stdtrit

CONFIDENCE = 0.95
FEWEST_OF_MEAN = 3  # from two values the interval would be 13 times as wide as they are apart


def median(values: Sequence[float]) -> float:
    """The median of at least one value, in the values' own unit; raises `ValueError` for none."""
    if not values:
        raise ValueError("the median of no values")
    return float(statistics.median(values))


def interval(values: Sequence[float], confidence: float = CONFIDENCE) -> tuple[float, float] | None:
    """The narrowest pair of order statistics that holds the true median with at least `confidence`, or None.

    None where even the smallest and the largest value do not reach the confidence: below six values for 95 %. Nothing
    is assumed about the distribution but that the values are independent, as those of fresh processes are. A bootstrap
    would give numbers for three values too, but they hold the median far less often than they claim.
    """
    ordered, count = sorted(values), len(values)
    dropped = None
    for rank in range((count + 1) // 2):
        if _coverage(count, rank) < confidence:
            break
        dropped = rank
    if dropped is None:
        return None
    return float(ordered[dropped]), float(ordered[count - 1 - dropped])


def geometric_mean_interval(values: Sequence[float], confidence: float = CONFIDENCE) -> tuple[float, float] | None:
    """An interval for the true geometric mean of positive values, by Student's t of their logarithms, which are taken
    to be normally distributed; None from fewer than `FEWEST_OF_MEAN` values."""
    if len(values) < FEWEST_OF_MEAN:
        return None
    logarithms = [math.log(value) for value in values]
    error = statistics.stdev(logarithms) / math.sqrt(len(values))
    reach = float(stdtrit(len(values) - 1, (1 + confidence) / 2)) * error
    middle = statistics.fmean(logarithms)
    return math.exp(middle - reach), math.exp(middle + reach)


def fewest(confidence: float = CONFIDENCE) -> int:
    """How many values it takes until `interval` can give one."""
    return next(count for count in range(2, 1000) if _coverage(count, 0) >= confidence)


def _coverage(count: int, dropped: int) -> float:
    """The probability that the median lies between the extremes of `count` values without the `dropped` at each end."""
    outside = sum(math.comb(count, below) for below in range(dropped + 1))
    return 1 - 2 * outside / 2**count
