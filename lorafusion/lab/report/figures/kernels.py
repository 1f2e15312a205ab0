"""The figures of the kernel suite: time and memory of LoRA linears and layers, DRAM traffic, and the roofline."""

import math
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import LogLocator, NullLocator

from lorafusion.core.config import CONFIGS
from lorafusion.lab.report import drawing, style
from lorafusion.lab.table.table import MeasurementError

RANK, DROPOUT = 16, 0.1
TIME, SAVED, TRAFFIC, TFLOPS = "time over frozen", "saved for backward, GiB", "DRAM traffic, GiB", "TFLOP/s"
COMPUTE, BANDWIDTH = "measured GEMM, TFLOP/s", "measured copy, TB/s"
CANARY_SIZE = 8192  # of the square bf16 matrices that the canaries multiply and copy on a GPU
PUBLISHED_TRAFFIC = CONFIGS.parent / "results" / "paper" / "dram_traffic.csv"
PUBLISHED_NAMES = {"torch-lora": "peft-bf16", "fused-lora": "fused", "fused-multi-lora": "fused-multi"}

POINT = ["kind", "model", "in_features", "out_features", "rank", "dropout", "tokens", "implementation", "adapters"]
DATA = ["suite", *POINT, "variant", "pass", "shown", "value", "ci_low", "ci_high", "n", "status", "flop_per_byte"]
ORIGIN = ["git_sha", "git_dirty", "gpu_name"]
SHAPE_MARKERS = "o^sDvP"
MARKERS = dict(zip(style.IMPLEMENTATIONS, "sv^P<oDX", strict=True))
ADAPTER_DASHES = ("-", "--", ":", "-.")
PASSES = {"forward": "forward", "both": "forward + backward"}
FROZEN_LINE = {"color": style.IMPLEMENTATIONS["frozen"].colour, "linewidth": 1, "linestyle": (0, (4, 2))}
NUMBER_WIDTH = 0.24  # inches that a bar needs for its number above it


def kernel_speed_data(table: pd.DataFrame) -> pd.DataFrame:
    """Time of the square linears over the frozen one's, by tokens."""
    linears = _medians(table, "linear", "overhead")
    linears = linears[(linears["in_features"] == linears["out_features"]).fillna(False)]
    _require(linears, "overhead of a square linear")
    return _ordered(_shown(linears, TIME, offset=1))


def layer_speed_data(table: pd.DataFrame) -> pd.DataFrame:
    """Time of decoder layers over the frozen one's, and what they keep for the backward pass, by model and tokens."""
    times = _medians(table, "layer", "overhead")
    times, saved = times[(times["pass"] == "both").fillna(False)], _medians(table, "layer", "saved_memory")
    _require(times, "overhead of a layer")
    _require(saved, "saved_memory of a layer")
    data = pd.concat([_shown(times, TIME, offset=1), _shown(saved, SAVED, scale=2**-30)])
    return _ordered(data)


def dram_traffic_data(table: pd.DataFrame) -> pd.DataFrame:
    """GiB that a linear's forward and backward pass move, beside the published values for the same shapes."""
    traffic = _medians(table, "traffic", "dram_traffic")
    _require(traffic, "dram_traffic")
    measured = _shown(traffic, TRAFFIC, scale=2**-30)
    return _ordered(pd.concat([measured, _published(measured)]))


def roofline_data(table: pd.DataFrame) -> pd.DataFrame:
    """TFLOP/s of the linears whose traffic was counted over their FLOP per byte, under the measured ceilings."""
    traffic = _medians(table, "traffic", "dram_traffic")
    _require(traffic, "dram_traffic")
    merged = _shown(traffic, TFLOPS)
    on = ["suite", *(name for name in POINT if name != "model"), "pass"]
    for metric in ("tflops", "time"):
        linears = _medians(table, "linear", metric)[[*on, "value"]].rename(columns={"value": metric})
        merged = merged.merge(linears, on=on)
    merged = merged.dropna(subset=["value", "tflops", "time"])
    _require(merged, "tflops and time of the linears whose dram_traffic it has")
    intensity = merged["tflops"] * 1e12 * merged["time"] / merged["value"]
    points = _shown(merged.assign(value=merged["tflops"], flop_per_byte=intensity), TFLOPS)
    points = points.assign(ci_low=None, ci_high=None)
    return _ordered(pd.concat([points, _ceilings(table)]))


