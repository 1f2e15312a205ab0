"""Figures of the scheduler suite, each as PDF, PNG and the CSV of exactly what it shows, from which it is drawn."""

from __future__ import annotations

import matplotlib
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from lorafusion.lab.report import style
from lorafusion.lab.table.table import MeasurementError

STAGES, ADAPTERS = 4, 4  # of the bars; the issue of the paper: four adapters on a pipeline of four
STRATEGIES = {
    "sequential": style.Look("#BBBBBB", ""),
    "mlora": style.SYSTEMS["mlora"],
    "ffd": style.Look("#56B4E9", "xxxx"),
    "paper": style.Look("#009E73", "\\\\\\\\"),
    "fewest": style.Look("#CC79A7", "...."),
    "fast": style.SYSTEMS["lorafusion"],
}
MARKERS = dict(zip(STRATEGIES, "vDsP^o", strict=True))
IDENTITY = ["suite", "workload", "stages", "global_batch", "adapters", "samples", "system", "metric", "window"]
DATA = [*IDENTITY, "value", "git_sha", "git_dirty", "model", "capacity"]


def bubble_data(table: pd.DataFrame) -> pd.DataFrame:
    """Simulated idle share of the stages in the steady state, by workload and global batch."""
    return bars(table, "bubble", "steady")


def fill_data(table: pd.DataFrame) -> pd.DataFrame:
    """Microbatches over their lower bound, by workload and global batch."""
    return bars(table, "microbatch_ratio", "whole")


def time_data(table: pd.DataFrame) -> pd.DataFrame:
    """Time that a plan takes, by the samples of all adapters."""
    return medians(table, "solve_time", "whole")


def medians(table: pd.DataFrame, metric: str, window: str) -> pd.DataFrame:
    """The medians of a metric in drawing order. Raises `MeasurementError` where two suites would share the bars."""
    rows = table[(table["statistic"] == "median") & (table["metric"] == metric) & (table["window"] == window)]
    rows = rows[rows["system"].isin(STRATEGIES)]
    if rows.empty:
        raise MeasurementError(f"the table has no median of {metric} of a strategy; see lorafusion scheduler --help")
    if len(suites := sorted(rows["suite"].unique())) > 1:
        raise MeasurementError(f"one bar for several suites: {', '.join(suites)}; draw them from separate tables")
    place = rows["system"].map(list(STRATEGIES).index)
    order = rows.assign(place=place, first=style.rank(rows["workload"]))
    order = order.sort_values(["first", "stages", "global_batch", "adapters", "samples", "place"])
    return order[DATA].reset_index(drop=True)


def bars(table: pd.DataFrame, metric: str, window: str) -> pd.DataFrame:
    """The points with the stages and adapters of the bars."""
    rows = medians(table, metric, window)
    here = rows[(rows["stages"] == STAGES) & (rows["adapters"] == ADAPTERS)]
    if here.empty:
        raise MeasurementError(f"the table has no {metric} with {STAGES} stages and {ADAPTERS} adapters")
    return here.reset_index(drop=True)


def draw_bubble(data: pd.DataFrame) -> Figure:
    return _draw_bars(data, "bubble, steady state", percent=True)


def draw_fill(data: pd.DataFrame) -> Figure:
    return _draw_bars(data, "microbatches over bound", percent=False)


def _draw_bars(data: pd.DataFrame, label: str, percent: bool) -> Figure:
    """A row of panels for each number of samples, a panel for each global batch, a group for each workload."""
    lengths, batches = sorted(data["samples"].unique()), sorted(data["global_batch"].unique())
    names = [name for name in STRATEGIES if name in set(data["system"])]
    with matplotlib.rc_context(style.PARAMETERS):
        figure = Figure(figsize=(style.TEXT_WIDTH, 1.2 + 1.7 * len(lengths)), layout="constrained")
        axes = figure.subplots(len(lengths), len(batches), sharey="row", squeeze=False)
        for row, samples in zip(axes, lengths, strict=True):
            for ax, batch in zip(row, batches, strict=True):
                here = data[(data["samples"] == samples) & (data["global_batch"] == batch)]
                _draw_panel(ax, here, names)
                ax.set_title(f"global batch {batch}" if len(here) else "")
                if percent:
                    ax.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
            row[0].set_ylabel(f"{label}\n{samples} samples an adapter")
        handles = [
            Patch(facecolor=STRATEGIES[name].colour, hatch=STRATEGIES[name].hatch, edgecolor="white", label=name)
            for name in names
        ]
        _finish(figure, data, handles, f"{STAGES} stages, {ADAPTERS} adapters, simulated")
    return figure


def _draw_panel(ax: Axes, data: pd.DataFrame, names: list[str]) -> None:
    if data.empty:
        ax.set_axis_off()
        return
    groups = list(dict.fromkeys(data["workload"]))
    present = [name for name in names if name in set(data["system"])]
    width = 0.86 / len(present)
    for row in data.itertuples():
        x = groups.index(row.workload) + (present.index(row.system) - (len(present) - 1) / 2) * width
        look = STRATEGIES[row.system]
        ax.bar(x, row.value, width, facecolor=look.colour, hatch=look.hatch, edgecolor="white", linewidth=0.3)
    ax.set_xticks(range(len(groups)), groups, rotation=45, ha="right")


def draw_times(data: pd.DataFrame) -> Figure:
    """A line for each strategy through the median over workloads, stages and global batches, and their range."""
    total = data.assign(total=data["samples"] * data["adapters"])
    with matplotlib.rc_context(style.PARAMETERS):
        figure = Figure(figsize=(style.TEXT_WIDTH * 0.62, 3.0), layout="constrained")
        ax = figure.subplots()
        handles = []
        for name, look in STRATEGIES.items():
            times = total[total["system"] == name].groupby("total")["value"].agg(["min", "median", "max"])
            if times.empty:
                continue
            line = {"color": look.colour, "marker": MARKERS[name], "markersize": 3.5, "linewidth": 1.2}
            ax.fill_between(times.index, times["min"], times["max"], color=look.colour, alpha=0.15, linewidth=0)
            ax.plot(times.index, times["median"], **line)
            handles.append(Line2D([], [], label=name, **line))
        ax.set(xscale="log", yscale="log", xlabel="samples of all adapters", ylabel="time of a plan, s")
        _finish(figure, data, handles, "median and range")
    return figure


def _finish(figure: Figure, data: pd.DataFrame, handles: list, title: str) -> None:
    figure.legend(handles=handles, loc="outside upper center", ncols=len(handles), title=title)
    costs = f"costs of {', '.join(sorted(data['model'].dropna().unique())) or 'equal stages'}"
    capacity = f"capacity {', '.join(str(int(value)) for value in sorted(data['capacity'].unique()))}"
    footer = f"suite {', '.join(sorted(data['suite'].unique()))} · {costs}, {capacity} · {style.commit(data)}"
    figure.supxlabel(footer, fontsize=style.SMALL, color="0.35")
