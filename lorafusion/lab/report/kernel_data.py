"""What the kernel suite's figures show: rows of the measurement table, as their CSVs have them."""

from __future__ import annotations

import pandas as pd

from lorafusion.core.config import CONFIGS
from lorafusion.lab.table.table import MeasurementError

ORDER = ("frozen", "peft", "peft-bf16", "peft-compiled", "fused", "fused-multi", "canary-gemm", "canary-copy")
RANK, DROPOUT = 16, 0.1
TIME, SAVED, TRAFFIC, TFLOPS = "time over frozen", "saved for backward, GiB", "DRAM traffic, GiB", "TFLOP/s"
COMPUTE, BANDWIDTH = "measured GEMM, TFLOP/s", "measured copy, TB/s"
CANARY_SIZE = 8192  # of the square bf16 matrices that the canaries multiply and copy on a GPU
PUBLISHED_TRAFFIC = CONFIGS.parent / "results" / "paper" / "dram_traffic.csv"
PUBLISHED_NAMES = {"torch-lora": "peft-bf16", "fused-lora": "fused", "fused-multi-lora": "fused-multi"}

POINT = ["kind", "model", "in_features", "out_features", "rank", "dropout", "tokens", "implementation", "adapters"]
DATA = ["suite", *POINT, "variant", "pass", "shown", "value", "ci_low", "ci_high", "n", "status", "flop_per_byte"]
ORIGIN = ["git_sha", "git_dirty", "gpu_name"]


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
        raise MeasurementError(f"the table has no median of {what} with {settings}; see lorafusion kernels --help")


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
    out = []
    for name, (shown, work) in works.items():
        times = rows[(rows["implementation"] == name) & rows["cell"].str.startswith("linear~")].dropna(subset=["value"])
        if times.empty:
            raise MeasurementError(f"the table has no median time of {name} on a GPU; linears measure it")
        fastest = times.sort_values(["value", "suite", "cell"]).head(1)
        out.append(_shown(fastest.assign(value=work / fastest["value"]), shown).assign(ci_low=None, ci_high=None))
    return pd.concat(out)


def _ordered(data: pd.DataFrame) -> pd.DataFrame:
    """The rows in a fixed order, one for each point; raises where two are."""
    by = ["shown", "model", "in_features", "out_features", "tokens", "pass", "implementation", "adapters", "kind"]
    data = data.sort_values(by, key=_places)
    # The suite is no part of it: a point measured in two suites has two numbers.
    twice = data[data.duplicated([*POINT, "pass", "shown"], keep=False)]
    if not twice.empty:
        name, suites = twice["implementation"].iloc[0], ", ".join(sorted(twice["suite"].dropna().unique()))
        raise MeasurementError(f"two numbers for one point of {name} (suites: {suites}); draw from separate tables")
    return _with_variants(data)


def _places(column: pd.Series) -> pd.Series:
    return column.map(ORDER.index) if column.name == "implementation" else column


def _with_variants(data: pd.DataFrame) -> pd.DataFrame:
    """Add how the legend names each point: its implementation, and the adapters where there are several."""
    several = data["adapters"] > 1
    counts = ", " + data["adapters"].fillna(0).astype(int).astype(str) + " adapters"
    return data.assign(variant=data["implementation"] + counts.where(several, ""))
