"""What a GPU's time goes into, by class of kernel: in training steps, and with each system."""

from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lorafusion.lab.report import drawing, style
from lorafusion.lab.table.reading import require_numbers
from lorafusion.lab.table.table import MeasurementError

STEPS_BAR = ["suite", "bench", "implementation", "adapters", "git_sha"]
SYSTEMS_BAR = ["suite", "workload", "qkv", "system", "git_sha"]
LABELLED = 0.042  # of a panel's highest bar, from which on a part has its number in it


def steps_profile_data(profiles: Sequence[str | Path]) -> pd.DataFrame:
    """The rows of all files of training steps in drawing order; where a bar is in several, as repeats are, their
    median."""
    medians = _medians(profiles, STEPS_BAR, "a step training_bench")
    medians = medians.sort_values(["bench", "implementation", "adapters", "git_sha", "class"], key=style.rank)
    medians["variant"] = style.implementation_variants(medians)
    if medians.groupby(STEPS_BAR[:-1])["git_sha"].nunique().max() > 1:  # before and after
        medians["variant"] += "\n" + medians["git_sha"].str[:10]
    return medians.reset_index(drop=True)


def system_profile_data(profiles: Sequence[str | Path]) -> pd.DataFrame:
    """The rows of all files of cells in drawing order; of a system that is in several their median."""
    medians = _medians(profiles, SYSTEMS_BAR, "a step profile")
    medians = medians.sort_values(["workload", "system", "qkv", "class"], key=style.rank)
    return medians.assign(variant=style.system_variants(medians)).reset_index(drop=True)


def _medians(profiles: Sequence[str | Path], bar: list[str], writer: str) -> pd.DataFrame:
    """The classes of kernels of all files, for each bar and device the median where it is in several; writer: the
    command that writes such files."""
    rows = pd.concat([drawing.read_data(path) for path in profiles])
    missing = {*bar, "gpu_name", "class", "milliseconds", "kernels"} - set(rows.columns)
    if missing or rows.empty:
        what = f"column {min(missing)!r}" if missing else "row"
        raise MeasurementError(f"{', '.join(map(str, profiles))}: no {what}; {writer} writes them")
    require_numbers(rows, ("milliseconds", "kernels"), ", ".join(map(str, profiles)))
    _require_same_settings(rows)
    rows[["gpu_name", "git_sha"]] = rows[["gpu_name", "git_sha"]].astype(object).fillna("unknown")
    medians = rows.groupby([*bar, "gpu_name", "class"], sort=False)[["milliseconds", "kernels"]].median().reset_index()
    return medians.assign(share=medians["milliseconds"] / medians.groupby(bar)["milliseconds"].transform("sum"))


def _require_same_settings(rows: pd.DataFrame) -> None:
    """Raise where a cell was profiled with two configurations or plans, of which a median would be of nothing."""
    for name in ("config_hash", "plan_hash"):
        if name in rows:
            different = rows.groupby(["suite", "cell"])[name].nunique()
            if different.max() > 1:
                cell = different.idxmax()[1]
                raise MeasurementError(
                    f"cell {cell!r}: its profiles differ in {name}; leave out those of older settings"
                )


def draw_steps_profile(data: pd.DataFrame) -> Figure:
    """A panel for each bench, a bar for each implementation, its classes one above the other."""
    return _draw(data, "bench", "ms a microbatch", "What the GPU does in training steps")


def draw_system_profile(data: pd.DataFrame) -> Figure:
    """A panel for each workload, a bar for each system, its classes one above the other."""
    return _draw(data, "workload", "ms for 1000 tokens", "What the GPU does with each system")


@drawing.styled
def _draw(data: pd.DataFrame, panel: str, unit: str, title: str) -> Figure:
    """A panel for each value of a column, in it a bar for each `variant`."""
    panels = dict(list(data.groupby(panel, sort=False)))
    bars = [rows["variant"].nunique() for rows in panels.values()]
    figure = Figure(figsize=(style.TEXT_WIDTH, 4.2), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False, gridspec_kw={"width_ratios": bars})[0]
    for ax, (name, rows) in zip(axes, panels.items(), strict=True):
        _draw_panel(ax, rows)
        ax.set_title(name)
    axes[0].set_ylabel(unit)
    handles = drawing.patches({name: look for name, look in style.CLASSES.items() if name in set(data["class"])})
    drawing.finish(figure, handles, title, style.origin(data), min(5, len(handles)))
    return figure


def _draw_panel(ax: Axes, data: pd.DataFrame) -> None:
    totals = data.groupby("variant", sort=False)["milliseconds"].sum()
    names, heights = list(totals.index), dict.fromkeys(totals.index, 0.0)
    middle = {"ha": "center", "va": "center", "fontsize": style.SMALL}
    for row in data.rename(columns={"class": "part"}).itertuples():
        x, below = names.index(row.variant), heights[row.variant]
        ax.bar(x, row.milliseconds, 0.8, bottom=below, **drawing.fill(style.CLASSES[row.part]))
        if row.milliseconds >= LABELLED * totals.max():
            frame = {"facecolor": "white", "edgecolor": "none", "pad": 0.8, "alpha": 0.85}
            ax.text(x, below + row.milliseconds / 2, f"{row.milliseconds:.0f}", bbox=frame, **middle)
        heights[row.variant] = below + row.milliseconds
    above = {"textcoords": "offset points", "ha": "center", "fontsize": style.SMALL, "fontweight": "bold"}
    for x, total in enumerate(totals):
        ax.annotate(f"{total:.0f}", (x, total), (0, 2), **above)
    ax.set_xticks(range(len(names)), [name.replace(", ", ",\n") for name in names], rotation=45, ha="right")
