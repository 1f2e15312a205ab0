"""From the table of the experiment `costs` to a profile: non-negative least squares of relative errors.

All of a model's microbatches in an implementation are fitted together, whatever stage they were measured on. Times of
the forward pass are sums of what tokens, samples, adapters and microbatches cost. Those of the backward pass are
multiples of these parts, and the forward once more where it was recomputed. No part can be negative, so more work never
costs less. A pass in which the device waited for its host says nothing about the device, and is left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import yaml
from scipy.optimize import nnls

from lorafusion.core.config import read_model
from lorafusion.core.files import write
from lorafusion.lab.table.table import MeasurementError, read
from lorafusion.planning.simulator.costs import CPU, H200, LayerCosts
from lorafusion.planning.simulator.profile import CostFit, CostProfile, dimensions_of

HOST_BOUND = 1.1  # a pass that took less than so many times its host's time may have waited for it
# What plans call an implementation (`SystemConfig.implementation`), if that is something else. One adapter or several,
# by the same operation, are fitted together.
KINDS = {"fused-multi": "fused", "peft": "peft-wide", "peft-bf16": "peft"}
ORIGIN = ("suite", "git_sha", "torch", "triton", "cuda", "driver")  # columns that the profile repeats
PASSES = ("forward", "backward")
LEAST = 1e-15  # seconds of a token: a cost model without any would say that work takes no time


def points_of(table: pd.DataFrame) -> pd.DataFrame:
    """A row for each microbatch that was measured: what it holds, and its seconds by metric and pass, as medians over
    the repeats. Raises `MeasurementError` where there is none."""
    rows = table[(table["statistic"] == "single") & table["cell"].str.contains("/tokens~") & (table["status"] == "ok")]
    if rows.empty:
        raise MeasurementError("no times of stages in the table; see lorafusion lab profile-costs --help")
    name = rows["metric"] + rows["pass"].radd("_").fillna("")
    values = rows.assign(name=name).pivot_table(index="cell", columns="name", values="value", aggfunc="median")
    values = values.rename(columns={f"time_{which}": which for which in PASSES}).astype(float)
    for missing in {"host_time_forward", "host_time_backward", "step_time", "saved_memory"} - set(values.columns):
        values[missing] = np.nan
    parts = [dict(part.split("~", 1) for part in cell.split("/")) for cell in values.index]
    place = pd.DataFrame(parts, index=values.index)
    numbers = place[["layers", "adapters", "tokens", "sample"]].astype(int)
    index, count = (place["stage"].str.split("-of-").str[which].astype(int) for which in (0, 1))
    model = rows.groupby("cell")["model"].first()
    return values.join(numbers).assign(
        model=model, implementation=place["implementation"].replace(KINDS), arm=place["implementation"],
        is_last=index == count - 1, stage=place["stage"], recompute=place["recompute"] == "all",
        squares=numbers["tokens"] * numbers["sample"],
    )  # fmt: skip


def fitted(points: pd.DataFrame, tile: int) -> LayerCosts:
    """The costs that fit points of a model and an implementation best."""
    layers, more = points["layers"], np.maximum(points["adapters"] - 1, 0)
    rows = -(-points["tokens"] // tile) * tile
    forward = {"token": layers * rows, "square": layers * points["squares"], "fixed": layers, "adapter": layers * more,
               "head": points["is_last"] * points["tokens"], "microbatch": 0 * layers + 1}  # fmt: skip
    costs = _least_squares(forward, points["forward"], ~_waits(points, "forward"))
    costs["token"] = max(costs["token"], LEAST)
    parts = {name: costs[name] * column for name, column in forward.items()}
    dense, fixed = parts["token"] + parts["head"], parts["fixed"] + parts["adapter"] + parts["microbatch"]
    again = (sum(parts.values()) - parts["head"] - parts["microbatch"]) * points["recompute"]
    ratios = _least_squares({"backward": dense, "attention_backward": parts["square"], "fixed_backward": fixed},
                            points["backward"] - again, ~_waits(points, "backward"))  # fmt: skip
    ratios = {name: max(ratio, LEAST) for name, ratio in ratios.items()}
    return LayerCosts(tile=tile, **costs, **ratios, **_host(points), **_step(points))


def _least_squares(columns: dict[str, pd.Series], seconds: pd.Series, chosen: pd.Series) -> dict[str, float]:
    """What each column costs, none less than nothing, such that the squares of relative errors are least."""
    chosen = chosen & (seconds > 0)
    if not chosen.any():
        return dict.fromkeys(columns, 0.0)
    matrix = np.column_stack([column[chosen] for column in columns.values()]).astype(float)
    matrix /= seconds[chosen].to_numpy()[:, None]
    scales = np.where(np.abs(matrix).max(axis=0) > 0, np.abs(matrix).max(axis=0), 1.0)
    values, _ = nnls(matrix / scales, np.ones(len(matrix)))
    return dict(zip(columns, (values / scales).tolist(), strict=True))


def _waits(points: pd.DataFrame, which: str) -> pd.Series:
    """May the device have waited for its host?"""
    return (points[which] < HOST_BOUND * points[f"host_time_{which}"]).fillna(False)


def _host(points: pd.DataFrame) -> dict[str, float]:
    """What the host takes: by the microbatches of fewest tokens on each stage, for which its queue cannot fill up."""
    points = points[points["host_time_forward"].notna()]
    if points.empty:
        return {}
    fewest = points.groupby(["layers", "stage", "arm", "adapters", "recompute"])["tokens"].transform("min")
    points = points[points["tokens"] == fewest]
    layers = points["layers"]
    columns = {"host": layers, "host_adapter": layers * np.maximum(points["adapters"] - 1, 0),
               "host_microbatch": 0 * layers + 1}  # fmt: skip
    costs = _least_squares(columns, points["host_time_forward"], points["host_time_forward"] > 0)
    of_layers = costs["host"] * columns["host"] + costs["host_adapter"] * columns["host_adapter"]
    backward = points["host_time_backward"] - of_layers * points["recompute"]
    ratio = _least_squares({"host_backward": of_layers + costs["host_microbatch"]}, backward, backward > 0)
    return costs | ratio


def _step(points: pd.DataFrame) -> dict[str, float]:
    """Of an adapter's optimizer step, for a layer."""
    stepping = points["step_time"].notna() & (points["adapters"] > 0)
    return _least_squares({"step": points["layers"] * points["adapters"]}, points["step_time"], stepping)


