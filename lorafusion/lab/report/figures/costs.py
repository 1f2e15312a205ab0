"""The figure of cost profiles: each microbatch's time as the costs predict it that fit all others."""

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lorafusion.lab.cost_fit import PASSES, base_costs, left_out, points_of
from lorafusion.lab.report import drawing, style
from lorafusion.lab.report.figures.kernels import MARKERS

ORIGIN = ["suite", "gpu_name", "git_sha", "git_dirty"]


def cost_fit_data(table: pd.DataFrame) -> pd.DataFrame:
    """A row a microbatch: its measured and predicted seconds, both passes together, and what it held."""
    points = points_of(table)
    origin = table[table["cell"] == points.index[0]][ORIGIN].iloc[0]
    on_gpu = bool(pd.notna(origin["gpu_name"]))
    parts = [left_out(part, base_costs(model, on_gpu))
             for (model, _), part in points.groupby(["model", "implementation"])]  # fmt: skip
    data = points[["model", "arm", "adapters", "tokens", "sample", "layers", "stage", "recompute"]]
    data = data.rename(columns={"arm": "implementation"}).assign(
        measured=points[list(PASSES)].sum(axis=1),
        predicted=pd.concat(parts)[list(PASSES)].sum(axis=1),
        **origin.to_dict(),
    )
    data["ratio"] = data["predicted"] / data["measured"]
    for name in ("measured", "predicted", "ratio"):  # with the digits that are the same on every machine
        data[name] = data[name].map("{:.5g}".format).astype(float)
    by = ["model", "implementation", "layers", "stage", "recompute", "adapters", "tokens", "sample"]
    return data.sort_values(by, key=style.rank).reset_index(drop=True)


@drawing.styled
def draw_cost_fit(data: pd.DataFrame) -> Figure:
    """A panel for each model: predicted over measured against the time itself."""
    models = list(dict.fromkeys(data["model"]))
    figure = Figure(figsize=(style.TEXT_WIDTH, 2.9), layout="constrained")
    axes = figure.subplots(1, len(models), squeeze=False, sharey=True)[0]
    for ax, model in zip(axes, models, strict=True):
        _draw_panel(ax, data[data["model"] == model])
        ax.set_title(model)
    axes[0].set_ylabel("predicted over measured time")
    names = dict.fromkeys(data.sort_values("implementation", key=style.rank)["implementation"])
    handles = [drawing.line(name, **_look(name)) for name in names]
    error = (data["ratio"] - 1).abs()
    title = f"Microbatches by the costs that fit all others: error {error.mean():.1%}, at worst {error.max():.1%}"
    drawing.finish(figure, handles, title, style.origin(data), len(handles), bool(data["gpu_name"].isna().all()))
    return figure


def _draw_panel(ax: Axes, data: pd.DataFrame) -> None:
    for name, rows in data.groupby("implementation", sort=False):
        ax.plot(1000 * rows["measured"], rows["ratio"], **_look(name))
    ax.axhline(1, color="black", linewidth=0.6)
    ax.set_xscale("log")
    ax.set_xlabel("measured, ms")


def _look(name: str) -> dict[str, object]:
    return {"marker": MARKERS[name], "color": style.IMPLEMENTATIONS[name].colour, "markersize": 3, "linestyle": "none"}
