"""The figure of end-to-end throughput: every system on one model, by workload and number of GPUs."""

from collections.abc import Iterable, Iterator

import matplotlib
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from lorafusion.lab.report import drawing, style
from lorafusion.lab.report.throughput import (
    SYSTEM,
    WINDOW_TITLES,
    ablations,
    device_count,
    group_names,
    merged_qkv,
    require_one_cell_a_place,
)
from lorafusion.lab.table.table import MeasurementError
from lorafusion.lab.table.vocabulary import WINDOWS

MISSING = "n/a"
GROUP_WIDTH = 0.84  # of the distance between two groups of bars
WIDEST_BAR = 0.7  # inches
POINT_SPREAD = 0.6  # of a bar's width, over which the repeats' points are spread
ROW_HEIGHT = 1.55  # inches
PANELS_WIDTH = 0.85 * style.TEXT_WIDTH  # inches that axis labels and gaps leave to the panels, about
EDGE = 0.4  # points, of a bar
RATIO_WIDTH = 0.34  # inches that a ratio takes

IDENTITY = ["suite", "model", "workload", "system", "kind", "window", "gpus"]
DATA = [*IDENTITY, "group", "element", "repeat", "value", "ci_low", "ci_high", "n", "ratio", "text"]
ORIGIN = ["git_sha", "git_dirty", "gpu_name"]


def end_to_end_data(table: pd.DataFrame, model: str) -> pd.DataFrame:
    """What the figure shows, a row an element: bars, the points of repeats, and text in place of missing bars.

    Values and intervals are in tokens/s; `ratio` is lorafusion's over the best baseline's of the same kind. Ablations,
    and cells with merged q, k and v, are what `contributions` is for.
    """
    throughput = table[table["metric"] == "throughput"]
    throughput = throughput[~throughput["system"].isin(ablations()) & ~merged_qkv(throughput)]
    rows = throughput[throughput["model"] == model].copy()
    medians = rows["statistic"] == "median"
    if not medians.any():
        models = ", ".join(sorted(throughput["model"].dropna().unique())) or "none"
        raise MeasurementError(f"no summary of throughput of model {model!r}; models in the table: {models}")
    rows["group"] = group_names(rows)
    bars = _bars(rows[medians])
    measured = rows[~medians & (rows["kind"] == "measured")]
    # A failed cell's surviving repeats have no bar to stand on.
    without_bar = bars["cell"][(bars["status"] != "ok") & (bars["kind"] == "measured")]
    points = measured[~measured["cell"].isin(without_bar)].assign(element="point")
    missing = pd.DataFrame(_missing(bars)).assign(element="text", text=MISSING)
    data = pd.concat([bars, points, missing]).reindex(columns=[*DATA, *ORIGIN])
    order = ["gpus", "window", "group", "kind", "system", "element", "repeat"]
    return data.sort_values(order, key=style.rank, ignore_index=True)


def _bars(medians: pd.DataFrame) -> pd.DataFrame:
    """The bars, text in place of those that failed; of lorafusion with its value over that of the best baseline of its
    group and kind."""
    require_one_cell_a_place(medians, ["window", "gpus", "group", "kind", "system"])
    failed = medians["status"] != "ok"
    ours = medians["system"] == SYSTEM
    others = medians.assign(value=medians["value"].where(~ours)).groupby(["window", "gpus", "group", "kind"])
    return medians.assign(
        element=failed.map({True: "text", False: "bar"}),
        text=medians["status"].map(style.status_label).where(failed),
        ratio=(medians["value"] / others["value"].transform("max")).where(ours),
    )


