"""The two integer programs of the paper's packing, solved with HiGHS: few microbatches, then one of them small.

    x[i, b] in {0, 1}    sample i lies in microbatch b
    used[b] in {0, 1}    microbatch b holds anything

Fewest: min sum(used), every sample in one microbatch, sum_i len_i x[i, b] <= C used[b]. Emptiest: of exactly B
microbatches, the least tokens in the last one, so that all slack gathers where the next step's samples may go.

The limit is one of nodes and not of seconds: the same input gives the same packing, however busy the machine is (the
authors' solver has a clock). Microbatches are alike, so sample i may lie in the first i + 1 only, and those used come
first.
"""

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array

NODES = 20  # of the branch-and-bound tree: 200 found no fewer microbatches in four workloads, and took twice as long
GAP = 0.15  # of the emptiest microbatch to the best that is possible, with which the authors are content too
Terms = list[tuple[int, int, float]]  # row, column, coefficient


def fewest_bins(lengths: list[int], capacity: int, bins: int) -> list[list[int]] | None:
    """The samples' indices in as few as can be of so many bins; None where HiGHS finds no packing."""
    if bins * capacity < sum(lengths):
        return None
    samples = len(lengths)
    used = samples * bins  # the column of used[0]
    terms, low, high = _assignment(samples, bins)
    for b in range(bins):
        row = len(low)
        terms += [(row, i * bins + b, length) for i, length in enumerate(lengths)] + [(row, used + b, -capacity)]
        low, high = [*low, -np.inf], [*high, 0.0]
        if b:
            terms += [(row + 1, used + b, 1.0), (row + 1, used + b - 1, -1.0)]
            low, high = [*low, -np.inf], [*high, 0.0]
    cost = np.zeros(used + bins)
    cost[used:] = 1.0
    return _solved(cost, terms, low, high, _allowed(samples, bins, bins) + [1.0] * bins, samples, bins)


def emptiest_bin(lengths: list[int], capacity: int, bins: int) -> list[list[int]] | None:
    """The samples' indices in exactly `bins` bins of which the last holds as little as HiGHS finds; None where it
    finds no packing."""
    samples = len(lengths)
    if bins == 1:
        return None
    terms, low, high = _assignment(samples, bins)
    for b in range(bins):
        terms += [(samples + b, i * bins + b, length) for i, length in enumerate(lengths)]
    cost = np.zeros(samples * bins)
    cost[bins - 1 :: bins] = lengths
    low, high = low + [0.0] * (bins - 1) + [1.0], high + [float(capacity)] * bins
    return _solved(cost, terms, low, high, _allowed(samples, bins, bins - 1), samples, bins, gap=GAP)


def _assignment(samples: int, bins: int) -> tuple[Terms, list[float], list[float]]:
    """Each sample in one bin; x[i, b] is column i * bins + b."""
    terms = [(i, i * bins + b, 1.0) for i in range(samples) for b in range(bins)]
    return terms, [1.0] * samples, [1.0] * samples


def _allowed(samples: int, bins: int, alike: int) -> list[float]:
    """The upper bounds of x, of which the first `alike` bins can change places."""
    return [float(b <= i or b >= alike) for i in range(samples) for b in range(bins)]


def _solved(
    cost: np.ndarray,
    terms: Terms,
    low: list[float],
    high: list[float],
    most: list[float],
    samples: int,
    bins: int,
    gap: float = 0.0,
) -> list[list[int]] | None:
    rows, columns, values = zip(*terms, strict=True)
    matrix = coo_array((values, (rows, columns)), shape=(len(low), len(cost))).tocsr()
    result = milp(
        cost,
        integrality=np.ones(len(cost)),
        bounds=Bounds(0.0, np.array(most)),
        constraints=LinearConstraint(matrix, low, high),
        options={"node_limit": NODES, "mip_rel_gap": gap},
    )
    if result.x is None:
        return None
    packed: list[list[int]] = [[] for _ in range(bins)]
    for i, b in enumerate(result.x[: samples * bins].reshape(samples, bins).argmax(axis=1)):
        packed[b].append(i)
    return [content for content in packed if content]
