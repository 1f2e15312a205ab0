"""Figures of the kernel suite, each as PDF, PNG and the CSV of exactly what it shows, from which it is drawn."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import matplotlib
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import LogLocator, NullLocator

from lorafusion.lab.report import style
from lorafusion.lab.report.kernel_data import BANDWIDTH, COMPUTE, RANK, SAVED, TFLOPS, TIME

# Okabe and Ito's colours; the hatch tells bars apart in greyscale.
IMPLEMENTATIONS = {
    "frozen": style.Look("#444444", ""),
    "peft": style.Look("#E69F00", "////"),
    "peft-bf16": style.Look("#D55E00", "\\\\\\\\"),
    "peft-compiled": style.Look("#CC79A7", "...."),
    "fused": style.Look("#0072B2", ""),
    "fused-multi": style.Look("#56B4E9", ""),
}
MARKERS = dict(zip(IMPLEMENTATIONS, "sv^PoD", strict=True))
SHAPE_MARKERS = "o^sDvP"
# The look of fused-multi's numbers of adapters, from few to many, in bars and in lines.
ADAPTER_HATCHES = ("", "xxxx", "++++", "oooo")
ADAPTER_DASHES = ("-", "--", ":", "-.")
PASSES = {"forward": "forward", "both": "forward + backward"}
BARS_WIDTH = 0.86  # of the distance between two groups of bars
NUMBER_WIDTH = 0.24  # inches that a bar needs for its number above it


class Variant(NamedTuple):
    """How a line or a bar looks; `level` counts the numbers of adapters of an implementation."""

    implementation: str
    colour: str
    level: int


def draw_kernel_speed(data: pd.DataFrame) -> Figure:
    """A column of panels per shape, a row per pass."""
    shapes, looks = data[["in_features", "out_features"]].drop_duplicates(), _variants(data)
    passes = [name for name in PASSES if name in set(data["pass"])]
    logarithmic = data["value"].max() > 10
    with matplotlib.rc_context(style.PARAMETERS):
        figure = Figure(figsize=(style.TEXT_WIDTH, 1.1 + 1.6 * len(passes)), layout="constrained")
        axes = figure.subplots(len(passes), len(shapes), sharex=True, sharey="row", squeeze=False)
        for row, name in zip(axes, passes, strict=True):
            for ax, (inputs, outputs) in zip(row, shapes.itertuples(index=False), strict=True):
                here = data[(data["pass"] == name) & (data["in_features"] == inputs)]
                ax.axhline(1, color=IMPLEMENTATIONS["frozen"].colour, linewidth=1, linestyle=(0, (4, 2)))
                for variant, look in looks.items():
                    line = here[here["variant"] == variant]
                    ends = [line["value"] - line["ci_low"], line["ci_high"] - line["value"]]
                    ax.errorbar(
                        line["tokens"],
                        line["value"],
                        yerr=ends,
                        elinewidth=0.6,
                        markevery=max(1, len(line) // 6),
                        **_line_look(look),
                    )
                if name == passes[0]:
                    ax.set_title(f"{inputs:.0f}×{outputs:.0f}")
                if name == passes[-1]:
                    ax.set_xlabel("tokens")
            row[0].set_ylabel(TIME)
            if logarithmic:
                row[0].set_yscale("log")
                _plain_ticks(row[0].yaxis)
            row[-1].text(1.01, 0.5, PASSES[name], transform=row[-1].transAxes, rotation=270, va="center")
        handles = [Line2D([], [], label=name, **_line_look(look)) for name, look in looks.items()]
        dashed = {"color": IMPLEMENTATIONS["frozen"].colour, "linewidth": 1, "linestyle": (0, (4, 2))}
        handles.insert(0, Line2D([], [], label="frozen", **dashed))
        # Long enough that a dash shows on either side of the marker: adapters differ by dashes alone.
        _finish(figure, data, f"LoRA linears, rank {RANK}", handles, handlelength=3.6)
    return figure


def draw_layer_speed(data: pd.DataFrame) -> Figure:
    """A column of panels per model: times over the frozen layer's above, memory below."""
    looks = _variants(data)
    models = list(data[data["shown"] == SAVED].groupby("model")["value"].max().sort_values().index)  # by size
    with matplotlib.rc_context(style.PARAMETERS):
        figure = Figure(figsize=(style.TEXT_WIDTH, 4.3), layout="constrained")
        axes = figure.subplots(2, len(models), sharex="col", sharey="row", squeeze=False)
        space = 0.85 * style.TEXT_WIDTH / len(models)
        for row, shown in zip(axes, (TIME, SAVED), strict=True):
            for ax, model in zip(row, models, strict=True):
                here = data[(data["model"] == model) & (data["shown"] == shown)]
                tokens = data.loc[data["model"] == model, "tokens"].astype(int)
                here = here.assign(group=here["tokens"].astype(int))
                _draw_bars(ax, here, sorted(tokens.unique()), looks, space)
                if shown == TIME:
                    ax.axhline(1, color=IMPLEMENTATIONS["frozen"].colour, linewidth=1, linestyle=(0, (4, 2)))
                    ax.set_title(model)
                else:
                    ax.set_xlabel("tokens")
                    ax.tick_params(axis="x", labelrotation=45 if space / tokens.nunique() < 0.4 else 0)
            row[0].set_ylabel(shown)
        title = f"Decoder layers, rank {RANK}, forward + backward"
        _finish(figure, data, title, _bar_handles(data, looks))
    return figure


