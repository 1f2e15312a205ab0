"""What a GPU does with each system, as PDF, PNG and the CSV that it is drawn from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from lorafusion.measure.table import MeasurementError
from lorafusion.report import style
from lorafusion.report.figures import read_data, written
from lorafusion.report.training_figures import CLASSES, draw_stacks, finish, part_look
from lorafusion.tuning import PROFILE_COLUMNS

WHOSE = ["suite", "workload", "qkv", "system", "gpu_name", "git_sha"]


def system_profile(profiles: Sequence[str | Path], out_stem: str | Path) -> list[Path]:
    """Milliseconds for 1000 tokens by class of kernel, from CSVs of `lorafusion profile`: a bar a system, a panel a
    workload."""
    return written(profile_data(profiles), draw, out_stem)


def profile_data(profiles: Sequence[str | Path]) -> pd.DataFrame:
    """The rows of all files in drawing order; of a system that is in several their median."""
    rows = pd.concat([read_data(path) for path in profiles])
    missing = set(PROFILE_COLUMNS) - set(rows.columns)
    if missing or rows.empty:
        what = f"column {min(missing)!r}" if missing else "row"
        raise MeasurementError(f"{', '.join(map(str, profiles))}: no {what}; lorafusion profile writes them")
    rows[["gpu_name", "git_sha"]] = rows[["gpu_name", "git_sha"]].astype(object).fillna("unknown")
    medians = rows.groupby([*WHOSE, "class"], sort=False)[["milliseconds", "kernels"]].median().reset_index()
    medians["share"] = medians["milliseconds"] / medians.groupby(WHOSE)["milliseconds"].transform("sum")
    order = list(CLASSES)
    places = medians["class"].map(order.index)
    medians = medians.assign(place=places).sort_values(["workload", "system", "place"], key=style.rank)
    merged = medians["qkv"].eq("merged").map({True: ", q k v merged", False: ""})
    return medians.assign(variant=medians["system"] + merged).drop(columns="place").reset_index(drop=True)


def draw(data: pd.DataFrame) -> Figure:
    workloads = list(dict.fromkeys(data["workload"]))
    bars = [data.loc[data["workload"] == one, "variant"].nunique() for one in workloads]
    with matplotlib.rc_context(style.PARAMETERS):
        figure = Figure(figsize=(style.TEXT_WIDTH, 4.2), layout="constrained")
        axes = figure.subplots(1, len(workloads), squeeze=False, gridspec_kw={"width_ratios": bars})[0]
        for ax, workload in zip(axes, workloads, strict=True):
            draw_stacks(ax, data[data["workload"] == workload])
            ax.set_title(workload)
        axes[0].set_ylabel("ms for 1000 tokens")
        handles = [Patch(label=name, **part_look(name)) for name in CLASSES if name in set(data["class"])]
        finish(figure, data, handles, "What the GPU does with each system")
    return figure
