"""The figure of contributions: how schedule, packing and kernels lead from unfused-sequential to lorafusion, and every
combination of LoRA operation and order."""

import math
import textwrap
from collections.abc import Iterator
from typing import Any, NamedTuple

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, NullLocator

from lorafusion.lab.report import drawing, style
from lorafusion.lab.report.ratios import (
    A_BASELINE,
    ALL,
    BASE,
    BY_ONE,
    CAPACITY,
    COLUMNS,
    CORNERS,
    EXECUTOR,
    OURS_UNFUSED,
    contributions,
    lacking,
    measured,
)
from lorafusion.lab.report.throughput import SYSTEM, WINDOW_TITLES, device_count
from lorafusion.lab.table.table import MeasurementError

DATA = [*COLUMNS, "device", "origin"]
LOOKS = {
    "schedule": style.Look("#56B4E9", ""),
    "packing": style.Look("#F0E442", "////"),
    "kernels": style.Look("#D55E00", "...."),
    "speedup": style.SYSTEMS[SYSTEM],
}
# The parts from top to bottom, each with the places (`_places`) at which it begins and ends.
LANES = {
    "schedule": (BASE, "schedule"),
    "packing": ("schedule", OURS_UNFUSED),
    "kernels": (OURS_UNFUSED, SYSTEM),
    "speedup": (A_BASELINE, SYSTEM),
}
ORDERS = {"sequential": "sequential", "mlora": "mLoRA's\norder", "ours": "our\norder"}
OPERATIONS = {"unfused": "#BBBBBB", "fused": style.SYSTEMS[SYSTEM].colour}
MERGED_HATCH = "////"
NO_START = f"(no {BASE})"  # beside a number that has nothing to begin at
RANGE = "‡"  # at a corner whose whisker is a range, where others are intervals
# The mark at a part's number, and what it says, where the part's note has the remark.
MARKS = {
    CAPACITY: ("*", "also at another capacity, each tuned for its system"),
    EXECUTOR: ("†", f"order over {BY_ONE[1]}, another executor, as {BY_ONE[0]} has no cell"),
}
LANE, GAP = 0.098, 0.85  # inches; between the lanes of two workloads, in lanes
LEFT, RIGHT = 3.1, 1.75  # inches of the two panels, about, for what must fit beside a bar
LETTER = 0.6 * style.SMALL / 72  # inches of a letter in small print, about
LONGEST = 34  # letters that fit into the right panel
TICKS = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0, 2.5, 3.0, 4.0, 5.0, 7.0, 10.0, 20.0, 50.0)


def contributions_data(table: pd.DataFrame, model: str) -> pd.DataFrame:
    """The rows of `contributions` for a model, where its cells have the systems that it takes, and their origin. Raises
    `MeasurementError` where there are none."""
    of_model = table[table["model"] == model]
    runs = measured(of_model)
    separate = runs[runs["qkv"] == "separate"]
    present = {gpus: set(systems) for gpus, systems in separate.groupby("gpus")["system"]}
    complete = [gpus for gpus, systems in present.items() if not lacking(systems)]
    if not complete:
        missing = ", ".join(lacking(set().union(*present.values()))) or "one number of GPUs with all"
        needed = ", ".join(lacking(()))
        raise MeasurementError(f"contributions of model {model!r}: takes {needed}; no cells of {missing}")
    rows = contributions(of_model)
    device = style.devices(runs[runs["status"] == "ok"])
    # One text, since a commit of digits only, in a column of its own, would be read back as a number.
    shown = rows[rows["gpus"].isin(complete)].assign(device=device, origin=style.origin(runs, device))
    return shown.reset_index(drop=True)[DATA]


class Panel(NamedTuple):
    """The rows of one number of GPUs and window: the parts, with q, k and v separate, and the corners."""

    gpus: int
    window: str
    parts: pd.DataFrame
    corners: pd.DataFrame  # of all workloads together, or of the only one; with `mark`
    workloads: list[str]  # from top to bottom, all of them together last
    height: float  # inches, so that neither the lanes nor the corners' bars are lower than their numbers


