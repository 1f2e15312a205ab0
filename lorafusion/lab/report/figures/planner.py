"""The figures of the planner's strategies: bubble, fill, and the time that a plan takes."""

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lorafusion.lab.report import drawing, style
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


def planner_bubble_data(table: pd.DataFrame) -> pd.DataFrame:
    """Simulated idle share of the stages in the steady state, by workload and global batch."""
    return _of_bars(table, "bubble", "steady")


def planner_fill_data(table: pd.DataFrame) -> pd.DataFrame:
    """Microbatches over their lower bound, by workload and global batch."""
    return _of_bars(table, "microbatch_ratio", "whole")


def planner_time_data(table: pd.DataFrame) -> pd.DataFrame:
    """Time that a plan takes, by the samples of all adapters."""
    return _medians(table, "solve_time", "whole")


def _medians(table: pd.DataFrame, metric: str, window: str) -> pd.DataFrame:
    """The medians of a metric in drawing order. Raises `MeasurementError` where two suites would share the bars."""
    rows = table[(table["statistic"] == "median") & (table["metric"] == metric) & (table["window"] == window)]
    rows = rows[rows["system"].isin(STRATEGIES)]
    if rows.empty:
        raise MeasurementError(f"the table has no median of {metric} of a strategy; see lorafusion lab measure --help")
    if len(suites := sorted(rows["suite"].unique())) > 1:
        raise MeasurementError(f"one bar for several suites: {', '.join(suites)}; draw them from separate tables")
    place = rows["system"].map(list(STRATEGIES).index)
    order = rows.assign(place=place, first=style.rank(rows["workload"]))
    order = order.sort_values(["first", "stages", "global_batch", "adapters", "samples", "place"])
    return order[DATA].reset_index(drop=True)


def _of_bars(table: pd.DataFrame, metric: str, window: str) -> pd.DataFrame:
    """The points with the stages and adapters of the bars."""
    rows = _medians(table, metric, window)
    rows = rows[(rows["stages"] == STAGES) & (rows["adapters"] == ADAPTERS)]
    if rows.empty:
        raise MeasurementError(f"the table has no {metric} with {STAGES} stages and {ADAPTERS} adapters")
    return rows.reset_index(drop=True)


def draw_planner_bubble(data: pd.DataFrame) -> Figure:
    return _draw_bars(data, "bubble, steady state", "{:.0%}")


def draw_planner_fill(data: pd.DataFrame) -> Figure:
    return _draw_bars(data, "microbatches over bound", "")


@drawing.styled
def _draw_bars(data: pd.DataFrame, label: str, form: str) -> Figure:
    """A row of panels for each number of samples, a panel for each global batch, a group for each workload. form: of
    the numbers of the axis, if not matplotlib's."""
    lengths, batches = sorted(data["samples"].unique()), sorted(data["global_batch"].unique())
    figure = Figure(figsize=(style.TEXT_WIDTH, 1.2 + 1.7 * len(lengths)), layout="constrained")
    axes = figure.subplots(len(lengths), len(batches), sharey="row", squeeze=False)
    for row, samples in zip(axes, lengths, strict=True):
        for ax, batch in zip(row, batches, strict=True):
            panel = data[(data["samples"] == samples) & (data["global_batch"] == batch)]
            _draw_panel(ax, panel)
            ax.set_title(f"global batch {batch}" if len(panel) else "")
            if form:
                ax.yaxis.set_major_formatter(lambda value, _: form.format(value))
        row[0].set_ylabel(f"{label}\n{samples} samples an adapter")
    present = {name: look for name, look in STRATEGIES.items() if name in set(data["system"])}
    _finish(figure, data, drawing.patches(present, 1.0), f"{STAGES} stages, {ADAPTERS} adapters, simulated")
    return figure


def _draw_panel(ax: Axes, data: pd.DataFrame) -> None:
    if data.empty:
        ax.set_axis_off()
        return
    groups = list(dict.fromkeys(data["workload"]))
    places, width = drawing.slots(groups, [name for name in STRATEGIES if name in set(data["system"])])
    for row in data.itertuples():
        ax.bar(places[row.workload, row.system], row.value, width, **drawing.fill(STRATEGIES[row.system]))
    ax.set_xticks(range(len(groups)), groups, rotation=45, ha="right")


@drawing.styled
def draw_planner_time(data: pd.DataFrame) -> Figure:
    """A line for each strategy through the median over workloads, stages and global batches, and their range."""
    total = data.assign(total=data["samples"] * data["adapters"])
    figure = Figure(figsize=(style.TEXT_WIDTH * 0.62, 3.0), layout="constrained")
    ax = figure.subplots()
    handles = []
    for name, look in STRATEGIES.items():
        times = total[total["system"] == name].groupby("total")["value"].agg(["min", "median", "max"])
        if times.empty:
            continue
        marked = {"color": look.colour, "marker": MARKERS[name], "markersize": 3.5, "linewidth": 1.2}
        ax.fill_between(times.index, times["min"], times["max"], color=look.colour, alpha=0.15, linewidth=0)
        ax.plot(times.index, times["median"], **marked)
        handles.append(drawing.line(name, **marked))
    ax.set(xscale="log", yscale="log", xlabel="samples of all adapters", ylabel="time of a plan, s")
    _finish(figure, data, handles, "median and range")
    return figure


def _finish(figure: Figure, data: pd.DataFrame, handles: list, title: str) -> None:
    costs = f"costs of {', '.join(sorted(data['model'].dropna().unique())) or 'equal stages'}"
    capacity = f"capacity {', '.join(str(int(value)) for value in sorted(data['capacity'].unique()))}"
    footer = f"suite {', '.join(sorted(data['suite'].unique()))} · {costs}, {capacity} · {style.commit(data)}"
    drawing.finish(figure, handles, title, footer)
