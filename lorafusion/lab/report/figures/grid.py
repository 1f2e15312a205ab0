"""The figure of the grid: what a fused linear takes over PEFT's, by tokens, and where it takes most."""

from typing import NamedTuple

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from lorafusion.core.config import read_model
from lorafusion.lab.report import drawing, style
from lorafusion.lab.table.table import MeasurementError

OURS, PEFT = "fused-multi", "peft-multi"
METRICS = {"host": "host", "wall": "wall, eager", "device": "captured as a CUDA graph"}
POINT = ["suite", "model", "in_features", "out_features", "rank", "dropout", "adapters", "tokens", "metric"]
ORIGIN = ["status", "n", "gpu_name", "git_sha", "git_dirty"]
DATA = [*POINT, "linears", "fused", "peft", "value", *ORIGIN]
LIMITS = (1.0, 1.02)  # of the time over PEFT's


class Share(NamedTuple):
    """What a metric of the grid comes to. worst: the point whose time over PEFT's is the largest; within: the shares
    of the points that are at most each of the limits."""

    points: int
    worst: pd.Series
    within: tuple[float, ...]


def share_of(data: pd.DataFrame, metric: str) -> Share:
    """Of the points that have a number. A point where PEFT alone ran out of memory has none."""
    values = data[(data["metric"] == metric) & data["value"].notna()]
    within = tuple(float((values["value"] <= limit).mean()) for limit in LIMITS)
    return Share(len(values), values.loc[values["value"].idxmax()], within)


def grid_speed_data(table: pd.DataFrame) -> pd.DataFrame:
    """Seconds of ours and of PEFT's, and their ratio, of each point and metric."""
    rows = table[(table["statistic"] == "median") & table["metric"].isin(METRICS)]
    rows = rows[rows["cell"].str.startswith("grid~")]
    ours, peft = (rows[rows["implementation"] == name] for name in (OURS, PEFT))
    data = ours.merge(peft[[*POINT, "value", "status"]], on=POINT, suffixes=("", "_of_peft"))
    if data["value"].isna().all():
        raise MeasurementError("no median of the grid's linears in the table; see lorafusion lab measure --help")
    data = data.assign(
        fused=data["value"], peft=data["value_of_peft"], value=data["value"] / data["value_of_peft"],
        status=data["status"].where(data["status"] != "ok", data["status_of_peft"]),
        linears=[_linears(row.model, row.in_features, row.out_features) for row in data.itertuples()],
    )  # fmt: skip
    return data.sort_values(POINT, ignore_index=True)[DATA]


def _linears(model: str, inputs: int, outputs: int) -> str:
    """The linears of a model that have these sizes, as `q, o`."""
    shapes = read_model(model).linears.items()
    return ", ".join(name.removesuffix("_proj") for name, shape in shapes if tuple(shape) == (inputs, outputs))


@drawing.styled
def draw_grid_speed(data: pd.DataFrame) -> Figure:
    """A panel for each metric: a dot for each point, and a line through the worst of a class of linears."""
    metrics = [name for name in METRICS if name in set(data["metric"])]
    classes = list(dict.fromkeys(data["linears"]))
    colours = dict(zip(classes, style.PALETTE * len(classes), strict=False))
    figure = Figure(figsize=(style.TEXT_WIDTH, 3.1), layout="constrained")
    axes = figure.subplots(1, len(metrics), sharey=True, squeeze=False)[0]
    for ax, metric in zip(axes, metrics, strict=True):
        _draw_panel(ax, data[data["metric"] == metric], colours)
        ax.set_title(METRICS[metric])
    axes[0].set_ylabel("time over PEFT's")
    footer = "\n".join([f"{style.origin(data)} · median of the processes", *(_line(data, name) for name in metrics)])
    handles = [drawing.line(name, color=colours[name], linewidth=1.2) for name in classes]
    title = "Fused linears over PEFT's in the same dtype, forward + backward"
    drawing.finish(figure, handles, title, footer, cpu=bool(data["gpu_name"].isna().all()))
    return figure


def _draw_panel(ax: Axes, data: pd.DataFrame, colours: dict[str, str]) -> None:
    data = data.dropna(subset=["value"])
    for name, colour in colours.items():
        values = data[data["linears"] == name]
        ax.plot(values["tokens"], values["value"], ".", color=colour, markersize=2.5, alpha=0.5)
        worst = values.groupby("tokens")["value"].max()
        ax.plot(worst.index, worst, color=colour, linewidth=1.2)
    ax.axhline(1.0, color="0.3", linewidth=0.8, linestyle=(0, (4, 2)))
    ax.set(xscale="log", xlabel="tokens")
    ax.xaxis.set_major_locator(LogLocator(base=4))
    ax.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    ax.xaxis.set_minor_locator(NullLocator())


def _line(data: pd.DataFrame, metric: str) -> str:
    """A metric in a line of the footer: how many points are within the limits, and the worst."""
    share = share_of(data, metric)
    within = ", ".join(f"{part:.0%} within {limit:.2f}" for part, limit in zip(share.within, LIMITS, strict=True))
    return f"{metric}: {within} of {share.points}; worst {share.worst['value']:.2f} at {place(share.worst)}"


def place(point: pd.Series) -> str:
    """Where a point of the grid is, in words."""
    return (
        f"{point['in_features']:.0f} → {point['out_features']:.0f} with {point['tokens']:.0f} tokens, adapters: "
        f"{point['adapters']:.0f}, rank {point['rank']:.0f}, dropout {point['dropout']:g}"
    )
