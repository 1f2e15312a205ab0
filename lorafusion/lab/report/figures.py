"""Figures of the measurement table, each as PDF, PNG and the CSV of exactly what it shows.

A figure is drawn from its CSV, not beside it: whoever edits or re-plots that file starts from the same numbers. Equal
tables give equal bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import matplotlib
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from lorafusion.core.files import whole, write
from lorafusion.core.seals import require_seal, seal
from lorafusion.lab.report import style
from lorafusion.lab.report.throughput import SYSTEM, ablations, group_names, merged_qkv, require_one_cell_a_place
from lorafusion.lab.table.table import MeasurementError
from lorafusion.lab.table.vocabulary import WINDOWS

WINDOW_TITLES = {"whole": "whole run", "steady": "steady state"}
MISSING = "n/a"
GROUP_WIDTH = 0.84  # of the distance between two groups of bars
WIDEST_BAR = 0.7  # inches
POINT_SPREAD = 0.6  # of a bar's width, over which the repeats' points are spread
ROW_HEIGHT = 1.55  # inches
PANELS_WIDTH = 0.85 * style.TEXT_WIDTH  # inches that axis labels and gaps leave to the panels, about
RATIO_WIDTH = 0.34  # inches that a ratio takes

IDENTITY = ["suite", "model", "workload", "system", "kind", "window", "gpus"]
DATA = [*IDENTITY, "group", "element", "repeat", "value", "ci_low", "ci_high", "n", "ratio", "text"]
ORIGIN = ["git_sha", "git_dirty", "gpu_name"]


def written(data: pd.DataFrame, draw: Callable[[pd.DataFrame], Figure], out_stem: str | Path) -> list[Path]:
    """Write what a figure shows as CSV, draw it from there, and save it; equal tables give equal bytes."""
    stem = Path(out_stem)
    csv = stem.with_name(stem.name + ".csv")
    write(csv, data.to_csv(index=False, lineterminator="\n"))
    seal(csv)
    return [*save(draw(read_data(csv)), stem), csv]


def read_data(path: str | Path) -> pd.DataFrame:
    """A sealed CSV, as a figure's drawing takes it; only an empty field is empty. Raises `UserError` if it is cut."""
    require_seal(Path(path))
    return pd.read_csv(path, keep_default_na=False, na_values=[""])


def save(figure: Figure, stem: Path) -> list[Path]:
    """Write PDF and PNG without dates or versions of the tools, so that equal figures are equal files."""
    pdf, png = stem.with_name(stem.name + ".pdf"), stem.with_name(stem.name + ".png")
    with matplotlib.rc_context(style.PARAMETERS):
        with whole(pdf) as partial:
            figure.savefig(partial, format="pdf", metadata={"CreationDate": None})
        with whole(png) as partial:
            figure.savefig(partial, format="png", dpi=style.PNG_DPI, metadata={"Software": None})
    return [pdf, png]


def end_to_end_data(table: pd.DataFrame, model: str) -> pd.DataFrame:
    """What the figure shows, a row an element: bars, the points of repeats, and text in place of missing bars.

    Values and intervals are in tokens/s; `ratio` is lorafusion's over the best baseline's of the same kind. Ablations,
    and cells with merged q, k and v, are what `contributions_figure` is for.
    """
    throughput = table[table["metric"] == "throughput"]
    throughput = throughput[~throughput["system"].isin(ablations()) & ~merged_qkv(throughput)]
    rows = throughput[throughput["model"] == model].copy()
    medians = rows["statistic"] == "median"
    if not medians.any():
        models = ", ".join(sorted(throughput["model"].dropna().unique())) or "none"
        raise MeasurementError(f"no summary of throughput of model {model!r}; models in the table: {models}")
    rows["group"] = group_names(rows)
    bars = rows[medians].assign(element="bar")
    require_one_cell_a_place(bars, ["window", "gpus", "group", "kind", "system"])
    failed = bars["status"] != "ok"
    bars.loc[failed, "element"] = "text"
    bars["text"] = bars["status"].map(style.status_label).where(failed)
    bars = _with_ratios(bars)
    measured = rows[~medians & (rows["kind"] == "measured")]
    # A failed cell's surviving repeats have no bar to stand on.
    without_bar = bars["cell"][failed & (bars["kind"] == "measured")]
    points = measured[~measured["cell"].isin(without_bar)].assign(element="point")
    missing = pd.DataFrame(_missing(bars)).assign(element="text", text=MISSING)
    data = pd.concat([bars, points, missing]).reindex(columns=[*DATA, *ORIGIN])
    order = ["gpus", "window", "group", "kind", "system", "element", "repeat"]
    return data.sort_values(order, key=style.rank, ignore_index=True)


