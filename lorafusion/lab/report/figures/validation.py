"""The figure of predictions: what the simulator says that runs take, over what they took."""

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from lorafusion.lab.report import drawing, style
from lorafusion.lab.report.throughput import device_count
from lorafusion.lab.table.table import MeasurementError

PLACE = ["suite", "model", "gpus", "implementation", "system", "workload", "merged_qkv", "global_batch", "cell"]
ORIGIN = ["git_sha", "git_dirty", "gpu_name"]
BAND = 0.08  # the error that is aimed at, of each cell on one GPU
MARKERS = "os^DvPX"
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#000000")


def validation_data(table: pd.DataFrame) -> pd.DataFrame:
    """A row a cell: its measured and its predicted time, medians in s, their ratio, and the costs that it is by."""
    times = table[(table["metric"] == "time") & (table["window"] == "whole") & (table["statistic"] == "median")]
    times = times[times["status"] == "ok"]
    measured, simulated = (times[times["kind"] == kind] for kind in ("measured", "simulated"))
    predicted = simulated[["suite", "cell", "value"]].rename(columns={"value": "predicted"})
    data = measured.rename(columns={"value": "measured"}).merge(predicted, on=["suite", "cell"])
    if data.empty:
        raise MeasurementError("no run of the table has a predicted time beside the one that it took")
    single = table[(table["kind"] == "simulated") & (table["statistic"] == "single")]
    data["costs"] = data["cell"].map(single.groupby("cell")["note"].first())
    data["ratio"] = data["predicted"] / data["measured"]
    data = data[[*PLACE, "measured", "predicted", "ratio", "costs", *ORIGIN]]
    order = ["suite", "model", "gpus", "system", "workload", "merged_qkv", "global_batch"]
    return data.sort_values(order, key=style.rank).reset_index(drop=True)


def errors(data: pd.DataFrame) -> pd.DataFrame:
    """The mean and the largest absolute error, and the number of cells, by devices and LoRA operation."""
    error = (data["ratio"] - 1).abs()
    return error.groupby([data["gpus"], data["implementation"]], sort=False).agg(["mean", "max", "count"])


@drawing.styled
def draw_validation(data: pd.DataFrame) -> Figure:
    """A panel a number of devices: each cell's predicted over its measured time, by the measured one."""
    cpu, groups = bool(data["gpu_name"].isna().all()), errors(data)
    counts = list(dict.fromkeys(data["gpus"]))
    figure = Figure(figsize=(style.TEXT_WIDTH, 3.0), layout="constrained")
    axes = figure.subplots(1, len(counts), sharey=True, squeeze=False)[0]
    names = list(dict.fromkeys(data["implementation"]))
    looks = {name: {"marker": marker, "color": colour, "markersize": 3.5, "linestyle": "none"}
             for name, marker, colour in zip(names, MARKERS, COLOURS, strict=False)}  # fmt: skip
    for ax, count in zip(axes, counts, strict=True):
        _draw_panel(ax, data[data["gpus"] == count], looks)
        lines = [f"{name}: {group['mean']:.1%}, {group['max']:.1%} of {group['count']:.0f}"
                 for name, group in groups.loc[count].iterrows()]  # fmt: skip
        ax.set_title("\n".join([device_count(count, cpu), *lines]), fontsize=style.SMALL)
    axes[0].set_ylabel("predicted over measured time")
    handles = [drawing.line(name, **look) for name, look in looks.items()]
    costs = "; ".join(sorted(set(data["costs"].dropna())))
    footer = f"band: {BAND:.0%} off; above: mean and largest error\n{costs}; {style.origin(data)}"
    drawing.finish(figure, handles, "LoRA operation", footer, cpu=cpu)
    return figure


def _draw_panel(ax: Axes, data: pd.DataFrame, looks: dict[str, dict]) -> None:
    ax.axhspan(1 - BAND, 1 + BAND, color="0.92", zorder=0)
    ax.axhline(1, color="0.5", linewidth=0.6)
    for name, rows in data.groupby("implementation", sort=False):
        ax.plot(rows["measured"], rows["ratio"], **looks[name])
    ax.margins(y=0.15)
    ax.set_xscale("log")
    ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter("{x:g}")
    ax.set_xlabel("measured time, s")
