"""Which capacities were tried for each system, how fast they were, and which was taken: PDF, PNG, and the CSV of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from lorafusion.report import style
from lorafusion.report.figures import written
from lorafusion.tuning import Tuned

PARTS = ("model", "workload", "gpus", "batch", "qkv")  # of a cell's name, beside its system
SLOWEST = 0.5  # of a system's fastest capacity, from which on the colour is the palest
SHADES = LinearSegmentedColormap.from_list("shades", ["#FFFFFF", style.SYSTEMS["lorafusion"].colour])
ROW_HEIGHT = 0.17  # inches


def tunings(files: Sequence[str | Path], out_stem: str | Path) -> list[Path]:
    """A panel a workload: a row a system, a column a capacity, tokens a second of the first global batches; from files
    of `lorafusion tune`."""
    return written(tunings_data(files), draw, out_stem)


def tunings_data(files: Sequence[str | Path]) -> pd.DataFrame:
    """A row a trial, in drawing order; ratio: of the throughput to the largest of the system on the workload."""
    rows = []
    for tuned in map(Tuned.read, files):
        named = dict(part.split("~", 1) for part in tuned.cell.split("/"))
        whose = {key: named.get(key, "separate") for key in PARTS}
        origin = tuned.model_dump(include={"suite", "gpu_name", "git_sha", "git_dirty"})
        for trial in tuned.trials:
            rows.append(whose | {"system": tuned.system} | trial.model_dump()
                        | {"taken": trial.capacity == tuned.capacity} | origin)  # fmt: skip
    data = pd.DataFrame(rows)
    data["ratio"] = data["throughput"] / data.groupby([*PARTS, "system"])["throughput"].transform("max")
    data["panel"] = _named(data, ("workload", "model"), "{workload}, {model}")
    merged = data["qkv"].eq("merged").map({True: ", q k v merged", False: ""})
    data["variant"] = _named(data, ("system", "gpus", "batch"), "{system}, GPUs {gpus}, batch {batch}") + merged
    order = ["model", "workload", "system", "qkv", "gpus", "batch", "capacity"]
    return data.sort_values(order, key=style.rank).reset_index(drop=True)


def _named(data: pd.DataFrame, keys: tuple[str, ...], form: str) -> pd.Series:
    """By the first key, and by the others too where they have several values."""
    whole = any(data[key].nunique() > 1 for key in keys[1:])
    return data.apply(lambda row: form.format(**row), axis=1) if whole else data[keys[0]]


def draw(data: pd.DataFrame) -> Figure:
    panels, rows = list(dict.fromkeys(data["panel"])), list(dict.fromkeys(data["variant"]))
    rows.sort(key=lambda name: list(style.looks(data["system"])).index(name.partition(",")[0]))
    capacities = sorted(data["capacity"].unique())
    with matplotlib.rc_context(style.PARAMETERS | {"axes.grid": False}):
        figure = Figure(figsize=(style.TEXT_WIDTH, 1.3 + ROW_HEIGHT * len(rows)), layout="constrained")
        axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        for ax, panel in zip(axes, panels, strict=True):
            _draw_panel(ax, data[data["panel"] == panel], rows, capacities)
            ax.set_title(panel)
        axes[0].set_yticks(range(len(rows)), rows)
        axes[0].set_ylim(len(rows) - 0.5, -0.5)
        figure.suptitle(
            "Capacities that were tried: 1000 tokens/s; in a frame, the one taken", fontsize=style.FONT_SIZE
        )
        axes[len(axes) // 2].set_xlabel("tokens that a microbatch may hold")
        figure.supxlabel(_footer(data), fontsize=style.SMALL, color="0.35")
    return figure


def _draw_panel(ax: Axes, data: pd.DataFrame, rows: list[str], capacities: list[int]) -> None:
    for trial in data.itertuples():
        x, y = capacities.index(trial.capacity), rows.index(trial.variant)
        shade, text = 0.0, style.status_label(trial.status)
        if trial.status == "ok":
            shade, text = max(0.0, (trial.ratio - SLOWEST) / (1 - SLOWEST)), f"{trial.throughput / 1000:.1f}"
        ax.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, facecolor=SHADES(0.75 * shade), edgecolor="none"))
        ax.text(x, y, text, ha="center", va="center", fontsize=style.SMALL - 0.5)
        if trial.taken:
            ax.add_patch(Rectangle((x - 0.46, y - 0.42), 0.92, 0.84, facecolor="none", edgecolor="black", zorder=3))
    ax.set_xlim(-0.5, len(capacities) - 0.5)
    ax.set_xticks(range(len(capacities)), [f"{one:,}" for one in capacities], rotation=45, ha="right")
    ax.tick_params(axis="y", length=0)


def _footer(data: pd.DataFrame) -> str:
    devices = ", ".join(sorted(data["gpu_name"].dropna().unique())) or style.CPU_WARNING
    commits = ", ".join(sorted(str(commit)[:10] for commit in data["git_sha"].dropna().unique())) or "unknown"
    dirty = " with local changes" if data["git_dirty"].eq(True).any() else ""
    return f"suite {', '.join(sorted(data['suite'].unique()))} · commit {commits}{dirty} · {devices}"
