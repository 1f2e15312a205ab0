"""What the two planner.md of docs/ quote of cpu/planner.parquet and of the constants of the planner."""

from __future__ import annotations

import re
from functools import cache

import pandas as pd

from lorafusion.core.config import read_model
from lorafusion.planning import buckets, capacity, completion, fast, memory, packer, propose
from lorafusion.planning.simulator import costs
from tests.numbers.quoted import number, percent
from tests.numbers.sources import CPU, REFERENCE, table

POINT = ["workload", "stages", "global_batch", "adapters"]
LARGE, SMALL = 1000, 200  # samples an adapter, with and without the strategies that are slow


def rows(metric: str, window: str = "whole", suite: str = "cpu", samples: int = LARGE, **where) -> pd.DataFrame:
    found = table(f"{CPU}/planner")
    found = found[(found["suite"] == suite) & (found["metric"] == metric) & (found["window"] == window)]
    found = found[(found["samples"] == samples) & (found["statistic"] == "median")]
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


def cells(values, form: str) -> str:
    return " | ".join(number(value, form) for value in values)


def results() -> list[str]:
    return [*example(), *summary(), *judged(), *limits()]


def constants() -> list[str]:
    stages = costs.model_costs(read_model("llama-3.1-70b"), 4).layers
    return [
        f"alone if they reach {percent(1 - 1 / packer.EXACT, '.1f')} of the capacity",
        f"the first {number(fast.TRIED_SAMPLES)} samples",
        f"or all of up to {number(2 * fast.TRIED_SAMPLES)} samples",
        f"until two in a row are {percent(1 - fast.HOPELESS)} slower",
        "with {} and {} times as many".format(*(number(rise, ".2f") for rise in fast.RISES[1:])),
        f"The buckets are multiples of {number(buckets.TILE)} tokens",
        f"Each bucket must save {percent(buckets.WORTH, '.1f')} of the tokens",
        f"Plans of {number(fast.LONG_WORK, ',')} samples",
        f"each is {percent(fast.FALL)} of the one before",
        f"A plan of at most {number(fast.SEARCHED_SAMPLES)} samples",
        f"or also {percent(1 / packer.EXACT, '.1f')}",
        f"within {percent(fast.MISLED)} of the best are simulated again on "
        f"{number(fast.COMPARED_SAMPLES, ',')} samples",
        f"the best with and without a ramp on {number(fast.COMPARED_SAMPLES, ',')} samples",
        f"less than {percent(fast.GOOD_BUBBLE, '.1f')} can be gained",
        "there is none, {}, {}, {}, {} or {} %".format(*(number(100 * guard, ".0f") for guard in packer.GUARDS[1:])),
        f"until the plan takes at most {percent(completion.LONGER, '.1f')} longer than the fastest one",
        f"more than {percent(completion.LONGER, '.1f')} longer.",
        f"Up to {number(completion.JUDGED_SAMPLES, ',')} samples the whole plan",
        f"{number(memory.WORKSPACE >> 30)} GiB of workspace. At most {percent(capacity.USABLE)} of a GPU's memory",
        f"{number(propose.MOST_FURTHER)} divisions after",
        f"Of those that cost up to {percent(propose.CLOSE)} more, the fastest does",
        f"links of `--network` between them ({number(propose.NETWORK / 1e9, '.0f')} GB/s)",
        f"({number(costs.FLOP_RATE / 1e12, '.0f')} TFLOP/s)",
        "{}, {}, {} and {} layers for 70B on four stages".format(*map(number, stages)),
    ]


def example() -> list[str]:
    lines = []
    for name in ("fewest", "fast"):
        ratio = xsum(name, "microbatch_ratio")
        wait, speed = xsum(name, "bubble", "steady")["value"], xsum(name, "throughput")["value"]
        faster = speed / xsum("fewest", "throughput")["value"]
        lines.append(f"| `{name}` | {number(microbatches(ratio))} | {percent(wait, '.1f')} | {number(faster, '.2f')} |")
    full = xsum("fewest", "microbatch_ratio")
    return [*lines, f"No plan needs fewer than {number(microbatches(full) / full['value'], '.0f')} microbatches"]


BATCHES = (8, 16, 32, 64)


def bubbles() -> list[str]:
    """The rows of the table of bubbles, by global batch."""
    even = [100 * bubble("fast", batch, "cpu-even") for batch in BATCHES]
    whole = [100 * bubble("fast", batch) for batch in BATCHES]
    few = {name: [100 * bubble(name, batch, samples=SMALL) for batch in BATCHES[:2]] for name in ("fast", "paper")}
    mlora = [100 * bubble("mlora", batch, "cpu-even") for batch in BATCHES]
    return [
        f"| `fast`, equal stages | {cells(even, '.2f')} |",
        f"| `mlora`, equal stages | {cells(mlora, '.0f')} |",
        f"| `fast`, stages of Llama-3.1-70B | {cells(whole, '.1f')} |",
        f"| `fast`, the same, 200 samples an adapter | {cells(few['fast'], '.1f')} | | |",
        f"| `paper`, the same, 200 samples an adapter | {cells(few['paper'], '.1f')} | | |",
    ]