def draw_dram_traffic(data: pd.DataFrame) -> Figure:
    """A group of bars per shape, the published ones hatched."""
    group = data["in_features"].astype(int).astype(str) + "×" + data["out_features"].astype(int).astype(str)
    data, looks = data.assign(group=group), _variants(data)
    with matplotlib.rc_context(style.PARAMETERS):
        figure = Figure(figsize=(style.TEXT_WIDTH, 2.9), layout="constrained")
        ax = figure.subplots()
        _draw_bars(ax, data, list(data["group"].unique()), looks, 0.9 * style.TEXT_WIDTH)
        ax.set_ylabel("GiB")
        tokens = ", ".join(str(int(count)) for count in data["tokens"].unique())
        title = f"DRAM traffic of a LoRA linear, rank {RANK}, {tokens} tokens, forward + backward"
        _finish(figure, data, title, _bar_handles(data, looks))
    return figure


def draw_roofline(data: pd.DataFrame) -> Figure:
    """Points under the bandwidth's slope and the matrix product's level, both axes logarithmic."""
    points, ceilings = data[data["shown"] == TFLOPS], data.set_index("shown")["value"]
    compute, bandwidth, looks = float(ceilings[COMPUTE]), float(ceilings[BANDWIDTH]), _variants(points)
    ridge = compute / bandwidth
    low, high = min(ridge, points["flop_per_byte"].min()) / 3, max(ridge, points["flop_per_byte"].max()) * 2
    grey = "0.25"
    with matplotlib.rc_context(style.PARAMETERS):
        figure = Figure(figsize=(0.75 * style.TEXT_WIDTH, 3.7), layout="constrained")
        ax = figure.subplots()
        ax.set(xscale="log", yscale="log", xlabel="FLOP per byte of DRAM traffic", ylabel="TFLOP/s")
        ax.plot([low, ridge, high], [low * bandwidth, compute, compute], color=grey, linewidth=1.2)
        text = {"color": grey, "fontsize": style.SMALL, "textcoords": "offset points"}
        ax.annotate(f"GEMM {compute:.3g} TFLOP/s", (high, compute), (-2, 3), ha="right", va="bottom", **text)
        start, slope = 1.15 * low, math.degrees(math.atan(bandwidth))
        angle = {"rotation": slope, "rotation_mode": "anchor", "transform_rotates_text": True}
        label = {"color": grey, "fontsize": style.SMALL, "va": "bottom"} | angle
        ax.text(start, 1.06 * start * bandwidth, f"copy {bandwidth:.3g} TB/s", **label)
        shapes = points[["in_features", "out_features"]].drop_duplicates()
        names = [f"{a:.0f}×{b:.0f}" for a, b in shapes.itertuples(index=False)]
        markers = {name: SHAPE_MARKERS[place % len(SHAPE_MARKERS)] for place, name in enumerate(names)}
        for point in points.itertuples():
            mark = markers[f"{point.in_features:.0f}×{point.out_features:.0f}"]
            dot = {"marker": mark, "markersize": 5, "markeredgecolor": "white", "markeredgewidth": 0.4}
            ax.plot(point.flop_per_byte, point.value, color=looks[point.variant].colour, zorder=3, **dot)
        bottom = min(points["value"].min(), low * bandwidth) / 1.3
        ax.set(xlim=(low, high), ylim=(bottom, max(compute, points["value"].max()) * 1.5))
        _plain_ticks(ax.xaxis)
        _plain_ticks(ax.yaxis)
        handles: list = [Patch(label=name, facecolor=look.colour) for name, look in looks.items()]
        blank = {"linestyle": "none", "markersize": 5, "color": "0.4"}
        handles += [Line2D([], [], marker=mark, label=name, **blank) for name, mark in markers.items()]
        _finish(figure, data, f"Roofline of LoRA linears, rank {RANK}, forward + backward", handles)
    return figure


