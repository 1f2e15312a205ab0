"""Figures of the measurement table, each as PDF, PNG and the CSV of exactly what it shows.

A figure is drawn from its CSV, not beside it: whoever edits or re-plots that file starts from the same numbers. Equal
tables give equal bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import matplotlib
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from lorafusion.measure.table import MeasurementError
from lorafusion.measure.vocabulary import KINDS, WINDOWS
from lorafusion.report import style

SYSTEM = "lorafusion"  # the one that the others are compared with
WORKLOADS = ("xsum", "cnn_dailymail", "wikisum", "mixed", "heterogeneous")  # in the paper's order, others follow
WINDOW_TITLES = {"whole": "whole run", "steady": "steady state"}
CPU_WARNING = "CPU, not a performance result"
GROUP_WIDTH = 0.84  # of the distance between two groups of bars
POINT_SPREAD = 0.5  # of a bar's width, over which the repeats' points are spread
ROW_HEIGHT = 1.55  # inches

IDENTITY = ["suite", "model", "workload", "system", "kind", "window", "gpus"]
DATA = [*IDENTITY, "group", "element", "repeat", "value", "ci_low", "ci_high", "n", "ratio", "text"]
ORIGIN = ["git_sha", "git_dirty", "gpu_name"]


def end_to_end(table: pd.DataFrame, model: str, out_stem: str | Path, footer: str | None = None) -> list[Path]:
    """Draw the throughput of a model's cells; returns the paths written: `out_stem`.pdf, .png and .csv.

    table: with the summary rows of `lorafusion.measure.table.summarise`; throughputs in tokens/s.
    footer: in place of the line that names suite, commit and device.
    Raises `MeasurementError` where the table has no throughput of the model, or two for one bar.
    """
    stem = Path(out_stem)
    stem.parent.mkdir(parents=True, exist_ok=True)
    csv = stem.with_name(stem.name + ".csv")
    end_to_end_data(table, model).to_csv(csv, index=False, lineterminator="\n")
    return [*save(draw_end_to_end(read_data(csv), footer), stem), csv]


def read_data(path: str | Path) -> pd.DataFrame:
    """A figure's CSV, as `draw_end_to_end` takes it; only an empty field is empty."""
    return pd.read_csv(path, keep_default_na=False, na_values=[""], float_precision="round_trip")


def save(figure: Figure, stem: Path) -> list[Path]:
    """Write PDF and PNG without dates or versions of the tools, so that equal figures are equal files."""
    pdf, png = stem.with_name(stem.name + ".pdf"), stem.with_name(stem.name + ".png")
    with matplotlib.rc_context(style.PARAMETERS):
        figure.savefig(pdf, metadata={"CreationDate": None})
        figure.savefig(png, dpi=style.PNG_DPI, metadata={"Software": None})
    return [pdf, png]


def end_to_end_data(table: pd.DataFrame, model: str) -> pd.DataFrame:
    """What the figure shows, a row an element: bars, the points of repeats, and text in place of missing bars.

    Values and intervals are in tokens/s; `ratio` is lorafusion's over the best other system's of the same kind.
    """
    throughput = table[table["metric"] == "throughput"]
    rows = throughput[throughput["model"] == model].copy()
    medians = rows["statistic"] == "median"
    if not medians.any():
        models = ", ".join(sorted(throughput["model"].dropna().unique())) or "none"
        raise MeasurementError(f"no summary of throughput of model {model!r}; models in the table: {models}")
    rows["group"] = _group_names(rows)
    bars = rows[medians].assign(element="bar")
    _require_one_cell_a_bar(bars)
    failed = bars["status"] != "ok"
    bars.loc[failed, "element"] = "text"
    bars["text"] = bars["status"].map(style.status_label).where(failed)
    bars = _with_ratios(bars)
    shown = bars.loc[~failed, ["cell", "kind"]].drop_duplicates()
    points = rows[~medians & (rows["status"] == "ok")].merge(shown, on=["cell", "kind"]).assign(element="point")
    missing = pd.DataFrame(_missing(bars)).assign(element="text", text="n/a")
    data = pd.concat([bars, points, missing]).reindex(columns=[*DATA, *ORIGIN])
    order = ["gpus", "window", "group", "kind", "system", "element", "repeat"]
    return data.sort_values(order, key=_rank, ignore_index=True)


