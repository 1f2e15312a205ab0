"""What docs/scheduler.md quotes of cpu/scheduler.parquet and of the planner's own constants."""

from __future__ import annotations

import re
from functools import cache

import pandas as pd

from lorafusion.core.config import read_model
from lorafusion.planning import fast, packer, propose
from lorafusion.planning.simulator import costs
from tests.numbers.quoted import number, percent
from tests.numbers.sources import CPU, table

POINT = ["workload", "stages", "global_batch", "adapters"]
LARGE, SMALL = 1000, 200  # samples an adapter, with and without the strategies that are slow


def rows(metric: str, window: str = "whole", suite: str = "cpu", samples: int = LARGE, **where) -> pd.DataFrame:
    found = table(f"{CPU}/scheduler")
    found = found[(found["suite"] == suite) & (found["metric"] == metric) & (found["window"] == window)]
    found = found[found["samples"] == samples]
    for column, value in where.items():
        found = found[found[column] == value]
    return found


def bubble(system: str, global_batch: int | None = None, suite: str = "cpu", samples: int = LARGE) -> float:
    """The mean over the workloads, four stages and four adapters, steady."""
    found = rows("bubble", "steady", suite, samples, system=system, stages=4, adapters=4)
    return float((found if global_batch is None else found[found["global_batch"] == global_batch])["value"].mean())


@cache
def over(other: str, window: str = "whole", samples: int = LARGE) -> pd.Series:
    """Simulated throughputs of `fast` over another strategy's."""
    ours, theirs = (
        rows("throughput", window, samples=samples, system=name).set_index(POINT)["value"] for name in ("fast", other)
    )
    return (ours / theirs).dropna()


def xsum(system: str, metric: str, window: str = "whole") -> pd.Series:
    found = rows(metric, window, system=system, workload="xsum", global_batch=8, stages=4, adapters=4)
    return found.iloc[0]


def microbatches(row: pd.Series) -> int:
    return int(re.match(r"(\d+) microbatches", row["note"])[1])


def listed(values, form: str) -> str:
    return ", ".join(number(value, form) for value in values)


def passages() -> list[str]:
    return [*_constants(), *_example(), *_measured(), *_limits()]


def _constants() -> list[str]:
    stages = costs.model_costs(read_model("llama-3.1-70b"), 4).layers
    return [
        f"alone if they reach {percent(1 - 1 / packer.EXACT, '.1f')} of the capacity",
        f"on the first {number(fast.TRIED_SAMPLES)} samples",
        f"lower ones down to {percent(min(fast.FRACTIONS))} of it",
        f"and whether {percent(1 / packer.EXACT, '.1f')} is better after all",
        f"What came within {percent(fast.MISLED)} of the best is simulated once more on "
        f"{number(fast.COMPARED_SAMPLES, ',')} samples.",
        f"they leave less than {percent(fast.GOOD_BUBBLE, '.1f')} to be gained",
        f"and {number(propose.WORKSPACE >> 30)} GiB of workspace; of a GPU's memory {percent(propose.USABLE)} are used",
        f"({number(costs.FLOP_RATE / 1e12, '.0f')} TFLOP/s)",
        "{}, {}, {} and {} for 70B on four stages".format(*map(number, stages)),
    ]


def _example() -> list[str]:
    full, ours = (xsum(name, "microbatch_ratio") for name in ("fewest", "fast"))
    faster = xsum("fast", "throughput")["value"] / xsum("fewest", "throughput")["value"] - 1
    waits = [xsum(name, "bubble", "steady")["value"] for name in ("fewest", "fast")]
    return [
        f"{number(microbatches(full))} full microbatches (the bound is "
        f"{number(microbatches(full) / full['value'], '.0f')}) "
        f"leave {percent(waits[0], '.1f')} of the steady state idle; {number(microbatches(ours))} smaller ones, in "
        f"another "
        f"order, leave {percent(waits[1], '.1f')} and train {percent(faster)} faster"
    ]