def _panels(data: pd.DataFrame) -> Iterator[Panel]:
    for (gpus, window), rows in data.groupby(["gpus", "window"], sort=False):
        parts = rows[rows["qkv"] == "separate"]
        workloads = list(dict.fromkeys(parts["workload"]))
        corners = rows[rows["factor"].isin(CORNERS) & (rows["workload"] == workloads[-1])]
        # A range where others have an interval: a cell lacks a repeat.
        ranges = corners["bounds"].eq("range") & corners["bounds"].eq("interval").any()
        corners = corners.assign(mark=ranges.map({True: RANGE, False: ""}))
        lanes = len(workloads) * (len(LANES) + GAP), len(ORDERS) * (len(OPERATIONS) * rows["qkv"].nunique() + GAP)
        yield Panel(gpus, window, parts, corners, workloads, LANE * max(lanes))


@drawing.styled
def draw_contributions(data: pd.DataFrame) -> Figure:
    """The figure of `contributions_data`: for each number of GPUs and window the parts, and beside them the corners."""
    panels = list(_panels(data))
    heights = [panel.height for panel in panels]
    on_cpu = "CPU" in data["device"][0]
    figure = Figure(figsize=(style.TEXT_WIDTH, 1.35 + sum(heights) + 0.2 * len(heights)), layout="constrained")
    grid = {"width_ratios": (LEFT, RIGHT), "height_ratios": heights}
    axes = figure.subplots(len(panels), 2, sharex="col", squeeze=False, gridspec_kw=grid)
    title, reaches = None, [(1.0, 1.0, 4)]
    for (parts, corners), panel in zip(axes, panels, strict=True):
        reaches += _draw_parts(parts, panel)
        _draw_corners(corners, panel.corners)
        average = "geometric mean of the workloads" if panel.workloads[-1] == ALL else panel.workloads[-1]
        if average != title:
            corners.set_title(f"over {BASE},\n{average}")
            title = average
        several = f", {device_count(panel.gpus, on_cpu)}" if data["gpus"].nunique() > 1 else ""
        drawing.write_beside(corners, WINDOW_TITLES[panel.window] + several, 1.02)
    axes[0][0].set(xscale="log", title=f"from {BASE} (1) to {SYSTEM}")
    for ax, limits in zip(axes[-1], (_limits(reaches), _corner_limits(data)), strict=True):
        ax.set_xlim(limits)
        ax.xaxis.set_major_locator(FixedLocator(_ticks(*limits, logarithmic=ax is axes[-1][0])))
        ax.xaxis.set_minor_locator(NullLocator())
        ax.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    # Where only some workloads have cells with merged q, k and v, there is no bar of them.
    merged = any("merged" in set(panel.corners["qkv"]) for panel in panels)
    title = f"{data['model'][0]}: what the parts of {SYSTEM} add"
    drawing.finish(figure, _handles(merged), title, _footer(data, panels, merged), 4, on_cpu)
    return figure


def _draw_parts(ax: Axes, panel: Panel) -> list[tuple[float, float, int]]:
    """For each workload the parts below each other, each from where the one above ends; returns how far each reaches,
    as `_draw_lanes` does."""
    step = len(LANES) + GAP
    names, reaches = [], []
    for index, workload in enumerate(panel.workloads):
        factors = panel.parts[panel.parts["workload"] == workload].set_index("factor")
        reaches += _draw_lanes(ax, index * step, factors)
        names.append("\n".join([workload, *textwrap.wrap(f"vs. {factors.loc['speedup', 'over']}", 16)]))
        if index:
            ax.axhline(index * step - (1 + GAP) / 2, color="0.8", linewidth=0.5)
    _finish_panel(ax, names, len(LANES), step, linespacing=1.1)
    if panel.workloads[-1] == ALL:
        ax.get_yticklabels()[-1].set_fontweight("bold")
    return reaches


