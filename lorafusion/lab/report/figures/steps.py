"""The figure of training steps: tokens per second and peak memory of every implementation."""

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lorafusion.lab.report import drawing, style
from lorafusion.lab.table.table import MeasurementError

SHOWN = {"throughput": ("tokens/s", 1.0), "peak_memory": ("peak memory, GiB", 2.0**-30)}
DATA = ["suite", "bench", "model", "implementation", "adapters", "variant", "metric", "value", "ci_low", "ci_high",
        "status", "tokens", "gpu_name", "git_sha", "git_dirty"]  # fmt: skip


def steps_speed_data(table: pd.DataFrame) -> pd.DataFrame:
    """The medians, in drawing order."""
    rows = table[(table["statistic"] == "median") & table["metric"].isin(SHOWN)]
    rows = rows[rows["cell"].str.startswith("bench~") & rows["implementation"].isin(style.IMPLEMENTATIONS)]
    if rows.empty or rows["value"].isna().all():
        raise MeasurementError("no median throughput of training steps in the table; see lorafusion lab measure --help")
    scale = rows["metric"].map({metric: scale for metric, (_, scale) in SHOWN.items()})
    rows = rows.assign(
        bench=rows["cell"].str.extract("^bench~([^/]+)/")[0],
        variant=style.implementation_variants(rows),
        **{name: rows[name] * scale for name in ("value", "ci_low", "ci_high")},
    )
    # Throughput before memory.
    by = {"bench": True, "metric": False, "implementation": True, "adapters": True}
    return rows.sort_values(list(by), ascending=list(by.values()), key=style.rank)[DATA].reset_index(drop=True)


@drawing.styled
def draw_steps_speed(data: pd.DataFrame) -> Figure:
    """A column of panels for each bench: speed above, and memory below where it was measured."""
    benches = list(dict.fromkeys(data["bench"]))
    looks = style.bar_looks(data)
    metrics = [metric for metric in SHOWN if metric in set(data["metric"])]
    figure = Figure(figsize=(style.TEXT_WIDTH, 0.9 + 1.7 * len(metrics)), layout="constrained")
    axes = figure.subplots(len(metrics), len(benches), squeeze=False)
    for row, metric in zip(axes, metrics, strict=True):
        for ax, bench in zip(row, benches, strict=True):
            _draw_panel(ax, data[(data["bench"] == bench) & (data["metric"] == metric)], looks)
        row[0].set_ylabel(SHOWN[metric][0])
    for ax, bench in zip(axes[0], benches, strict=True):
        ax.set_title(bench)
    tokens = ", ".join(str(int(count)) for count in sorted(data["tokens"].unique()))
    title, cpu = f"Training steps, microbatches of {tokens} tokens", bool(data["gpu_name"].isna().all())
    drawing.finish(figure, drawing.patches(looks), title, style.origin(data), min(5, len(looks)), cpu)
    return figure


def _draw_panel(ax: Axes, data: pd.DataFrame, looks: dict[str, style.Look]) -> None:
    names = [name for name in looks if name in set(data["variant"])]
    places, width = drawing.slots(names, ["bar"])
    for row in data.itertuples():
        drawing.draw_bar(ax, places[row.variant, "bar"], row, width, drawing.fill(looks[row.variant]), numbers=True)
    ax.margins(y=0.12)
    ax.set(xticks=[], xlim=(-0.6, max(len(names), 1) - 0.4))