def draw_end_to_end(data: pd.DataFrame, footer: str | None = None) -> Figure:
    """The figure of `end_to_end_data`: a column of panels per number of GPUs, a row per window."""
    windows = [window for window in WINDOWS if window in set(data["window"])]
    columns = {int(gpus): panel for gpus, panel in data.groupby("gpus")}
    looks = style.looks(data["system"])
    cpu = _on_cpu(data)
    with matplotlib.rc_context(style.PARAMETERS):
        figure = Figure(figsize=(style.TEXT_WIDTH, 0.95 + ROW_HEIGHT * len(windows)), layout="constrained")
        widths = [_panel_width(panel) for panel in columns.values()]
        axes = figure.subplots(
            len(windows), len(columns), sharey=True, sharex="col", squeeze=False, width_ratios=widths
        )
        turned = _labels_collide(columns, widths)
        for row, window in zip(axes, windows, strict=True):
            for ax, (gpus, panel) in zip(row, columns.items(), strict=True):
                _draw_panel(ax, panel, window, looks)
                if row is axes[0]:
                    ax.set_title(_device_count(gpus, cpu))
                if turned:
                    ax.tick_params(axis="x", labelrotation=30)
                    matplotlib.artist.setp(ax.get_xticklabels(), ha="right", rotation_mode="anchor")
            row[0].set_ylabel("tokens/s")
            row[-1].annotate(
                WINDOW_TITLES[window], (1.01, 0.5), xycoords="axes fraction", rotation=270, va="center", ha="left"
            )
        _scale(axes[0, 0], data)
        warning = f" ({CPU_WARNING})" if cpu else ""
        figure.suptitle(f"{data['model'][0]}: training throughput{warning}")
        handles = _legend_handles(data, looks)
        figure.legend(handles=handles, loc="outside upper center", ncols=min(len(handles), 6))
        figure.supxlabel(_footer(data, cpu) if footer is None else footer, fontsize=style.SMALL, color="0.35")
    return figure


def _group_names(rows: pd.DataFrame) -> pd.Series:
    """The names under the groups of bars: workloads, with the batch size where the model has several for one."""
    several = rows.groupby("workload")["global_batch"].transform("nunique") > 1
    batches = rows["workload"] + ", batch " + rows["global_batch"].astype("string")
    return rows["workload"].where(~several, batches)


def _require_one_cell_a_bar(bars: pd.DataFrame) -> None:
    place = ["window", "gpus", "group", "kind", "system"]
    twice = bars[bars.duplicated(place, keep=False)]
    if not twice.empty:
        same = twice[(twice[place] == twice[place].iloc[0]).all(axis=1)]
        names = " and ".join(repr(cell) for cell in same["cell"][:2])
        raise MeasurementError(f"one bar for two numbers: throughput of {names}; draw them from separate tables")


def _with_ratios(bars: pd.DataFrame) -> pd.DataFrame:
    """Add to each bar of lorafusion its value over that of the best other system of its group and kind."""
    group = ["window", "gpus", "group", "kind"]
    ours = bars["system"] == SYSTEM
    best = bars[~ours].groupby(group, as_index=False).agg(best=("value", "max"))
    ratios = bars.merge(best, on=group, how="left")
    return bars.assign(ratio=(ratios["value"] / ratios["best"]).to_numpy()).assign(
        ratio=lambda frame: frame["ratio"].where(ours)
    )


def _missing(bars: pd.DataFrame) -> Iterator[dict]:
    """The places in a panel that hold no cell although the panel has the group and the system."""
    for (model, suite, gpus), panel in bars.groupby(["model", "suite", "gpus"]):
        series = panel[["system", "kind"]].drop_duplicates()
        places = panel[["window", "group", "workload"]].drop_duplicates().merge(series, how="cross")
        known = panel[["window", "group", "system", "kind"]].assign(known=True)
        for place in places.merge(known, how="left").query("known.isna()").to_dict("records"):
            yield place | {"model": model, "suite": suite, "gpus": gpus}


def _rank(column: pd.Series) -> pd.Series:
    """Sort keys: what has a customary order in that order, the rest as it is."""
    customary = {"window": WINDOWS, "kind": KINDS, "system": tuple(style.looks(column.dropna()))}.get(column.name)
    if column.name == "group":
        names = column.str.partition(",")[0]
        return names.map(lambda name: (WORKLOADS.index(name) if name in WORKLOADS else len(WORKLOADS), name))
    return column.map(customary.index) if customary else column


def _series(panel: pd.DataFrame) -> list[tuple[str, str]]:
    """The bars of a group from left to right, as (kind, system)."""
    pairs = panel[["kind", "system"]].drop_duplicates().sort_values(["kind", "system"], key=_rank)
    return list(pairs.itertuples(index=False, name=None))


def _panel_width(panel: pd.DataFrame) -> float:
    """How much of the figure's width a panel takes: as its bars, but never too little for its title."""
    return max(panel["group"].nunique() * (len(_series(panel)) + 1.0), 4.0)