def _variants(data: pd.DataFrame) -> dict[str, Variant]:
    """The look of each variant, in drawing order."""
    rows = data[["implementation", "adapters", "variant"]].drop_duplicates()
    rows = (
        rows.sort_values("adapters").sort_values("implementation", key=_place, kind="stable").drop_duplicates("variant")
    )
    out: dict[str, Variant] = {}
    for row in rows.itertuples():
        level = sum(look.implementation == row.implementation for look in out.values()) % len(ADAPTER_DASHES)
        out[row.variant] = Variant(row.implementation, IMPLEMENTATIONS[row.implementation].colour, level)
    return out


def _place(names: pd.Series) -> pd.Series:
    return names.map(list(IMPLEMENTATIONS).index)


def _line_look(look: Variant) -> dict:
    mark = {"marker": MARKERS[look.implementation], "markersize": 3, "markeredgewidth": 0}
    return {"color": look.colour, "linestyle": ADAPTER_DASHES[look.level], "linewidth": 1.2, **mark}


def _bar_look(look: Variant, kind: str) -> dict:
    if kind != "measured":
        return {"facecolor": "white", "edgecolor": look.colour, "hatch": style.KINDS[kind], "linewidth": 0.8}
    hatch = IMPLEMENTATIONS[look.implementation].hatch or ADAPTER_HATCHES[look.level]
    return {"facecolor": look.colour, "edgecolor": "white", "hatch": hatch, "linewidth": 0.3}


def _draw_bars(ax: Axes, data: pd.DataFrame, groups: list, looks: dict[str, Variant], inches: float) -> None:
    """Bars of `data`'s groups on a panel that is `inches` wide, with numbers above them where they have the room."""
    kinds = [kind for kind in ("measured", "published") if kind in set(data["kind"])]
    pairs = set(zip(data["variant"], data["kind"], strict=True))
    series = [(name, kind) for name in looks for kind in kinds if (name, kind) in pairs]
    width = BARS_WIDTH / len(series)
    bar_inches = width * inches / len(groups)
    numbers, small = bar_inches > NUMBER_WIDTH, min(style.SMALL, max(4.5, 72 * bar_inches))
    ax.margins(y=0.12 if numbers else 0.05)
    for row in data.itertuples():
        x = groups.index(row.group) + (series.index((row.variant, row.kind)) - (len(series) - 1) / 2) * width
        note = {
            "textcoords": "offset points",
            "xytext": (0, 2),
            "ha": "center",
            "va": "bottom",
            "fontsize": style.SMALL,
        }
        if pd.isna(row.value):
            ax.annotate(
                style.status_label(row.status), (x, 0), rotation=90, color="#B00000", **note | {"fontsize": small}
            )
            continue
        ax.bar(x, row.value, width, **_bar_look(looks[row.variant], row.kind))
        if not pd.isna(row.ci_low):
            ends = [[row.value - row.ci_low], [row.ci_high - row.value]]
            ax.errorbar(x, row.value, yerr=ends, color="black", linewidth=0.6, capsize=1.5, capthick=0.6)
        if numbers:
            ax.annotate(_three_digits(row.value), (x, row.value if pd.isna(row.ci_high) else row.ci_high), **note)
    ax.set(xticks=range(len(groups)), xticklabels=groups, xlim=(-0.55, len(groups) - 0.45))


def _bar_handles(data: pd.DataFrame, looks: dict[str, Variant]) -> list[Patch]:
    measured = set(data["variant"][data["kind"] == "measured"])
    handles = [Patch(label=name, **_bar_look(look, "measured")) for name, look in looks.items() if name in measured]
    if (data["kind"] == "published").any():
        handles.append(Patch(label="published", **_bar_look(Variant("", "0.3", 0), "published")))
    return handles


def _three_digits(value: float) -> str:
    """1.1 as 1.10, beside 1.05."""
    return f"{value:#.3g}".rstrip(".")


def _plain_ticks(axis) -> None:
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.set_minor_locator(NullLocator())


def _finish(figure: Figure, data: pd.DataFrame, title: str, handles: list, **legend: Any) -> None:
    """Legend, title, and a footer with suite, commit and device. legend: of `Figure.legend`."""
    measured = data[data["kind"] == "measured"]
    cpu = bool(measured["gpu_name"].isna().any())
    title += f" ({style.CPU_WARNING})" if cpu else ""
    columns = len(handles) if len(handles) < 6 else math.ceil(len(handles) / 2)
    figure.legend(handles=handles, loc="outside upper center", ncols=columns, title=title, **legend)
    devices = ", ".join([*sorted(measured["gpu_name"].dropna().unique()), *(["CPU"] if cpu else [])])
    failed = int((measured["status"] != "ok").sum())
    lost = f"; {failed} failed {'points have' if failed > 1 else 'point has'} no value" if failed else ""
    lost += "; published: the paper's, Torch LoRA beside peft-bf16" if (data["kind"] == "published").any() else ""
    footer = f"{style.origin(measured, devices)}\nmedian of the processes{lost}"
    figure.supxlabel(footer, fontsize=style.SMALL, color="0.35")
