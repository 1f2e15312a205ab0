"""The speedup of lorafusion over the best baseline, and what each of its parts adds: ratios of throughputs.

Ratios are paired by repeat, as the runs of a repeat are made in one pass over the suite: a drift of the machine between
passes is in both. A value is the geometric mean of its ratios, since only then is the product of the parts the whole,
for a workload and over all of them.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from statistics import geometric_mean
from typing import NamedTuple

import pandas as pd

from lorafusion.lab.report import style
from lorafusion.lab.report.throughput import SYSTEM, ablations, group_names, merged_qkv, require_one_cell_a_place
from lorafusion.lab.table.statistics import FEWEST_OF_MEAN, geometric_mean_interval, median
from lorafusion.lab.table.vocabulary import WINDOWS

BASE, OURS_UNFUSED = "unfused-sequential", "unfused-ours"
TURNS = "mlora-paper-setting"
# What TURNS is over; the second, another executor, only where the first has no cell.
BY_ONE = ("peft-bf16", "megatron-pp")
ALL = "all"  # in place of a workload
A_BASELINE = "best baseline"  # in place of a system, where workloads have different ones
# Each begins a remark: that the microbatches of a ratio's systems may hold different numbers of tokens; that the second
# of BY_ONE stands in for the first.
CAPACITY, EXECUTOR = "capacity", "another executor"
# {unfused, fused} LoRA under {sequential, mLoRA's, our} order, each over the first, BASE.
CORNERS = {
    "unfused-sequential": BASE,
    "fused-sequential": "fused-sequential",
    "unfused-mlora": "mlora-packed",
    "fused-mlora": "fused-mlora",
    "unfused-ours": OURS_UNFUSED,
    "fused-ours": SYSTEM,
}
# schedule x packing = schedule_and_packing, x kernels = product, x baseline = speedup.
FACTORS = (
    "speedup",  # lorafusion over the best baseline
    "baseline",  # BASE over the best baseline
    "schedule",  # TURNS over BY_ONE: the order alone
    "packing",  # schedule_and_packing over schedule
    "schedule_and_packing",  # OURS_UNFUSED over BASE
    "kernels",  # lorafusion over OURS_UNFUSED
    "product",  # lorafusion over BASE
    "padding",  # mlora-packed over mlora
    *CORNERS,
)
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
    """Throughputs over those of `over`, by repeat, of which all have each, or in `note` why there are none."""

    over: str
    values: dict[int, float]
    note: str


def lacking(systems: Iterable[str]) -> list[str]:
    """The systems that the parts cannot do without and that are not among `systems`."""
    present = set(systems)
    missing = [name for name in (SYSTEM, BASE, OURS_UNFUSED, TURNS) if name not in present]
    return missing if present & set(BY_ONE) else [*missing, " or ".join(BY_ONE)]


def contributions(table: pd.DataFrame) -> pd.DataFrame:
    """The factors of every model, number of GPUs, window and workload, and over all workloads: a row each (`COLUMNS`).

    `low` and `high` of a workload are the smallest and the largest ratio (`bounds` is range). Over all workloads they
    are, from three repeats on, a 95 % interval of the geometric mean over these workloads (interval), by Student's t of
    the repeats' own means. A factor without a number says why in `note`. A cell of which any repeat failed has no
    number, as in the table's own medians. Raises `MeasurementError` where two cells claim one place.
    """
    rows = measured(table).sort_values("group", key=style.rank)
    known_ablations = ablations()
    factors_of = {}
    for place, cells in rows.groupby(PLACE, sort=False):
        arms = {system: _arm(system, runs) for system, runs in cells.groupby("system")}
        factors_of[place] = dict(_factors(arms, place[PLACE.index("qkv")], known_ablations))
    of_workloads = [_row(place, factor, ratios) for place, of in factors_of.items() for factor, ratios in of.items()]
    data = pd.DataFrame([*of_workloads, *_over_all(factors_of)], columns=COLUMNS)
    return data.sort_values(COLUMNS[:6], key=_rank, ignore_index=True)


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


def _factors(arms: dict[str, Arm], qkv: str, known_ablations: set[str]) -> Iterator[tuple[str, Ratios]]:
    """Every factor of a place. With q, k and v merged there are the corners and no baselines."""
    if qkv == "separate":
        baselines = {name: arm for name, arm in arms.items() if name != SYSTEM and name not in known_ablations}
        finished = {name: median(list(arm.values.values())) for name, arm in baselines.items() if arm.values}
        best = max(sorted(finished), key=finished.__getitem__, default="")
        without = [f"without {arm.reason}" for arm in baselines.values() if arm.reason]
        for factor, system in (("speedup", SYSTEM), ("baseline", BASE)):
            none = Ratios(A_BASELINE, {}, "no baseline finished")
            yield factor, _ratios(arms, system, best, without) if best else none
        yield from _parts(arms)
    yield "kernels", _ratios(arms, SYSTEM, OURS_UNFUSED)
    for corner, system in CORNERS.items():
        yield corner, _ratios(arms, system, BASE)


def _parts(arms: dict[str, Arm]) -> Iterator[tuple[str, Ratios]]:
    """Of the order, the packing, and both, and of the padding."""
    alone = next((name for name in BY_ONE if name in arms), BY_ONE[0])
    remarks = [] if alone == BY_ONE[0] else [f"{EXECUTOR}: {alone}, as {BY_ONE[0]} has no cell"]
    yield "schedule", _ratios(arms, TURNS, alone, remarks)
    remarks = ["derived: schedule_and_packing over schedule", *remarks]
    packing = _ratios(arms, OURS_UNFUSED, BASE, remarks, divided_by=(TURNS, alone))
    yield "packing", packing._replace(over="schedule")
    yield "schedule_and_packing", _ratios(arms, OURS_UNFUSED, BASE)
    yield "product", _ratios(arms, SYSTEM, BASE)
    yield "padding", _ratios(arms, "mlora-packed", "mlora")


def _ratios(
    arms: dict[str, Arm],
    above: str,
    below: str,
    remarks: Sequence[str] = (),
    divided_by: tuple[str, str] | tuple[()] = (),
) -> Ratios:
    """The ratios of two systems, divided by those of two others if there are such."""
    names = (above, below, *divided_by)
    taken = [arms.get(name, Arm({}, f"{name}: no such cell")) for name in names]
    reasons = [arm.reason for arm in taken if arm.reason]
    if reasons:
        return Ratios(below, {}, "; ".join(dict.fromkeys(reasons)))
    repeats = sorted(set.intersection(*(set(arm.values) for arm in taken)))
    if not repeats:
        return Ratios(below, {}, f"{' and '.join(names)}: no repeat in common")
    notes = list(remarks)
    if above == below:
        notes.append("1 by definition")
    if any(set(arm.values) != set(repeats) for arm in taken):
        notes.append(f"only repeats {', '.join(map(str, repeats))} are in {'all' if divided_by else 'both'}")
    pairs = list(zip(taken[::2], taken[1::2], strict=True))
    if len({arm.capacity for arm in taken}) > 1:
        capacities = (f"{upper.capacity} over {lower.capacity}" for upper, lower in pairs)
        notes.append(f"{CAPACITY} {', divided by '.join(capacities)}")
    values = {}
    for repeat in repeats:
        ratio, *divisor = [upper.values[repeat] / lower.values[repeat] for upper, lower in pairs]
        values[repeat] = ratio / math.prod(divisor)
    return Ratios(below, values, "; ".join(notes))


def _row(place: tuple, factor: str, ratios: Ratios) -> dict:
    """A factor of one workload."""
    values = list(ratios.values.values())
    row = _named(place, factor, ratios.over, ratios.note, len(values))
    if values:
        row["value"] = geometric_mean(values)
    if len(values) > 1:
        row |= {"low": min(values), "high": max(values), "bounds": "range"}
    return row


def _over_all(factors_of: dict[tuple, dict[str, Ratios]]) -> Iterator[dict]:
    """The factors over all workloads, where there are several.

    Where one workload has no number there is none over all: a mean over what is left would flatter.
    """
    settings = dict.fromkeys(place[:-1] for place in factors_of)
    for setting in settings:
        groups = {place[-1]: factors for place, factors in factors_of.items() if place[:-1] == setting}
        for factor in next(iter(groups.values())) if len(groups) > 1 else ():
            yield _mean_row((*setting, ALL), factor, {name: factors[factor] for name, factors in groups.items()})


def _mean_row(place: tuple, factor: str, parts: dict[str, Ratios]) -> dict:
    overs = list(dict.fromkeys(ratios.over for ratios in parts.values()))
    over = A_BASELINE if factor in ("speedup", "baseline") and len(overs) > 1 else " or ".join(overs)
    reasons = {name: ratios.note for name, ratios in parts.items() if not ratios.values}
    if reasons:
        same = len(reasons) == len(parts) and len(set(reasons.values())) == 1
        texts = reasons.values() if same else (f"{name}: {reason}" for name, reason in reasons.items())
        return _named(place, factor, over, "; ".join(dict.fromkeys(texts)), 0)
    row = _named(place, factor, over, "", sum(len(ratios.values) for ratios in parts.values()))
    # Each workload counts once, however many repeats it has.
    row["value"] = geometric_mean(geometric_mean(ratios.values.values()) for ratios in parts.values())
    bounds, remark = _bounds([ratios.values for ratios in parts.values()])
    row, notes = row | bounds, [remark]
    if len(overs) > 1:
        notes += [f"{name}: over {ratios.over}" for name, ratios in parts.items()]
    remarks = {name: [remark for remark in ratios.note.split("; ") if remark] for name, ratios in parts.items()}
    first, *others = remarks.values()
    notes += (of_all := [remark for remark in first if all(remark in of_other for of_other in others)])
    notes += [f"{name}: {remark}" for name, others in remarks.items() for remark in others if remark not in of_all]
    return row | {"note": "; ".join(notes)}


def _bounds(ratios: list[dict[int, float]]) -> tuple[dict, str]:
    """Between which values the mean over workloads is, whose ratios are given by repeat, and a remark on that."""
    every = [ratio for by_repeat in ratios for ratio in by_repeat.values()]
    whole = {"low": min(every), "high": max(every), "bounds": "range"}
    if len({tuple(by_repeat) for by_repeat in ratios}) > 1:
        return whole, "no 95 % interval, as the workloads have different repeats"
    means = [geometric_mean(by_repeat[repeat] for by_repeat in ratios) for repeat in ratios[0]]
    if interval := geometric_mean_interval(means):
        bounds = dict(zip(("low", "high"), interval, strict=True)) | {"bounds": "interval"}
        return bounds, f"95 % interval from {len(means)} repeats"
    return whole, f"no 95 % interval from {len(means)} repeats, it takes {FEWEST_OF_MEAN}"


def _named(place: tuple, factor: str, over: str, note: str, count: int) -> dict:
    """A row without a number yet. place: the first of `COLUMNS`."""
    numbers = dict.fromkeys(("value", "low", "high"), math.nan)
    row = dict(zip(COLUMNS, (*place, factor, over), strict=False))
    return row | numbers | {"bounds": None, "n": count, "note": note or None}


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