def speeds() -> list[str]:
    """The rows of the table of simulated throughputs of `fast` over the others'."""
    ratios = {f"`{name}`": over(name) for name in ("fewest", "ffd", "mlora", "sequential")}
    ratios["`paper`"] = over("paper", samples=SMALL)
    ratios["`paper`, steady state"] = over("paper", "steady", samples=SMALL)
    return [
        f"| {name} | {number(len(ratio))} | {number(ratio.mean(), '.3f')} | {number(ratio.min(), '.3f')} | "
        f"{number((ratio < 1).sum())} |"
        for name, ratio in ratios.items()
    ]


def summary() -> list[str]:
    ratios = {name: rows("microbatch_ratio", system=name)["value"] for name in ("fewest", "fast")}
    solve = rows("solve_time", system="fast", adapters=4)["value"]
    slowest = rows("solve_time", samples=SMALL, system="paper")["value"].max()
    growth = {metric: rows(metric, suite="cpu-growth", samples=3907).iloc[0]
              for metric in ("solve_time", "peak_memory", "microbatch_ratio")}  # fmt: skip
    made = microbatches(growth["microbatch_ratio"])
    waits = rows("bubble", "steady", suite="cpu-growth", samples=3907)["value"].iloc[0]
    return [
        f"simulated to be {number(over('paper', samples=SMALL).mean(), '.2f')} times as fast as those of the published",
        *bubbles(),
        *speeds(),
        f"up to {number(slowest, '.0f')} s a plan",
        f"{number(ratios['fewest'].mean(), '.3f')} times the lower bound with `fewest` and "
        f"{number(ratios['fast'].mean(), '.3f')} times with `fast`",
        f"| four adapters of 1000 samples, median | {number(solve.median(), '.2f')} s |",
        f"| the same, slowest of {number(len(solve))} | {number(solve.max(), '.2f')} s |",
        f"Planning takes more than half a second in {number((solve > 0.5).sum())} of these",
        f"| a million samples, 256 adapters, one core | {number(growth['solve_time']['value'], '.0f')} s |",
        f"uses {number(growth['peak_memory']['value'] / 2**30, '.2f')} GiB and makes {number(made, ',')} "
        f"microbatches, where the bound is {number(made / growth['microbatch_ratio']['value'], ',.0f')}",
        f"Its steady state is idle {percent(waits, '.1f')}",
    ]


MANY, LOST = 250, 0.02  # samples of all adapters; of the time of the best other strategy


def judged() -> list[str]:
    """What two simulators say of `fast` beside the best of the other strategies."""
    cases = pd.read_csv(REFERENCE / CPU / "planner_judged.csv")
    others = [column for column in cases if column.endswith("_stream") and column != "fast_stream"]
    lines = [f"{number(len(cases))} workloads", f"`fast` more than {percent(LOST)} slower"]
    for judge in ("stream", "greedy"):
        best = cases[[column.replace("stream", judge) for column in others]].min(axis=1)
        ratio = cases[f"fast_{judge}"] / best
        lines.append(
            f"| `{judge}` | {percent((ratio > 1 + LOST).mean(), '.1f')} | {number(ratio.max(), '.3f')} | "
            f"{number(ratio.median(), '.3f')} |"
        )
    over_bound = cases["fast_stream"] / cases["bound"]
    many = over_bound[cases["samples"] >= MANY]
    lines.append(f"median: {number(over_bound.median(), '.2f')}, and {number(many.median(), '.2f')} of plans with")
    lines.append(f"at least {number(MANY)} samples")
    return lines


def limits() -> list[str]:
    fewest, steady = over("fewest"), over("paper", "steady", samples=SMALL)
    lost = 1 - fewest[fewest < 1]
    ratio = rows("microbatch_ratio", system="fewest").set_index(POINT)["value"]
    assert ratio.idxmax() == ("xsum", 1, 8, 2)
    assert set(steady[steady < 1].index.get_level_values("stages")) == {1}
    assert min(over("paper", samples=SMALL)) > 1
    return [
        f"On average `fast` is {percent(fewest.mean() - 1)} faster than `fewest`",
        f"{number(len(lost))} of {number(len(fewest))} plans are slower than those of `fewest`. None is slower by",
        f"more than {percent(max(lost), '.1f')}.",
        f"up to {number(ratio.max(), '.2f')} times the bound (XSum, two adapters, one stage, global batch 8)",
    ]