@drawing.styled
def draw_end_to_end(data: pd.DataFrame) -> Figure:
    """The figure of `end_to_end_data`: a column of panels per number of GPUs, a row per window."""
    windows = [window for window in WINDOWS if window in set(data["window"])]
    columns = {int(gpus): panel for gpus, panel in data.groupby("gpus")}
    looks, cpu = style.looks(data["system"]), _on_cpu(data)
    handles = _legend_handles(data, looks)
    legend_columns = _legend_columns([handle.get_label() for handle in handles])
    # From three lines on the legend has its own height, that no panel gets lower.
    height = 0.95 + ROW_HEIGHT * len(windows) + 0.15 * max(0, -(-len(handles) // legend_columns) - 2)
    figure = Figure(figsize=(style.TEXT_WIDTH, height), layout="constrained")
    # As the bars of a panel, but never too little for the ratios over them.
    widths = [panel["group"].nunique() * max(len(_series(panel)) + 1.0, 4.2) for panel in columns.values()]
    axes = figure.subplots(len(windows), len(columns), sharey=True, sharex="col", squeeze=False, width_ratios=widths)
    spaces = [PANELS_WIDTH * width / sum(widths) for width in widths]
    for row, window in zip(axes, windows, strict=True):
        for ax, panel, space in zip(row, columns.values(), spaces, strict=True):
            _draw_panel(ax, panel, window, looks, space / panel["group"].nunique())
        row[0].set_ylabel("tokens/s")
        drawing.write_beside(row[-1], WINDOW_TITLES[window])
    for ax, gpus in zip(axes[0], columns, strict=True):
        ax.set_title(device_count(gpus, cpu))
    if _names_collide(columns.values(), spaces):
        for ax in axes[-1]:
            ax.tick_params(axis="x", labelrotation=30)
            matplotlib.artist.setp(ax.get_xticklabels(), ha="right", rotation_mode="anchor")
    _scale(axes[0, 0], data)
    title = f"{data['model'][0]}: training throughput"
    drawing.finish(figure, handles, title, _footer(data), legend_columns, cpu)
    return figure


def _missing(bars: pd.DataFrame) -> Iterator[dict]:
    """The places in a panel that hold no cell although the panel has the group and the system."""
    for (model, gpus), panel in bars.groupby(["model", "gpus"]):
        series = panel[["system", "kind"]].drop_duplicates()
        places = panel[["window", "group", "workload"]].drop_duplicates().merge(series, how="cross")
        cells = panel[["window", "group", "system", "kind"]].assign(has_cell=True)
        for place in places.merge(cells, how="left").query("has_cell.isna()").to_dict("records"):
            yield place | {"model": model, "gpus": gpus}


def _series(panel: pd.DataFrame) -> list[tuple[str, str]]:
    """The bars of a group from left to right, as (kind, system)."""
    pairs = panel[["kind", "system"]].drop_duplicates().sort_values(["kind", "system"], key=style.rank)
    return list(pairs.itertuples(index=False, name=None))


def _names_collide(panels: Iterable[pd.DataFrame], spaces: list[float]) -> bool:
    """Is a group's name longer than its share of its panel's `spaces`, in inches?"""
    letter = 0.62 * (style.FONT_SIZE - 1) / 72
    groups = [panel["group"].unique() for panel in panels]
    return any(max(map(len, names)) * letter > space / len(names) for names, space in zip(groups, spaces, strict=True))


def _draw_panel(ax: Axes, panel: pd.DataFrame, window: str, looks: dict[str, style.Look], group_inches: float) -> None:
    groups, series = list(panel["group"].unique()), _series(panel)
    data = panel[panel["window"] == window]
    places, width = drawing.slots(groups, series, GROUP_WIDTH)
    margin = 0.05 + len(groups) / 2 * max(0, width * group_inches / WIDEST_BAR - 1)
    limits = (-0.5 - margin, len(groups) - 0.5 + margin)
    ax.set(xticks=range(len(groups)), xticklabels=groups, xlim=limits)
    for row in data.itertuples():
        x = places[row.group, (row.kind, row.system)]
        if row.element == "text":
            drawing.write_upright(ax, x, row.text, "0.5" if row.text == MISSING else style.FAILED)
        elif row.element == "point":
            # Spread evenly and not at random: the place tells the repeats apart, and the figure stays the same.
            shift = (((row.repeat - 1) * 0.618 + 0.5) % 1 - 0.5) * POINT_SPREAD * width
            size = min(2.2, 16 * width * group_inches)
            look = {"color": "black", "markeredgecolor": "white", "markeredgewidth": size / 6}
            ax.plot(x + shift, row.value, marker="o", markersize=size, zorder=4, **look)
        else:
            ax.bar(x, row.value, width, **drawing.fill(looks[row.system], row.kind, linewidth=EDGE))
            drawing.draw_interval(ax, x, row, zorder=3)
        if not pd.isna(row.ratio):
            bars = data[(data["group"] == row.group) & (data["kind"] == row.kind)]
            top = bars[["value", "ci_high"]].max().max()
            _write_ratio(ax, x, top, row.ratio, width, width * group_inches)


def _write_ratio(ax: Axes, x: float, top: float, ratio: float, width: float, inches: float) -> None:
    """The ratio above all that stands in its group: over its bar, reaching to the left where the bar is narrow."""
    x, align = (x, "center") if inches > RATIO_WIDTH else (x + width / 2, "right")
    look = {"fontsize": style.SMALL, "fontweight": "bold", "color": style.SYSTEMS[SYSTEM].colour}
    ax.annotate(f"{ratio:.2f}×", (x, top), (0, 2.5), textcoords="offset points", ha=align, va="bottom", **look)


def _scale(ax: Axes, data: pd.DataFrame) -> None:
    """The axis that all panels share begins at zero and leaves room for the ratios."""
    top = data[["value", "ci_high"]].max().max()
    ax.set_ylim(0, 1 if pd.isna(top) else 1.16 * top)
    ax.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    if pd.isna(top):
        ax.set_yticks([])


def _legend_handles(data: pd.DataFrame, looks: dict[str, style.Look]) -> list:
    handles: list = drawing.patches(looks, EDGE)
    for kind in style.KINDS:
        if kind in set(data["kind"]):
            handles.append(Patch(label=kind, **drawing.fill(style.Look("0.3", ""), kind)))
    if (data["element"] == "point").any():
        handles.append(drawing.line("one repeat", marker="o", markersize=2.5, color="black", linestyle="none"))
    return handles


def _legend_columns(labels: list[str]) -> int:
    """The most columns, at most six, of a legend that is no wider than the figure."""
    size = (style.FONT_SIZE - 1) / 72
    around = size * (style.PARAMETERS["legend.handlelength"] + style.PARAMETERS["legend.columnspacing"] + 0.8)
    for columns in range(min(len(labels), 6), 1, -1):
        lines = -(-len(labels) // columns)
        widest = [max(map(len, labels[first : first + lines])) for first in range(0, len(labels), lines)]
        if sum(around + 0.62 * size * letters for letters in widest) <= style.TEXT_WIDTH:
            return columns
    return 1


def _on_cpu(data: pd.DataFrame) -> bool:
    """Are there measured rows that come from no GPU?"""
    measured = data[(data["kind"] == "measured") & ~data["text"].isin([MISSING])]
    return bool(measured["gpu_name"].isna().any())


def _footer(data: pd.DataFrame) -> str:
    """Suite, commit and device, and how to read the bars."""
    cells = data[~data["text"].isin([MISSING])]
    ran = cells[cells["kind"].eq("measured") | cells["gpu_name"].notna()]
    bars = "bars: median of the repeats"
    if data["ci_low"].notna().any():
        bars += " with its 95 % interval"
    if data["ratio"].notna().any():
        bars += f"; ×: {SYSTEM} over the best baseline that finished"
    return f"{style.origin(cells, style.devices(ran))}\n{bars}"