def _medians(table: pd.DataFrame, subject: str, metric: str) -> pd.DataFrame:
    rows = table[(table["statistic"] == "median") & (table["metric"] == metric)]
    rows = rows[rows["cell"].str.startswith(f"{subject}~") & ~rows["implementation"].str.startswith("canary")]
    return rows[(rows["rank"] == RANK) & (rows["dropout"] == DROPOUT)]


def _require(rows: pd.DataFrame, what: str) -> None:
    if rows.empty or rows["value"].isna().all():
        settings = f"rank {RANK} and dropout {DROPOUT}"
        raise MeasurementError(f"the table has no median of {what} with {settings}; see lorafusion lab measure --help")


def _shown(rows: pd.DataFrame, shown: str, scale: float = 1, offset: float = 0) -> pd.DataFrame:
    """The rows as a figure's CSV has them, values and intervals as it shows them."""
    bounds = {name: rows[name] * scale + offset for name in ("value", "ci_low", "ci_high")}
    return rows.assign(shown=shown, **bounds).reindex(columns=[*DATA, *ORIGIN])


def _published(measured: pd.DataFrame) -> pd.DataFrame:
    """The paper's values for what the table has, under the names of the implementations that they correspond to."""
    if not PUBLISHED_TRAFFIC.is_file():
        return measured.head(0)
    values = pd.read_csv(PUBLISHED_TRAFFIC).rename(columns={"gib_fwd_bwd": "value"})
    values["implementation"] = values["implementation"].map(PUBLISHED_NAMES)
    points = measured[["tokens", "in_features", "out_features", "rank"]].drop_duplicates()
    values = values.merge(points.astype("int64"), how="inner")
    values = values.assign(kind="published", shown=TRAFFIC, status="ok", **{"pass": "both"})
    return values.reindex(columns=measured.columns).astype(measured.dtypes)


def _ceilings(table: pd.DataFrame) -> pd.DataFrame:
    """What the fastest canaries of a GPU reached."""
    rows = table[(table["statistic"] == "median") & (table["metric"] == "time") & table["gpu_name"].notna()]
    works = {
        "canary-gemm": (COMPUTE, 2 * CANARY_SIZE**3 / 1e12),
        "canary-copy": (BANDWIDTH, 2 * 2 * CANARY_SIZE**2 / 1e12),
    }
    ceilings = []
    for name, (shown, work) in works.items():
        times = rows[(rows["implementation"] == name) & rows["cell"].str.startswith("linear~")].dropna(subset=["value"])
        if times.empty:
            raise MeasurementError(f"the table has no median time of {name} on a GPU; linears measure it")
        fastest = times.sort_values(["value", "suite", "cell"]).head(1)
        ceilings.append(_shown(fastest.assign(value=work / fastest["value"]), shown).assign(ci_low=None, ci_high=None))
    return pd.concat(ceilings)


def _ordered(data: pd.DataFrame) -> pd.DataFrame:
    """The rows in a fixed order, one for each point; raises where two are."""
    by = ["shown", "model", "in_features", "out_features", "tokens", "pass", "implementation", "adapters", "kind"]
    data = data.sort_values(by, key=style.rank)
    # The suite is no part of it: a point measured in two suites has two numbers.
    twice = data[data.duplicated([*POINT, "pass", "shown"], keep=False)]
    if not twice.empty:
        name, suites = twice["implementation"].iloc[0], ", ".join(sorted(twice["suite"].dropna().unique()))
        raise MeasurementError(f"two numbers for one point of {name} (suites: {suites}); draw from separate tables")
    return data.assign(variant=style.implementation_variants(data))


@drawing.styled
def draw_kernel_speed(data: pd.DataFrame) -> Figure:
    """A column of panels per shape, a row per pass."""
    shapes = data[["in_features", "out_features"]].drop_duplicates()
    looks = {
        name: {"color": style.IMPLEMENTATIONS[implementation].colour, "linewidth": 1.2,
               "linestyle": ADAPTER_DASHES[level % len(ADAPTER_DASHES)],
               "marker": MARKERS[implementation], "markersize": 3, "markeredgewidth": 0}
        for name, (implementation, level) in style.implementation_looks(data).items()
    }  # fmt: skip
    passes = [name for name in PASSES if name in set(data["pass"])]
    figure = Figure(figsize=(style.TEXT_WIDTH, 1.1 + 1.6 * len(passes)), layout="constrained")
    axes = figure.subplots(len(passes), len(shapes), sharex=True, sharey="row", squeeze=False)
    for row, name in zip(axes, passes, strict=True):
        for ax, (inputs, outputs) in zip(row, shapes.itertuples(index=False), strict=True):
            _draw_lines(ax, data[(data["pass"] == name) & (data["in_features"] == inputs)], looks)
            if name == passes[0]:
                ax.set_title(f"{inputs:.0f}×{outputs:.0f}")
            if name == passes[-1]:
                ax.set_xlabel("tokens")
        row[0].set_ylabel(TIME)
        if data["value"].max() > 10:
            row[0].set_yscale("log")
            _plain_ticks(row[0].yaxis)
        drawing.write_beside(row[-1], PASSES[name])
    handles = [drawing.line("frozen", **FROZEN_LINE), *(drawing.line(name, **look) for name, look in looks.items())]
    # Long enough that a dash shows on either side of the marker: adapters differ by dashes alone.
    _finish(figure, data, f"LoRA linears, rank {RANK}", handles, handlelength=3.6)
    return figure


