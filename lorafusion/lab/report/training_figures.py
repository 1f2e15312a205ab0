"""Figures of the training suite, each as PDF, PNG and the CSV of exactly what it shows, from which it is drawn."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from lorafusion.lab.profiler import COLUMNS, ORDER
from lorafusion.lab.report import style
from lorafusion.lab.report.figures import read_data
from lorafusion.lab.report.kernel_figures import ADAPTER_HATCHES, IMPLEMENTATIONS
from lorafusion.lab.table.table import MeasurementError

SHOWN = {"throughput": ("tokens/s", 1.0), "peak_memory": ("peak memory, GiB", 2.0**-30)}
DATA = ["suite", "bench", "model", "implementation", "adapters", "variant", "metric", "value", "ci_low", "ci_high",
        "status", "tokens", "gpu_name", "git_sha", "git_dirty"]  # fmt: skip
BAR = ["suite", "bench", "implementation", "adapters", "git_sha"]
CLASSES = dict(
    zip(
        ORDER,
        (
            style.Look("#0072B2", ""),
            style.Look("#56B4E9", "xxxx"),
            style.Look("#E69F00", "////"),
            style.Look("#009E73", ""),
            style.Look("#CC79A7", "...."),
            style.Look("#F0E442", "++++"),
            style.Look("#D55E00", "||||"),
            style.Look("#444444", "oooo"),
            style.Look("#D0D0D0", ""),
        ),
        strict=True,
    )
)
LABELLED = 0.042  # of a panel's highest bar, from which on a part has its number in it


def speed_data(table: pd.DataFrame) -> pd.DataFrame:
    """The medians, in drawing order."""
    rows = table[(table["statistic"] == "median") & table["metric"].isin(SHOWN)]
    rows = rows[rows["cell"].str.startswith("bench~") & rows["implementation"].isin(IMPLEMENTATIONS)]
    if rows.empty or rows["value"].isna().all():
        raise MeasurementError("the table has no median throughput of training steps; see lorafusion training --help")
    scale = rows["metric"].map({metric: scale for metric, (_, scale) in SHOWN.items()})
    rows = rows.assign(
        bench=rows["cell"].str.extract("^bench~([^/]+)/")[0],
        **{name: rows[name] * scale for name in ("value", "ci_low", "ci_high")},
    )
    by = ["bench", "metric", "implementation", "adapters"]
    return _with_variants(rows.sort_values(by, key=_places))[DATA].reset_index(drop=True)


def profile_data(profiles: Sequence[str | Path]) -> pd.DataFrame:
    """The rows of all files in drawing order; where a bar is in several, as repeats are, their median."""
    medians = read_profiles(profiles, COLUMNS, BAR, "lorafusion training measure")
    medians = medians.sort_values(["bench", "implementation", "adapters", "git_sha", "class"], key=_places)
    named = _with_variants(medians)
    if named.groupby(BAR[:-1])["git_sha"].nunique().max() > 1:  # before and after
        named["variant"] += "\n" + named["git_sha"].str[:10]
    return named.reset_index(drop=True)


def read_profiles(profiles: Sequence[str | Path], columns: Sequence[str], bar: list[str], writer: str) -> pd.DataFrame:
    """The classes of kernels of all files, for each bar and device the median where it is in several; writer: the
    command that writes such files."""
    rows = pd.concat([read_data(path) for path in profiles])
    missing = set(columns) - set(rows.columns)
    if missing or rows.empty:
        what = f"column {min(missing)!r}" if missing else "row"
        raise MeasurementError(f"{', '.join(map(str, profiles))}: no {what}; {writer} writes them")
    _require_one_make(rows)
    rows[["gpu_name", "git_sha"]] = rows[["gpu_name", "git_sha"]].astype(object).fillna("unknown")
    medians = rows.groupby([*bar, "gpu_name", "class"], sort=False)[["milliseconds", "kernels"]].median().reset_index()
    return medians.assign(share=medians["milliseconds"] / medians.groupby(bar)["milliseconds"].transform("sum"))


def _require_one_make(rows: pd.DataFrame) -> None:
    """Raise where a cell was profiled with two configurations or plans, of which a median would be of nothing."""
    made_of = [name for name in ("config_hash", "plan_hash") if name in rows]
    for name in made_of:
        different = rows.groupby(["suite", "cell"])[name].nunique()
        if different.max() > 1:
            cell = different.idxmax()[1]
            raise MeasurementError(f"cell {cell!r}: its profiles differ in {name}; leave out those of older settings")


def _places(column: pd.Series) -> pd.Series:
    customary = {"implementation": list(IMPLEMENTATIONS), "class": ORDER, "metric": list(SHOWN)}.get(column.name)
    return column.map(customary.index) if customary else column


def _with_variants(data: pd.DataFrame) -> pd.DataFrame:
    """Add how a bar is named: its implementation, and the adapters where there are several."""
    counts = ", " + data["adapters"].astype(int).astype(str) + " adapters"
    return data.assign(variant=data["implementation"] + counts.where(data["adapters"] > 1, ""))


def draw_speed(data: pd.DataFrame) -> Figure:
    """A column of panels for each bench: speed above, and memory below where it was measured."""
    benches, variants = list(dict.fromkeys(data["bench"])), _bar_looks(data)
    metrics = [metric for metric in SHOWN if metric in set(data["metric"])]
    with matplotlib.rc_context(style.PARAMETERS):
        figure = Figure(figsize=(style.TEXT_WIDTH, 0.9 + 1.7 * len(metrics)), layout="constrained")
        axes = figure.subplots(len(metrics), len(benches), squeeze=False)
        for row, metric in zip(axes, metrics, strict=True):
            for ax, bench in zip(row, benches, strict=True):
                _draw_bars(ax, data[(data["bench"] == bench) & (data["metric"] == metric)], variants)
            row[0].set_ylabel(SHOWN[metric][0])
        for ax, bench in zip(axes[0], benches, strict=True):
            ax.set_title(bench)
        tokens = ", ".join(str(int(count)) for count in sorted(data["tokens"].unique()))
        handles = [Patch(label=name, **look) for name, look in variants.items()]
        _finish(figure, data, handles, f"Training steps, microbatches of {tokens} tokens")
    return figure


def _bar_looks(data: pd.DataFrame) -> dict[str, dict[str, Any]]:
    """The look of each variant's bars, in drawing order; more adapters of an implementation have another hatch."""
    rows = data[["implementation", "adapters", "variant"]].drop_duplicates()
    out = {}
    for implementation, look in IMPLEMENTATIONS.items():
        here = rows[rows["implementation"] == implementation].sort_values("adapters")
        for level, name in enumerate(here["variant"]):
            hatch = look.hatch or ADAPTER_HATCHES[level % len(ADAPTER_HATCHES)]
            out[name] = {"facecolor": look.colour, "hatch": hatch, "edgecolor": "white", "linewidth": 0.3}
    return out