def _measured() -> list[str]:
    ratios = {name: rows("microbatch_ratio", system=name)["value"] for name in ("fewest", "fast")}
    batches = (8, 16, 32, 64)
    whole, steady = over("paper", samples=SMALL), over("paper", "steady", samples=SMALL)
    others = [over(name) for name in ("fewest", "ffd", "mlora", "sequential")]
    solve = rows("solve_time", system="fast", adapters=4)["value"]
    slowest = rows("solve_time", samples=SMALL, system="paper")["value"].max()
    growth = {metric: rows(metric, suite="cpu-growth", samples=3907).iloc[0]
              for metric in ("solve_time", "peak_memory", "microbatch_ratio")}  # fmt: skip
    made = microbatches(growth["microbatch_ratio"])
    waits = rows("bubble", "steady", suite="cpu-growth", samples=3907)["value"].iloc[0]
    slower = steady[steady < 1]
    assert set(slower.index.get_level_values("stages")) == {1}
    assert min(whole) > 1
    return [
        f"in any order: {percent(waits, '.1f')} of the steady",
        f"its programs take up to {number(slowest, '.0f')} s a plan",
        f"| microbatches over the lower bound, mean of {number(len(ratios['fast']))} points | `fewest` "
        f"{number(ratios['fewest'].mean(), '.3f')}, `fast` {number(ratios['fast'].mean(), '.3f')} |",
        f"| {listed((100 * bubble('fast', batch, 'cpu-even') for batch in batches), '.2f')} % with global batch 8, "
        f"16, 32, 64; "
        f"mean {percent(bubble('fast', suite='cpu-even'), '.1f')}; `mlora` "
        f"{percent(bubble('mlora', suite='cpu-even'))} |",
        f"| {listed((100 * bubble('fast', batch) for batch in batches), '.1f')} % with global batch 8, 16, 32, 64 |",
        f"| `paper` {number(100 * bubble('paper', 8, samples=SMALL), '.1f')} and "
        f"{percent(bubble('paper', 16, samples=SMALL), '.1f')}, `fast` "
        f"{number(100 * bubble('fast', 8, samples=SMALL), '.1f')} and "
        f"{percent(bubble('fast', 16, samples=SMALL), '.1f')} |",
        f"mean of {number(len(whole))} points | whole run: {number(whole.mean(), '.2f')}, never lower (least "
        f"{number(whole.min(), '.4f')}). Steady state: {number(steady.mean(), '.2f')}, lower in {number(len(slower))} "
        f"of "
        f"{number(len(steady))}, all on one stage (least {number(steady.min(), '.3f')}) |",
        f"| {listed((one.mean() for one in others), '.3f')}; least {listed((one.min() for one in others), '.3f')} |",
        f"| median {number(solve.median(), '.2f')} s, at most {number(solve.max(), '.2f')} s, above half a second in "
        f"{number((solve > 0.5).sum())} of {number(len(solve))} |",
        f"| {number(growth['solve_time']['value'], '.0f')} s, {number(growth['peak_memory']['value'] / 2**30, '.2f')} "
        f"GiB, "
        f"{number(made, ',')} microbatches where the bound is "
        f"{number(made / growth['microbatch_ratio']['value'], ',.0f')} |",
    ]


def _limits() -> list[str]:
    fewest = over("fewest")
    lost = sorted(1 - fewest[fewest < 1], reverse=True)
    ratio = rows("microbatch_ratio", system="fewest").set_index(POINT)["value"]
    assert ratio.idxmax() == ("xsum", 1, 8, 2)
    assert lost[1] < 0.01
    return [
        f"{percent(fewest.mean() - 1)} faster than `fewest` on average",
        f"its bubble is {percent(bubble('fast', 8, 'cpu-even'), '.1f')}",
        f"Of {number(len(fewest))} plans {number(len(lost))} are slower than that of `fewest`, one by "
        f"{percent(lost[0], '.1f')} and the others by less",
        f"it takes up to {number(rows('solve_time', system='fast', adapters=4)['value'].max(), '.2f')} s.",
        f"adapters are few, up to {number(ratio.max(), '.2f')} (XSum, two adapters, one stage, global batch 8",
    ]