def _draw_lanes(ax: Axes, top: float, factors: pd.DataFrame) -> list[tuple[float, float, int]]:
    """The parts of one workload; returns for each its left end, its right end, and how many letters follow."""
    reaches = []
    places, following = _places(factors["value"]), [*list(LANES)[1:3], None, None]
    for lane, ((factor, (begin, end)), after) in enumerate(zip(LANES.items(), following, strict=True)):
        row, start, look, y = factors.loc[factor], places[begin], LOOKS[factor], top + lane
        missing = pd.isna(row["value"])
        text = _short(row["note"]) if missing else _text(factor, row)
        if missing or pd.isna(start):
            text += "" if missing else f" {NO_START}"
            colour = style.FAILED if missing else look.colour if factor == "speedup" else "black"
            _write(ax, 1, y, text, color=colour)
            reaches.append((1.0, 1.0, len(text)))
            continue
        _draw_bar(ax, y, start, row, look, text, bold=factor == "speedup")
        if after and not pd.isna(factors.loc[after, "value"]):
            ax.plot([places[end]] * 2, [y, y + 1], color="0.3", linewidth=0.5, zorder=1)
        ends = [start * reach for reach in (1, *row[["value", "low", "high"]].dropna())]
        reaches.append((min(ends), max(ends), len(text) + 2))
    return reaches


def _finish_panel(ax: Axes, names: list[str], lanes: int, step: float, **text: Any) -> None:
    """The line at 1, and a name for each group of some lanes, the groups being `step` apart."""
    ax.axvline(1, color="0.3", linewidth=0.6, zorder=1)
    centres = [index * step + (lanes - 1) / 2 for index in range(len(names))]
    ax.set_yticks(centres, names, fontsize=style.SMALL, **text)
    ax.set_ylim(centres[-1] + step / 2, centres[0] - step / 2)
    ax.tick_params(axis="y", length=0)
    ax.grid(visible=True, axis="x")
    ax.grid(visible=False, axis="y")


def _places(values: pd.Series) -> dict[str, float]:
    """Where on the axis the parts of a workload begin and end, from its factors; NaN where that is not known."""
    return {
        BASE: 1.0,
        "schedule": values["schedule"],
        OURS_UNFUSED: values["schedule_and_packing"],
        SYSTEM: values["product"],
        A_BASELINE: 1 / values["baseline"],
    }


def _draw_bar(
    ax: Axes, y: float, start: float, row: pd.Series, look: style.Look, text: str, bold: bool = False
) -> None:
    """A factor from `start` on, its whisker, and its number to the right of both."""
    end = start * row["value"]
    ax.barh(y, end - start, drawing.FILL, left=start, zorder=2, **drawing.fill(look))
    right = max(start, end)
    if not pd.isna(row["low"]):
        right = max(right, _draw_whisker(ax, y, start * row["low"], start * row["high"], markeredgewidth=0.6))
    _write(ax, right, y, text, **({"fontweight": "bold", "color": look.colour} if bold else {}))


def _draw_whisker(ax: Axes, y: float, low: float, high: float, **look: Any) -> float:
    """A whisker of a bar; returns its right end."""
    ax.plot([low, high], [y, y], color="black", linewidth=0.7, marker="|", markersize=2.6, zorder=3, **look)
    return max(low, high)


def _draw_corners(ax: Axes, panel: pd.DataFrame) -> None:
    """The orders below each other, each with its operations, separate and merged, as bars from zero."""
    corners = panel.set_index(["qkv", "factor"])
    series = [(qkv, operation) for qkv in dict.fromkeys(panel["qkv"]) for operation in OPERATIONS]
    step = len(series) + GAP
    for index, order in enumerate(ORDERS):
        for lane, (qkv, operation) in enumerate(series):
            row, y = corners.loc[(qkv, f"{operation}-{order}")], index * step + lane
            if pd.isna(row["value"]):
                reason = textwrap.shorten(_short(row["note"]), LONGEST, placeholder=" …")
                _write(ax, 0, y, reason, color=style.FAILED)
                continue
            look = style.Look(OPERATIONS[operation], MERGED_HATCH if qkv == "merged" else "")
            ax.barh(y, row["value"], drawing.FILL, zorder=2, **drawing.fill(look))
            right = row["value"]
            if row["n"] > 1 and row["low"] < row["high"]:
                right = max(right, _draw_whisker(ax, y, row["low"], row["high"]))
            _write(ax, right, y, f"{row['value']:.2f}{row['mark']}")
    _finish_panel(ax, list(ORDERS.values()), len(series), step)