def _draw_bars(ax: Axes, data: pd.DataFrame, looks: dict[str, dict[str, Any]]) -> None:
    names = [name for name in looks if name in set(data["variant"])]
    for row in data.itertuples():
        x = names.index(row.variant)
        above = {"textcoords": "offset points", "xytext": (0, 2), "ha": "center", "va": "bottom",
                 "fontsize": style.SMALL}  # fmt: skip
        if pd.isna(row.value):
            ax.annotate(style.status_label(row.status), (x, 0), rotation=90, color="#B00000", **above)
            continue
        ax.bar(x, row.value, 0.86, **looks[row.variant])
        top = row.value
        if not pd.isna(row.ci_low):
            top = row.ci_high
            ends = [[row.value - row.ci_low], [row.ci_high - row.value]]
            ax.errorbar(x, row.value, yerr=ends, color="black", linewidth=0.6, capsize=1.5, capthick=0.6)
        ax.annotate(f"{row.value:.0f}" if row.value >= 100 else f"{row.value:#.3g}".rstrip("."), (x, top), **above)
    ax.margins(y=0.12)
    ax.set(xticks=[], xlim=(-0.6, max(len(names), 1) - 0.4))


def draw_profile(data: pd.DataFrame) -> Figure:
    """A panel for each bench, a bar for each implementation, its classes one above the other."""
    return draw_stacks(data, "bench", "ms a microbatch", "What the GPU does in training steps")


def draw_stacks(data: pd.DataFrame, panel: str, unit: str, title: str) -> Figure:
    """A panel for each value of a column, in it a bar for each `variant`, its classes one above the other."""
    names = list(dict.fromkeys(data[panel]))
    bars = [data.loc[data[panel] == name, "variant"].nunique() for name in names]
    with matplotlib.rc_context(style.PARAMETERS):
        figure = Figure(figsize=(style.TEXT_WIDTH, 4.2), layout="constrained")
        axes = figure.subplots(1, len(names), squeeze=False, gridspec_kw={"width_ratios": bars})[0]
        for ax, name in zip(axes, names, strict=True):
            _draw_stacks(ax, data[data[panel] == name])
            ax.set_title(name)
        axes[0].set_ylabel(unit)
        present = set(data["class"])
        handles = [Patch(label=name, **_part_look(name)) for name in CLASSES if name in present]
        _finish(figure, data, handles, title)
    return figure


def _draw_stacks(ax: Axes, data: pd.DataFrame) -> None:
    totals = data.groupby("variant", sort=False)["milliseconds"].sum()
    names, heights = list(totals.index), dict.fromkeys(totals.index, 0.0)
    for row in data.itertuples():
        x, below = names.index(row.variant), heights[row.variant]
        ax.bar(x, row.milliseconds, 0.8, bottom=below, **_part_look(row[data.columns.get_loc("class") + 1]))
        if row.milliseconds >= LABELLED * totals.max():
            frame = {"facecolor": "white", "edgecolor": "none", "pad": 0.8, "alpha": 0.85}
            middle = below + row.milliseconds / 2
            ax.text(x, middle, f"{row.milliseconds:.0f}", ha="center", va="center", fontsize=style.SMALL, bbox=frame)
        heights[row.variant] = below + row.milliseconds
    for x, total in enumerate(totals):
        ax.annotate(f"{total:.0f}", (x, total), (0, 2), textcoords="offset points", ha="center", fontsize=style.SMALL,
                    fontweight="bold")  # fmt: skip
    ax.set_xticks(range(len(names)), [name.replace(", ", ",\n") for name in names], rotation=45, ha="right")


def _part_look(name: str) -> dict[str, Any]:
    look = CLASSES[name]
    return {"facecolor": look.colour, "hatch": look.hatch, "edgecolor": "white", "linewidth": 0.3}


def _finish(figure: Figure, data: pd.DataFrame, handles: list[Patch], title: str) -> None:
    """Legend, title, and a footer with suite, commit and device."""
    names = set(data["gpu_name"].dropna())
    title += "" if names else f" ({style.CPU_WARNING})"
    figure.legend(handles=handles, loc="outside upper center", ncols=min(5, len(handles)), title=title)
    footer = style.origin(data, ", ".join(sorted(names)) or "CPU")
    figure.supxlabel(footer, fontsize=style.SMALL, color="0.35")
