"""The figure of tunings: which capacities were tried for each system, how fast they were, and which was taken."""

from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from lorafusion.lab.keys import require_one_workload
from lorafusion.lab.report import drawing, style
from lorafusion.lab.table.table import MeasurementError
from lorafusion.lab.tuned import Tuned

BAR = ["workload", "system", "qkv", "gpus", "batch"]  # what a row of a panel is for, within a model
SLOWEST = 0.5  # of a row's fastest capacity, from which on the colour is the palest
SHADES = LinearSegmentedColormap.from_list("shades", ["#FFFFFF", style.SYSTEMS["lorafusion"].colour])
ROW_HEIGHT, PANEL_HEIGHT = 0.17, 0.75  # inches: of a row, and of what a panel has above and below its rows
LABEL_WIDTH, COLUMN_WIDTH = 1.4, 0.28  # inches: of the systems' names, and of a column at least


def tunings_data(files: Sequence[str | Path], model: str) -> pd.DataFrame:
    """A row a trial of the files of tuned cells, in drawing order; ratio: of the throughput to the largest of its
    row of the figure. Raises `MeasurementError` where none is of the model."""
    rows, tunings = [], [(path, Tuned.read(path)) for path in files]
    require_one_workload((path, tuned.suite, tuned.cell, tuned.workload_hash) for path, tuned in tunings)
    _require_one_each(tunings)
    for _, tuned in tunings:
        place = {"qkv": "separate"} | dict(part.split("~", 1) for part in tuned.cell.split("/"))
        if place["model"] != model:
            continue
        origin = tuned.model_dump(include={"suite", "gpu_name", "git_sha", "git_dirty"})
        for trial in tuned.trials:
            rows.append(place | trial.model_dump() | {"taken": trial.capacity == tuned.capacity} | origin)
    if not rows:
        raise MeasurementError(f"no tuning of a cell of {model} in {', '.join(map(str, files))}")
    data = pd.DataFrame(rows).astype({"gpus": int, "batch": int})
    data["ratio"] = data["throughput"] / data.groupby(BAR)["throughput"].transform("max")
    data["variant"] = style.system_variants(data)
    for key, text in (("gpus", " GPUs"), ("batch", " a batch")):
        if data[key].nunique() > 1:
            data["variant"] += ", " + data[key].astype(str) + text
    order = ["system", "qkv", "gpus", "batch", "workload", "capacity"]
    return data.sort_values(order, key=style.rank).reset_index(drop=True)


def _require_one_each(tunings: list[tuple[str | Path, Tuned]]) -> None:
    """Raise where a cell of a suite is there twice, as in files of an older suite and of this one."""
    first: dict[tuple[str, str], str | Path] = {}
    for path, tuned in tunings:
        other = first.setdefault((tuned.suite, tuned.cell), path)
        if other != path:
            raise MeasurementError(f"{path}: a tuning of cell {tuned.cell}, of which {other} is one too")


@drawing.styled
def draw_tunings(data: pd.DataFrame) -> Figure:
    """A panel a workload: a row a system, a column a capacity, tokens a second of the first global batches."""
    panels = sorted(set(data["workload"]), key=lambda name: style.rank(pd.Series([name], name="workload"))[0])
    capacities, most_rows = sorted(data["capacity"].unique()), data.groupby("workload")["variant"].nunique().max()
    fit = int(style.TEXT_WIDTH / (LABEL_WIDTH + COLUMN_WIDTH * (len(capacities) + 0.5)))
    columns = min(len(panels), max(1, fit))
    lines = -(-len(panels) // columns)
    height = 0.5 + lines * (PANEL_HEIGHT + ROW_HEIGHT * most_rows)
    figure = Figure(figsize=(style.TEXT_WIDTH, height), layout="constrained")
    axes = figure.subplots(lines, columns, sharex=True, squeeze=False)
    for ax, panel in zip(axes.flat, panels, strict=False):
        _draw_panel(ax, data[data["workload"] == panel], capacities)
        ax.set_title(panel)
        ax.tick_params(labelbottom=True)
    for ax in axes.flat[len(panels) :]:
        ax.set_axis_off()
    (model,) = set(data["model"])
    title = f"{model}: capacities that were tried, 1000 tokens/s; framed: the one taken"
    figure.suptitle(title, fontsize=style.FONT_SIZE)
    device = style.CPU_WARNING if data["gpu_name"].isna().all() else ""
    blank = "tokens that a microbatch may hold; blank: the plan of a smaller one, or not tried"
    drawing.write_footer(figure, f"{blank}\n{style.origin(data, device)}")
    return figure


def _draw_panel(ax: Axes, data: pd.DataFrame, capacities: list[int]) -> None:
    rows = list(dict.fromkeys(data["variant"]))
    for trial in data.itertuples():
        x, y = capacities.index(trial.capacity), rows.index(trial.variant)
        shade, text = 0.0, style.status_label(trial.status)
        if trial.status == "ok":
            shade, text = max(0.0, (trial.ratio - SLOWEST) / (1 - SLOWEST)), f"{trial.throughput / 1000:.1f}"
        ax.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, facecolor=SHADES(0.75 * shade), edgecolor="none"))
        ax.text(x, y, text, ha="center", va="center", fontsize=style.SMALL - 0.5)
        if trial.taken and trial.status == "ok":
            ax.add_patch(Rectangle((x - 0.46, y - 0.42), 0.92, 0.84, facecolor="none", edgecolor="black", zorder=3))
    ax.set_xlim(-0.5, len(capacities) - 0.5)
    ax.set_ylim(len(rows) - 0.5, -0.5)
    ax.grid(visible=False)
    ax.set_xticks(range(len(capacities)), [f"{capacity:,}" for capacity in capacities], rotation=90)
    ax.set_yticks(range(len(rows)), rows)
    ax.tick_params(axis="y", length=0)
