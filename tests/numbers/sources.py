"""The tables that the documents quote, and what is taken from them: medians, ratios paired by repeat, spreads."""

from __future__ import annotations

from functools import cache
from statistics import geometric_mean
from typing import NamedTuple

import pandas as pd

from lorafusion.core.config import CONFIGS
from lorafusion.core.seals import require_seal
from lorafusion.lab.report.drawing import read_data
from lorafusion.lab.report.style import WORKLOADS
from lorafusion.lab.table.statistics import geometric_mean_interval, median
from lorafusion.lab.table.table import read_unsealed

REFERENCE = CONFIGS.parent / "results" / "reference"
H200, CPU = "nvidia-h200", "cpu"


@cache
def table(name: str) -> pd.DataFrame:
    """A measurement table of results/reference by its path in it."""
    path = REFERENCE / f"{name}.parquet"
    require_seal(path)
    return read_unsealed(path)


@cache
def drawn(name: str) -> pd.DataFrame:
    """A figure's CSV of results/reference."""
    return read_data(REFERENCE / f"{name}.csv")


class Ratio(NamedTuple):
    """A ratio of throughputs: over all workloads with its 95 % interval over the repeats, and by workload."""

    value: float
    low: float
    high: float
    by: dict[str, float]


class EndToEndTable:
    """The end-to-end measurements of one host."""

    def __init__(self, name: str) -> None:
        self.rows = table(name)
        single = self.rows[self.rows["statistic"] == "single"]
        throughput = single[(single["metric"] == "throughput") & (single["status"] == "ok")]
        self.speeds = {
            key: dict(zip(runs["repeat"], runs["value"], strict=True))
            for key, runs in throughput.groupby(["system", "workload", "merged_qkv", "window"])
        }

    def runs(self, system: str, workload: str, merged: bool = False, window: str = "whole") -> dict[int, float]:
        """Tokens a second by repeat."""
        return self.speeds.get((system, workload, merged, window), {})

    def speed(self, system: str, workload: str, merged: bool = False, window: str = "whole") -> float:
        """The median over the repeats, tokens a second."""
        return median(list(self.runs(system, workload, merged, window).values()))

    def paired(self, above: str, below: str, workload: str, merged: bool = False, window: str = "whole") -> dict:
        ours, theirs = (self.runs(system, workload, merged, window) for system in (above, below))
        return {repeat: ours[repeat] / theirs[repeat] for repeat in ours if repeat in theirs}

    def ratio(self, above: str, below: str | dict[str, str], workloads=WORKLOADS, **place) -> Ratio:
        """Paired by repeat. below: a system, or one for each workload."""
        pairs = {
            name: self.paired(above, below if isinstance(below, str) else below[name], name, **place)
            for name in workloads
        }
        repeats = sorted(set.union(*(set(ratios) for ratios in pairs.values())))
        means = [geometric_mean([ratios[n] for ratios in pairs.values() if n in ratios]) for n in repeats]
        low, high = geometric_mean_interval(means) or (min(means), max(means))
        every = [value for ratios in pairs.values() for value in ratios.values()]
        return Ratio(geometric_mean(every), low, high, {name: geometric_mean(r.values()) for name, r in pairs.items()})

    def best(self, baselines: tuple[str, ...], window: str = "whole") -> dict[str, str]:
        """The baseline with the largest median of each workload."""
        return {
            name: max(
                (one for one in baselines if self.runs(one, name, window=window)),
                key=lambda one: self.speed(one, name, window=window),
            )
            for name in WORKLOADS
        }

    def medians(self, metric: str, merged: bool | None = False, **where) -> pd.DataFrame:
        rows = self.rows[(self.rows["statistic"] == "median") & (self.rows["metric"] == metric)]
        if merged is not None:
            rows = rows[rows["merged_qkv"] == merged]
        for column, value in where.items():
            rows = rows[rows[column] == value]
        return rows