def _labels_collide(columns: dict[int, pd.DataFrame], widths: list[float]) -> bool:
    """Is a group's name longer than the space that its bars leave it?"""
    inches = 0.85 * style.TEXT_WIDTH / sum(widths)
    letter = 0.62 * (style.FONT_SIZE - 1) / 72
    for panel, width in zip(columns.values(), widths, strict=True):
        names = panel["group"].unique()
        if max(map(len, names)) * letter > width * inches / len(names):
            return True
    return False


def _draw_panel(ax: Axes, panel: pd.DataFrame, window: str, looks: dict[str, style.Look]) -> None:
    groups, series = list(panel["group"].unique()), _series(panel)
    data = panel[panel["window"] == window]
    names = [f"{kind} {system}" for kind, system in series]
    sns.barplot(
        data=data[data["element"] == "bar"].assign(series=lambda bars: bars["kind"] + " " + bars["system"]),
        x="group",
        y="value",
        order=groups,
        hue="series",
        hue_order=names,
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
    ax.set(xlabel="", ylabel="")
    step = GROUP_WIDTH / len(series)
    for row in data.itertuples():
        slot = series.index((row.kind, row.system))
        x = groups.index(row.group) + (slot - (len(series) - 1) / 2) * step
        _draw_element(ax, row, x, step)
    _draw_ratios(ax, data, groups, series)
    ax.set_xlim(-0.5 - 0.08, len(groups) - 0.5 + 0.08)


def _draw_element(ax: Axes, row, x: float, width: float) -> None:
    """A repeat's point, a bar's interval, or the text where there is no bar."""
    if row.element == "point":
        # Spread evenly, not at random: the place says which repeat it is, and the figure stays the same.
        shift = 0.0 if pd.isna(row.repeat) else ((row.repeat * 0.618) % 1 - 0.5) * POINT_SPREAD * width
        ax.plot(x + shift, row.value, marker="o", markersize=2.2, color="black", markeredgecolor="white", markeredgewidth=0.4)
    elif row.element == "text":
        colour = "0.55" if row.text == "n/a" else "#B00000"
        offset = matplotlib.transforms.ScaledTranslation(0, 2 / 72, ax.figure.dpi_scale_trans)
        ax.text(
            x, 0, row.text, rotation=90, ha="center", va="bottom", fontsize=style.SMALL, color=colour,
            transform=ax.transData + offset,
        )
    elif not pd.isna(row.ci_low):
        ends = [[row.value - row.ci_low], [row.ci_high - row.value]]
        ax.errorbar(x, row.value, yerr=ends, color="black", linewidth=0.7, capsize=1.5, capthick=0.7)


def _draw_ratios(ax: Axes, data: pd.DataFrame, groups: list[str], series: list[tuple[str, str]]) -> None:
    """Over the bars of a kind in a group, above all that stands there, the ratio in lorafusion's colour."""
    step = GROUP_WIDTH / len(series)
    for row in data[data["ratio"].notna()].itertuples():
        slots = [slot for slot, (kind, _) in enumerate(series) if kind == row.kind]
        x = groups.index(row.group) + (sum(slots) / len(slots) - (len(series) - 1) / 2) * step
        here = data[(data["group"] == row.group) & (data["kind"] == row.kind)]
        top = here[["value", "ci_high"]].max().max()
        ax.annotate(
            f"{row.ratio:.2f}×", (x, top), (0, 2.5), textcoords="offset points", ha="center", va="bottom",
            fontsize=style.SMALL, fontweight="bold", color=style.SYSTEMS[SYSTEM].colour,
        )


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


def _on_cpu(data: pd.DataFrame) -> bool:
    """Are there measured rows that come from no GPU?"""
    measured = data[(data["kind"] == "measured") & (data["text"] != "n/a")]
    return bool(measured["gpu_name"].isna().any())


def _device_count(count: int, cpu: bool) -> str:
    name = ("process" if count == 1 else "processes") if cpu else ("GPU" if count == 1 else "GPUs")
    return f"{count} {name}"


def _footer(data: pd.DataFrame, cpu: bool) -> str:
    """Suite, commit and device, and how to read the bars."""
    cells = data[data["text"] != "n/a"]
    commits = cells["git_sha"].dropna().str[:10].unique()
    dirty = " with local changes" if cells["git_dirty"].eq(True).any() else ""
    devices = [*cells["gpu_name"].dropna().unique(), *(["CPU"] if cpu else [])]
    origin = [
        "suite " + ", ".join(sorted(cells["suite"].unique())),
        "commit " + (", ".join(sorted(commits)) or "unknown") + dirty,
        ", ".join(sorted(devices)) or "no device",
    ]
    bars = "bars: median of the repeats"
    if data["ci_low"].notna().any():
        bars += " with its 95 % interval"
    if data["ratio"].notna().any():
        bars += f"; ×: {SYSTEM} over the best other system"
    return " · ".join(origin) + "\n" + bars