def draw_end_to_end(data: pd.DataFrame, footer: str | None = None) -> Figure:
    """The figure of `end_to_end_data`: a column of panels per number of GPUs, a row per window."""
    windows = [window for window in WINDOWS if window in set(data["window"])]
    columns = {int(gpus): panel for gpus, panel in data.groupby("gpus")}
    looks = style.looks(data["system"])
    cpu = _on_cpu(data)
    with matplotlib.rc_context(style.PARAMETERS):
        handles = _legend_handles(data, looks)
        ncols = _legend_columns([handle.get_label() for handle in handles])
        # From three lines on the legend has its own height, that no panel gets lower.
        height = 0.95 + ROW_HEIGHT * len(windows) + 0.15 * max(0, -(-len(handles) // ncols) - 2)
        figure = Figure(figsize=(style.TEXT_WIDTH, height), layout="constrained")
        widths = [_panel_width(panel) for panel in columns.values()]
        axes = figure.subplots(
            len(windows), len(columns), sharey=True, sharex="col", squeeze=False, width_ratios=widths
        )
        spaces = [PANELS_WIDTH * width / sum(widths) for width in widths]
        for row, window in zip(axes, windows, strict=True):
            for ax, panel, space in zip(row, columns.values(), spaces, strict=True):
                _draw_panel(ax, panel, window, looks, space / panel["group"].nunique())
            row[0].set_ylabel("tokens/s")
            row[-1].text(1.01, 0.5, WINDOW_TITLES[window], transform=row[-1].transAxes, rotation=270, va="center")
        for ax, gpus in zip(axes[0], columns, strict=True):
            ax.set_title(device_count(gpus, cpu))
        if _names_collide(columns.values(), spaces):
            for ax in axes[-1]:
                ax.tick_params(axis="x", labelrotation=30)
                matplotlib.artist.setp(ax.get_xticklabels(), ha="right", rotation_mode="anchor")
        _scale(axes[0, 0], data)
        title = f"{data['model'][0]}: training throughput" + (f" ({style.CPU_WARNING})" if cpu else "")
        figure.legend(handles=handles, loc="outside upper center", ncols=ncols, title=title)
        figure.supxlabel(_footer(data, cpu) if footer is None else footer, fontsize=style.SMALL, color="0.35")
    return figure


def _with_ratios(bars: pd.DataFrame) -> pd.DataFrame:
    """Add to each bar of lorafusion its value over that of the best baseline of its group and kind."""
    group = ["window", "gpus", "group", "kind"]
    ours = bars["system"] == SYSTEM
    best = bars[~ours].groupby(group, as_index=False).agg(best=("value", "max"))
    ratios = bars.merge(best, on=group, how="left")
    return bars.assign(ratio=(ratios["value"] / ratios["best"]).to_numpy()).assign(
        ratio=lambda frame: frame["ratio"].where(ours)
    )


def _missing(bars: pd.DataFrame) -> Iterator[dict]:
    """The places in a panel that hold no cell although the panel has the group and the system."""
    for (model, gpus), panel in bars.groupby(["model", "gpus"]):
        series = panel[["system", "kind"]].drop_duplicates()
        places = panel[["window", "group", "workload"]].drop_duplicates().merge(series, how="cross")
        known = panel[["window", "group", "system", "kind"]].assign(known=True)
        for place in places.merge(known, how="left").query("known.isna()").to_dict("records"):
            yield place | {"model": model, "gpus": gpus}


def _series(panel: pd.DataFrame) -> list[tuple[str, str]]:
    """The bars of a group from left to right, as (kind, system)."""
    pairs = panel[["kind", "system"]].drop_duplicates().sort_values(["kind", "system"], key=style.rank)
    return list(pairs.itertuples(index=False, name=None))


def _panel_width(panel: pd.DataFrame) -> float:
    """How much of the figure's width a panel takes: as its bars, but never too little for the ratios over them."""
    return panel["group"].nunique() * max(len(_series(panel)) + 1.0, 4.2)


def _names_collide(panels: Iterable[pd.DataFrame], spaces: list[float]) -> bool:
    """Is a group's name longer than its share of its panel's `spaces`, in inches?"""
    letter = 0.62 * (style.FONT_SIZE - 1) / 72
    for panel, space in zip(panels, spaces, strict=True):
        names = panel["group"].unique()
        if max(map(len, names)) * letter > space / len(names):
            return True
    return False


def _draw_panel(ax: Axes, panel: pd.DataFrame, window: str, looks: dict[str, style.Look], group_inches: float) -> None:
    groups, series = list(panel["group"].unique()), _series(panel)
    data = panel[panel["window"] == window]
    _draw_bars(ax, data[data["element"] == "bar"], groups, series, looks)
    width = GROUP_WIDTH / len(series)
    margin = 0.05 + len(groups) / 2 * max(0, width * group_inches / WIDEST_BAR - 1)
    limits = (-0.5 - margin, len(groups) - 0.5 + margin)
    ax.set(xlabel="", ylabel="", xticks=range(len(groups)), xticklabels=groups, xlim=limits)
    for row in data.itertuples():
        slot = series.index((row.kind, row.system))
        x = groups.index(row.group) + (slot - (len(series) - 1) / 2) * width
        if row.element == "text":
            _write_upright(ax, x, row.text)
        elif row.element == "point":
            _draw_point(ax, x, row, width, width * group_inches)
        elif not pd.isna(row.ci_low):
            ends = [[row.value - row.ci_low], [row.ci_high - row.value]]
            ax.errorbar(x, row.value, yerr=ends, color="black", linewidth=0.6, capsize=1.5, capthick=0.6, zorder=3)
        if not pd.isna(row.ratio):
            here = data[(data["group"] == row.group) & (data["kind"] == row.kind)]
            top = here[["value", "ci_high"]].max().max()
            _write_ratio(ax, x, top, row.ratio, width, width * group_inches)


def _draw_bars(
    ax: Axes, bars: pd.DataFrame, groups: list[str], series: list[tuple[str, str]], looks: dict[str, style.Look]
) -> None:
    if bars.empty:
        return
    sns.barplot(
        data=bars.assign(series=bars["kind"] + " " + bars["system"]),
        x="group",
        y="value",
        order=groups,
        hue="series",
        hue_order=[f"{kind} {system}" for kind, system in series],
        palette=[looks[system].colour for _, system in series],
        width=GROUP_WIDTH,
        saturation=1,
        errorbar=None,
        legend=False,
        ax=ax,
    )
    for container, (kind, system) in zip(ax.containers, series, strict=True):
        for bar in container:
            bar.set(**_bar_look(kind, looks[system]))


def _draw_point(ax: Axes, x: float, row, width: float, inches: float) -> None:
    """A repeat's value on its bar, which is `width` wide, or `inches`."""
    # Spread evenly and not at random: the place tells the repeats apart, and the figure stays the same.
    shift = (((row.repeat - 1) * 0.618 + 0.5) % 1 - 0.5) * POINT_SPREAD * width
    size = min(2.2, 16 * inches)
    look = {"color": "black", "markeredgecolor": "white", "markeredgewidth": size / 6}
    ax.plot(x + shift, row.value, marker="o", markersize=size, zorder=4, **look)


def _write_upright(ax: Axes, x: float, text: str) -> None:
    """Text in the place of a bar."""
    look = {"fontsize": style.SMALL, "color": "0.5" if text == MISSING else "#B00000"}
    ax.annotate(text, (x, 0), (0, 2), textcoords="offset points", rotation=90, ha="center", va="bottom", **look)


def _write_ratio(ax: Axes, x: float, top: float, ratio: float, width: float, inches: float) -> None:
    """The ratio above all that stands in its group: over its bar, reaching to the left where the bar is narrow."""
    x, align = (x, "center") if inches > RATIO_WIDTH else (x + width / 2, "right")
    look = {"fontsize": style.SMALL, "fontweight": "bold", "color": style.SYSTEMS[SYSTEM].colour}
    ax.annotate(f"{ratio:.2f}×", (x, top), (0, 2.5), textcoords="offset points", ha=align, va="bottom", **look)


def _bar_look(kind: str, look: style.Look) -> dict:
    if kind == "measured":
        return {"facecolor": look.colour, "edgecolor": "white", "hatch": look.hatch, "linewidth": 0.4}
    return {"facecolor": "white", "edgecolor": look.colour, "hatch": style.KINDS[kind], "linewidth": 0.8}


def _scale(ax: Axes, data: pd.DataFrame) -> None:
    """The axis that all panels share begins at zero and leaves room for the ratios."""
    top = data[["value", "ci_high"]].max().max()
    ax.set_ylim(0, 1 if pd.isna(top) else 1.16 * top)
    ax.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    if pd.isna(top):
        ax.set_yticks([])


def _legend_handles(data: pd.DataFrame, looks: dict[str, style.Look]) -> list:
    handles: list = [Patch(label=name, **_bar_look("measured", look)) for name, look in looks.items()]
    for kind in style.KINDS:
        if kind in set(data["kind"]):
            handles.append(Patch(label=kind, **_bar_look(kind, style.Look("0.3", ""))))
    if (data["element"] == "point").any():
        dot = {"marker": "o", "markersize": 2.5, "color": "black", "linestyle": "none"}
        handles.append(Line2D([], [], label="one repeat", **dot))
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


def device_count(count: int, cpu: bool) -> str:
    name = ("process" if count == 1 else "processes") if cpu else ("GPU" if count == 1 else "GPUs")
    return f"{count} {name}"


def _footer(data: pd.DataFrame, cpu: bool) -> str:
    """Suite, commit and device, and how to read the bars."""
    cells = data[~data["text"].isin([MISSING])]
    devices = [*cells["gpu_name"].dropna().unique(), *(["CPU"] if cpu else [])]
    bars = "bars: median of the repeats"
    if data["ci_low"].notna().any():
        bars += " with its 95 % interval"
    if data["ratio"].notna().any():
        bars += f"; ×: {SYSTEM} over the best baseline that finished"
    return style.origin(cells, ", ".join(sorted(devices)) or "no device") + "\n" + bars