def _saved(points: pd.DataFrame) -> float:
    """Bytes that a layer keeps of a token, where it keeps all and no head is in the way."""
    whole = points["saved_memory"].notna() & ~points["recompute"] & ~points["is_last"]
    return _least_squares({"byte": points["layers"] * points["tokens"]}, points["saved_memory"], whole)["byte"]


def predicted(costs: LayerCosts, points: pd.DataFrame) -> pd.DataFrame:
    """Seconds of the passes of each point by some costs."""
    tokens, squares, adapters = (points[name].to_numpy(float) for name in ("tokens", "squares", "adapters"))
    layers, again = points["layers"].to_numpy(float), points["recompute"].to_numpy(bool)
    out = {}
    for recompute in (False, True):
        model = costs.model_copy(update={"checkpointing": recompute})
        parts = (model.layer(tokens, squares, adapters), model.ends(tokens, points["is_last"].to_numpy(float)),
                 model.host_time(tokens, adapters), model.host_besides(tokens))  # fmt: skip
        out[recompute] = [np.maximum(layers * layer + ends, layers * host + besides)
                          for layer, ends, host, besides in zip(*parts, strict=True)]  # fmt: skip
    return pd.DataFrame({name: np.where(again, out[True][i], out[False][i]) for i, name in enumerate(PASSES)},
                        index=points.index)  # fmt: skip


def left_out(points: pd.DataFrame, tile: int) -> pd.DataFrame:
    """Seconds of the passes of each point, by the costs that fit all others."""
    parts = [predicted(fitted(points.drop(cell), tile), points.loc[[cell]]) for cell in points.index]
    return pd.concat(parts) if len(points) > 1 else predicted(fitted(points, tile), points)


def profile_of(table: pd.DataFrame) -> CostProfile:
    """The profile of a table of the experiment `costs`."""
    points = points_of(table)
    origin = table[table["cell"] == points.index[0]].iloc[0]
    is_gpu = pd.notna(origin["gpu_name"])
    tile, fits = (H200 if is_gpu else CPU).tile, []
    link = _link(table)
    for (model, implementation), of_fit in points.groupby(["model", "implementation"]):
        config, errors = read_model(str(model)), relative_errors(of_fit, left_out(of_fit, tile))
        itemsize = 4 if origin["dtype"] == "float32" else 2
        transfer = {"latency": link[0], "transfer": link[1] * config.hidden_size * itemsize}
        costs = fitted(of_fit, tile).model_copy(update=transfer)
        fits.append(CostFit(model=str(model), dimensions=dimensions_of(config), implementation=str(implementation),
                            costs=costs, points=len(of_fit), mean_error=errors.mean(), worst_error=errors.max(),
                            saved_bytes=_saved(of_fit)))  # fmt: skip
    made_from = {name: None if pd.isna(origin[name]) else str(origin[name]) for name in ORIGIN}
    return CostProfile(device="cuda" if is_gpu else "cpu", gpu_name=origin["gpu_name"] if is_gpu else None,
                       dtype=origin["dtype"], made_from=made_from, fits=tuple(fits))  # fmt: skip


def relative_errors(points: pd.DataFrame, predictions: pd.DataFrame) -> pd.Series:
    """Of both passes together."""
    measured = points[list(PASSES)].sum(axis=1)
    return (predictions[list(PASSES)].sum(axis=1) / measured - 1).abs()


def _link(table: pd.DataFrame) -> tuple[float, float]:
    """Seconds of a message, and of a byte of it; of an H200's links where none was measured."""
    rows = table[(table["metric"] == "transfer_time") & (table["status"] == "ok") & (table["statistic"] == "single")]
    if rows.empty:
        return 10e-6, 1 / H200.bandwidth
    seconds = rows["value"].astype(float)
    sizes = rows["cell"].str.extract("/bytes~([0-9]+)")[0].astype(float)
    costs = _least_squares({"latency": 0 * sizes + 1, "byte": sizes}, seconds, seconds > 0)
    return costs["latency"], costs["byte"]


def fit_tables(tables: Sequence[Path], out: Path) -> str:
    """Write the profile of some tables, those of links among them; returns its errors in a line."""
    profile = profile_of(pd.concat([read(path) for path in tables], ignore_index=True))
    content = profile.model_dump(mode="json", exclude_defaults=True) | {"version": profile.version}
    write(out, yaml.safe_dump(content, sort_keys=False, width=120))
    return ", ".join(f"{fit.model} {fit.implementation}: {fit.points} points, error {fit.mean_error:.1%}, at worst "
                     f"{fit.worst_error:.1%}" for fit in profile.fits)  # fmt: skip