def _draw_lines(ax: Axes, data: pd.DataFrame, looks: dict[str, dict]) -> None:
    """A line for each variant, by tokens, with its intervals."""
    ax.axhline(1, **FROZEN_LINE)
    for variant, look in looks.items():
        rows = data[data["variant"] == variant]
        ends = [rows["value"] - rows["ci_low"], rows["ci_high"] - rows["value"]]
        every = max(1, len(rows) // 6)
        ax.errorbar(rows["tokens"], rows["value"], yerr=ends, elinewidth=0.6, markevery=every, **look)


@drawing.styled
def draw_layer_speed(data: pd.DataFrame) -> Figure:
    """A column of panels per model: times over the frozen layer's above, memory below."""
    models = list(data[data["shown"] == SAVED].groupby("model")["value"].max().sort_values().index)  # by size
    figure = Figure(figsize=(style.TEXT_WIDTH, 4.3), layout="constrained")
    axes = figure.subplots(2, len(models), sharex="col", sharey="row", squeeze=False)
    space = 0.85 * style.TEXT_WIDTH / len(models)
    for row, shown in zip(axes, (TIME, SAVED), strict=True):
        for ax, model in zip(row, models, strict=True):
            rows = data[(data["model"] == model) & (data["shown"] == shown)]
            tokens = sorted(data.loc[data["model"] == model, "tokens"].astype(int).unique())
            _draw_bars(ax, rows.assign(group=rows["tokens"].astype(int)), tokens, data, space)
            if shown == TIME:
                ax.axhline(1, **FROZEN_LINE)
                ax.set_title(model)
            else:
                ax.set_xlabel("tokens")
                ax.tick_params(axis="x", labelrotation=45 if space / len(tokens) < 0.4 else 0)
        row[0].set_ylabel(shown)
    _finish(figure, data, f"Decoder layers, rank {RANK}, forward + backward", _bar_handles(data))
    return figure


@drawing.styled
def draw_dram_traffic(data: pd.DataFrame) -> Figure:
    """A group of bars per shape, the published ones hatched."""
    data = data.assign(group=_shapes(data))
    figure = Figure(figsize=(style.TEXT_WIDTH, 2.9), layout="constrained")
    ax = figure.subplots()
    _draw_bars(ax, data, list(data["group"].unique()), data, 0.9 * style.TEXT_WIDTH)
    ax.set_ylabel("GiB")
    tokens = ", ".join(str(int(count)) for count in data["tokens"].unique())
    title = f"DRAM traffic of a LoRA linear, rank {RANK}, {tokens} tokens, forward + backward"
    _finish(figure, data, title, _bar_handles(data))
    return figure


@drawing.styled
def draw_roofline(data: pd.DataFrame) -> Figure:
    """Points under the bandwidth's slope and the matrix product's level, both axes logarithmic."""
    points, ceilings = data[data["shown"] == TFLOPS], data.set_index("shown")["value"]
    compute, bandwidth = float(ceilings[COMPUTE]), float(ceilings[BANDWIDTH])
    points, ridge = points.assign(shape=_shapes(points)), compute / bandwidth
    low, high = min(ridge, points["flop_per_byte"].min()) / 3, max(ridge, points["flop_per_byte"].max()) * 2
    figure = Figure(figsize=(0.75 * style.TEXT_WIDTH, 3.7), layout="constrained")
    ax = figure.subplots()
    ax.set(xscale="log", yscale="log", xlabel="FLOP per byte of DRAM traffic", ylabel="TFLOP/s")
    _draw_ceilings(ax, low, high, compute, bandwidth)
    shapes = {name: SHAPE_MARKERS[place % len(SHAPE_MARKERS)] for place, name in enumerate(points["shape"].unique())}
    looks = style.bar_looks(points)
    for point in points.itertuples():
        dot = {"marker": shapes[point.shape], "markersize": 5, "markeredgecolor": "white", "markeredgewidth": 0.4}
        ax.plot(point.flop_per_byte, point.value, color=looks[point.variant].colour, zorder=3, **dot)
    bottom = min(points["value"].min(), low * bandwidth) / 1.3
    ax.set(xlim=(low, high), ylim=(bottom, max(compute, points["value"].max()) * 1.5))
    _plain_ticks(ax.xaxis)
    _plain_ticks(ax.yaxis)
    handles: list = [Patch(label=name, facecolor=look.colour) for name, look in looks.items()]
    blank = {"linestyle": "none", "markersize": 5, "color": "0.4"}
    handles += [drawing.line(name, marker=marker, **blank) for name, marker in shapes.items()]
    _finish(figure, data, f"Roofline of LoRA linears, rank {RANK}, forward + backward", handles)
    return figure


def _draw_ceilings(ax: Axes, low: float, high: float, compute: float, bandwidth: float) -> None:
    """The slope from `low` on and the level up to `high` FLOP per byte, each with its number."""
    ridge, grey = compute / bandwidth, "0.25"
    ax.plot([low, ridge, high], [low * bandwidth, compute, compute], color=grey, linewidth=1.2)
    text = {"color": grey, "fontsize": style.SMALL, "va": "bottom"}
    place = {"xytext": (-2, 3), "textcoords": "offset points", "ha": "right"}
    ax.annotate(f"GEMM {compute:.3g} TFLOP/s", (high, compute), **place, **text)
    start, slope = 1.15 * low, math.degrees(math.atan(bandwidth))
    angle = {"rotation": slope, "rotation_mode": "anchor", "transform_rotates_text": True}
    ax.text(start, 1.06 * start * bandwidth, f"copy {bandwidth:.3g} TB/s", **text, **angle)


def _shapes(data: pd.DataFrame) -> pd.Series:
    return data["in_features"].astype(int).astype(str) + "×" + data["out_features"].astype(int).astype(str)


def _draw_bars(ax: Axes, data: pd.DataFrame, groups: list, whole: pd.DataFrame, inches: float) -> None:
    """Bars of `data`'s groups on a panel that is `inches` wide, with numbers above them where they have the room.
    whole: the data of all panels, whose variants look the same in each."""
    looks = style.bar_looks(whole)
    present = set(zip(data["variant"], data["kind"], strict=True))
    series = [(name, kind) for name in looks for kind in ("measured", "published") if (name, kind) in present]
    places, width = drawing.slots(groups, series)
    bar_inches = width * inches / len(groups)
    numbers, size = bar_inches > NUMBER_WIDTH, min(style.SMALL, max(4.5, 72 * bar_inches))
    ax.margins(y=0.12 if numbers else 0.05)
    for row in data.itertuples():
        x = places[row.group, (row.variant, row.kind)]
        drawing.draw_bar(ax, x, row, width, drawing.fill(looks[row.variant], row.kind), numbers, size)
    ax.set(xticks=range(len(groups)), xticklabels=groups, xlim=(-0.55, len(groups) - 0.45))


def _bar_handles(data: pd.DataFrame) -> list[Patch]:
    measured = set(data["variant"][data["kind"] == "measured"])
    handles = drawing.patches({name: look for name, look in style.bar_looks(data).items() if name in measured})
    if (data["kind"] == "published").any():
        handles.append(Patch(label="published", **drawing.fill(style.Look("0.3", ""), "published")))
    return handles


def _plain_ticks(axis: Axis) -> None:
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.set_minor_locator(NullLocator())


def _finish(figure: Figure, data: pd.DataFrame, title: str, handles: list, **legend: Any) -> None:
    """Legend, title, and a footer with suite, commit and device. legend: of `Figure.legend`."""
    measured = data[data["kind"] == "measured"]
    failed = int((measured["status"] != "ok").sum())
    footer = f"{style.origin(measured)}\nmedian of the processes"
    footer += f"; {failed} failed {'points have' if failed > 1 else 'point has'} no value" if failed else ""
    footer += "; published: the paper's, Torch LoRA beside peft-bf16" if (data["kind"] == "published").any() else ""
    columns = len(handles) if len(handles) < 6 else math.ceil(len(handles) / 2)
    drawing.finish(figure, handles, title, footer, columns, bool(measured["gpu_name"].isna().any()), **legend)
