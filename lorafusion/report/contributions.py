"""The speedup of lorafusion over the best baseline, and what each of its parts adds: ratios of throughputs.

Ratios are paired by repeat, as the runs of a repeat are made in one pass over the suite: a drift of the machine between
passes is in both. A value is the geometric mean of its ratios, since only then is the product of the parts the whole,
for a workload and over all of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import pandas as pd

from lorafusion.measure.statistics import fewest, interval, median
from lorafusion.measure.vocabulary import WINDOWS
from lorafusion.report import style
from lorafusion.report.throughput import SYSTEM, ablations, group_names, merged_qkv, require_one_cell_a_place

SEQUENTIAL, TURNS, OURS_UNFUSED = "megatron-pp", "mlora-paper-setting", "unfused-ours"
REQUIRED = (SYSTEM, SEQUENTIAL, TURNS, OURS_UNFUSED)
ALL = "all"  # in place of a workload
BEST = f"best_over_{SEQUENTIAL}"
CAPACITY = "capacity"  # begins the remark that two systems' microbatches may hold different numbers of tokens
A_BASELINE = "best baseline"  # in place of a system, where workloads have different ones
# Numerator and denominator. schedule x packing x kernels = product = speedup x best_over_megatron-pp.
PARTS = {
    "schedule": (TURNS, SEQUENTIAL),
    "packing": (OURS_UNFUSED, TURNS),
    "kernels": (SYSTEM, OURS_UNFUSED),
    "product": (SYSTEM, SEQUENTIAL),
    "padding": ("mlora-packed", "mlora"),
}
# {unfused, fused} LoRA under {sequential, mLoRA's, our} order, each over the first.
CORNERS = {
    "unfused-sequential": SEQUENTIAL,
    "fused-sequential": "fused-sequential",
    "unfused-mlora": "mlora-packed",
    "fused-mlora": "fused-mlora",
    "unfused-ours": OURS_UNFUSED,
    "fused-ours": SYSTEM,
}
FACTORS = ("speedup", BEST, *PARTS, *CORNERS)
OF_MERGED = ("kernels", *CORNERS)  # with q, k and v merged there are the corners and no other baselines
QKV = ("separate", "merged")
PLACE = ["model", "gpus", "window", "qkv", "group"]
COLUMNS = ["model", "gpus", "window", "qkv", "workload", "factor", "over", "value", "low", "high", "bounds", "n",
           "note"]  # fmt: skip


class Arm(NamedTuple):
    """The throughputs of a system in one place, in tokens/s by repeat, or why there are none."""

    values: dict[int, float]
    reason: str
    capacity: int | None = None


class Ratios(NamedTuple):
    """Throughputs over those of `over`, one for each repeat that both have, or in `note` why there are none."""

    over: str
    values: list[float]
    note: str


def contributions(table: pd.DataFrame) -> pd.DataFrame:
    """The factors of every model, number of GPUs, window and workload, and over all workloads: a row each (`COLUMNS`).

    `low` and `high` of a workload are the smallest and the largest ratio (`bounds` is range). Over all workloads they
    are, from six ratios on, a 95 % interval of the median of a run of these workloads (interval), which need not lie
    around the geometric mean. A factor without a number says why in `note`. A cell of which any repeat failed has no
    number, as in the table's own medians. Raises `MeasurementError` where two cells claim one place.
    """
    rows = measured(table).sort_values("group", key=style.rank)
    own_ablations = ablations()
    found = {}
    for place, cells in rows.groupby(PLACE, sort=False):
        arms = {system: _arm(system, runs) for system, runs in cells.groupby("system")}
        found[place] = dict(_factors(arms, place[PLACE.index("qkv")], own_ablations))
    out = [_row(place, factor, ratios) for place, factors in found.items() for factor, ratios in factors.items()]
    return pd.DataFrame([*out, *_over_all(found)], columns=COLUMNS).sort_values(
        COLUMNS[:6], key=_rank, ignore_index=True
    )


def measured(table: pd.DataFrame) -> pd.DataFrame:
    """The measured throughputs of single runs, with their place: `qkv`, and `group` with the batch size if need be."""
    rows = table[(table["metric"] == "throughput") & (table["statistic"] == "single") & (table["kind"] == "measured")]
    rows = rows.assign(qkv=merged_qkv(rows).map({False: "separate", True: "merged"}))
    names = [group_names(of_model) for _, of_model in rows.groupby("model")]
    rows = rows.assign(group=pd.concat(names) if names else None)
    require_one_cell_a_place(rows, [*PLACE, "system", "repeat"])
    return rows


def _arm(system: str, runs: pd.DataFrame) -> Arm:
    failed = runs[runs["status"] != "ok"]
    if not failed.empty:
        if failed["status"].eq("skipped").all():
            return Arm({}, f"{system}: skipped")
        worst = style.status_label(failed["status"].iloc[0])
        return Arm({}, f"{system}: {worst} ({len(failed)} of {len(runs)} repeats)")
    capacities = runs["capacity"].dropna().unique()
    capacity = int(capacities[0]) if len(capacities) == 1 else None
    return Arm(dict(zip(runs["repeat"].astype(int), runs["value"].astype(float), strict=True)), "", capacity)


def _factors(arms: dict[str, Arm], qkv: str, own_ablations: set[str]) -> Iterator[tuple[str, Ratios]]:
    """Every factor of one place."""
    if qkv == "separate":
        baselines = {name: arm for name, arm in arms.items() if name != SYSTEM and name not in own_ablations}
        finished = {name: median(list(arm.values.values())) for name, arm in baselines.items() if arm.values}
        if finished:
            best = max(sorted(finished), key=finished.__getitem__)
            without = "; ".join(f"without {arm.reason}" for arm in baselines.values() if arm.reason)
            yield "speedup", _ratios(arms, SYSTEM, best, without)
            yield BEST, _ratios(arms, best, SEQUENTIAL, f"best baseline: {best}")
        else:
            for factor, over in (("speedup", A_BASELINE), (BEST, SEQUENTIAL)):
                yield factor, Ratios(over, [], "no baseline finished")
        for factor, (above, below) in PARTS.items():
            yield factor, _ratios(arms, above, below)
    else:
        yield "kernels", _ratios(arms, *PARTS["kernels"])
    for corner, system in CORNERS.items():
        yield corner, _ratios(arms, system, SEQUENTIAL)


def _ratios(arms: dict[str, Arm], above: str, below: str, note: str = "") -> Ratios:
    pair = [arms.get(name, Arm({}, f"{name}: no such cell")) for name in (above, below)]
    reasons = [arm.reason for arm in pair if arm.reason]
    if reasons:
        return Ratios(below, [], "; ".join(dict.fromkeys(reasons)))
    first, second = pair
    repeats = sorted(set(first.values) & set(second.values))
    if not repeats:
        return Ratios(below, [], f"{above} and {below}: no repeat in common")
    notes = [note] if note else []
    if above == below:
        notes.append("1 by definition")
    if set(first.values) != set(second.values):
        notes.append(f"only repeats {', '.join(map(str, repeats))} are in both")
    if first.capacity != second.capacity:
        notes.append(f"{CAPACITY} {first.capacity} over {second.capacity}")
    return Ratios(below, [first.values[repeat] / second.values[repeat] for repeat in repeats], "; ".join(notes))


def _row(place: tuple, factor: str, ratios: Ratios) -> dict:
    """A factor of one workload."""
    values = ratios.values
    row = _named(place, place[-1], factor, ratios.over, ratios.note, len(values))
    if values:
        row["value"] = _geometric_mean(values)
    if len(values) > 1:
        row |= {"low": min(values), "high": max(values), "bounds": "range"}
    return row


def _over_all(found: dict[tuple, dict[str, Ratios]]) -> Iterator[dict]:
    """The factors over all workloads, where there are several.

    Where one workload has no number there is none over all: a mean over what is left would flatter.
    """
    settings = dict.fromkeys(place[:-1] for place in found)
    for setting in settings:
        groups = {place[-1]: factors for place, factors in found.items() if place[:-1] == setting}
        for factor in next(iter(groups.values())) if len(groups) > 1 else ():
            yield _mean_row((*setting, ALL), factor, {name: factors[factor] for name, factors in groups.items()})


def _mean_row(place: tuple, factor: str, parts: dict[str, Ratios]) -> dict:
    overs = list(dict.fromkeys(ratios.over for ratios in parts.values()))
    over = overs[0] if len(overs) == 1 else A_BASELINE
    reasons = {name: ratios.note for name, ratios in parts.items() if not ratios.values}
    if reasons:
        same = len(reasons) == len(parts) and len(set(reasons.values())) == 1
        texts = reasons.values() if same else (f"{name}: {reason}" for name, reason in reasons.items())
        return _named(place, ALL, factor, over, "; ".join(dict.fromkeys(texts)), 0)
    values = [value for ratios in parts.values() for value in ratios.values]
    # Each workload counts once, however many repeats it has.
    row = _named(place, ALL, factor, over, "", len(values))
    row["value"] = _geometric_mean(_geometric_mean(ratios.values) for ratios in parts.values())
    if bounds := interval(values):
        row |= {"low": bounds[0], "high": bounds[1], "bounds": "interval"}
        notes = [f"95 % interval of the median, {median(values):.4f}"]
    else:
        row |= {"low": min(values), "high": max(values), "bounds": "range"}
        notes = [f"no 95 % interval from {len(values)} ratios, it takes {fewest()}"]
    if len(overs) > 1:
        notes += [f"{name}: over {ratios.over}" for name, ratios in parts.items()]
    remarks = {name: ratios.note for name, ratios in parts.items() if ratios.note}
    if len(remarks) == len(parts) and len(set(remarks.values())) == 1:
        notes += set(remarks.values())
    else:
        notes += [f"{name}: {remark}" for name, remark in remarks.items()]
    return row | {"note": "; ".join(notes)}


def _named(place: tuple, workload: str, factor: str, over: str, note: str, count: int) -> dict:
    row = dict(zip(PLACE[:-1], place, strict=False))
    row |= {"workload": workload, "factor": factor, "over": over, "n": count, "note": note or None}
    return row | {"value": math.nan, "low": math.nan, "high": math.nan, "bounds": None}


def _geometric_mean(values: Iterable[float]) -> float:
    """The geometric mean of at least one positive number."""
    logarithms = [math.log(value) for value in values]
    return math.exp(math.fsum(logarithms) / len(logarithms))


def _rank(column: pd.Series) -> pd.Series:
    customary = {"window": WINDOWS, "qkv": QKV, "factor": FACTORS}.get(column.name)
    if customary:
        return column.map(customary.index)
    if column.name == "workload":
        places = style.rank(column)
        return pd.Series(
            [(name == ALL, *place) for name, place in zip(column, places, strict=True)], index=column.index
        )
    return column