def _write(ax: Axes, x: float, y: float, text: str, **look: Any) -> None:
    """Text beside a bar, also across the line at 1."""
    look = {"fontsize": style.SMALL, "va": "center_baseline", "zorder": 4} | look
    background = {"facecolor": "white", "edgecolor": "none", "pad": 0}
    ax.annotate(text, (x, y), (2.5, 0), textcoords="offset points", bbox=background, **look)


def _text(factor: str, row: pd.Series) -> str:
    """A factor's number; that of the speedup over all workloads with its interval."""
    if factor != "speedup":
        return f"×{row['value']:.2f}{''.join(mark for mark, _ in _marks(row))}"
    if row["bounds"] != "interval":
        return f"{row['value']:.2f}×"
    return f"{row['value']:.3f}× [{row['low']:.3f}, {row['high']:.3f}]"


def _marks(row: pd.Series) -> list[tuple[str, str]]:
    """In what else the systems of a part differ: marks, and what they say."""
    note = "" if pd.isna(row["note"]) else row["note"]
    return [mark for remark, mark in MARKS.items() if remark in note]


def _short(note: str) -> str:
    """The first reason of a note, without how many repeats."""
    return note.partition(";")[0].partition(" (")[0]


def _limits(reaches: list[tuple[float, float, int]]) -> tuple[float, float]:
    """The ends of the logarithmic axis of the parts, with room for the numbers beside the bars."""
    low = min(low for low, _, _ in reaches) / 1.02
    spans = [math.log(end / low) / max(0.2, 1 - letters * LETTER / LEFT) for _, end, letters in reaches]
    return low, low * math.exp(max(spans))


def _corner_limits(data: pd.DataFrame) -> tuple[float, float]:
    """The ends of the axis of the corners: from zero, with room for the numbers beside the bars."""
    top = data.loc[data["factor"].isin(CORNERS), ["value", "high"]].max().max()
    return 0.0, (1.0 if pd.isna(top) else top) / (1 - 6 * LETTER / RIGHT)


def _ticks(low: float, high: float, logarithmic: bool) -> list[float]:
    """Round numbers that are not too close to each other on the axis."""
    if not logarithmic:
        step = next(step for step in (0.25, 0.5, 1, 2, 5, 10, 50) if high / step <= 6 or step == 50)
        return [index * step for index in range(int(high / step) + 1)]
    if high / low < 1.8:
        return [tenth / 10 for tenth in range(math.ceil(10 * low), int(10 * high) + 1)]
    out: list[float] = []
    for tick in TICKS:
        if low <= tick <= high and (not out or math.log(tick / out[-1]) > math.log(high / low) / 9):
            out.append(tick)
    return out


def _handles(merged: bool) -> list[Patch]:
    looks = {factor: look for factor, look in LOOKS.items() if factor != "speedup"}
    looks[f"{SYSTEM} over the best baseline"] = LOOKS["speedup"]
    looks |= {f"{operation} LoRA": style.Look(colour, "") for operation, colour in OPERATIONS.items()}
    if merged:
        looks["with merged q, k, v"] = style.Look("0.45", MERGED_HATCH)
    return drawing.patches(looks)


def _footer(data: pd.DataFrame, panels: list[Panel], merged: bool) -> str:
    bars = "bars: geometric mean of the repeats' ratios; whiskers: their range"
    if (data["bounds"] == "interval").any():
        bars += f"; of {ALL}, in [ ]: 95 % interval of the geometric mean"
    parts = data[data["factor"].isin(LANES) & (data["factor"] != "speedup") & data["value"].notna()]
    parts = parts[parts["qkv"] == "separate"]
    marks = dict(mark for _, row in parts.iterrows() for mark in _marks(row))
    bars += "".join(f"\n{mark}: {meaning}" for mark, meaning in sorted(marks.items()))
    bars += f"\nleft: logarithmic; the bar of {SYSTEM} begins at the best baseline"
    if merged:
        bars += f"; right: with merged q, k, v, over {BASE} with them"
    if any(RANGE in set(panel.corners["mark"]) for panel in panels):
        bars += f"\n{RANGE}: range of all ratios, as a repeat is missing"
    return f"{data['origin'][0]}\n{bars}"
