"""Fits of the table of the experiment `costs`, for a profile: non-negative least squares of relative errors.

All of a model's microbatches in an implementation are fitted together, whatever stage they were measured on. Times of
the forward pass are sums of what tokens, samples, adapters and microbatches cost. Those of the backward pass are
multiples of these parts, and the forward once more where it was recomputed. No part can be negative, so more work never
costs less. A pass in which the device waited for its host says nothing about the device, and is left out.
"""

import numpy as np
import pandas as pd
from scipy.optimize import nnls

from lorafusion.core.config import read_model
from lorafusion.lab.table.table import MeasurementError
from lorafusion.planning.simulator.costs import CPU, H200, LEAST_TOKEN, LayerCosts, model_costs

HOST_BOUND = 1.5  # a pass that takes less than so many times its host's time may have waited for it
TURNS = 5
# What plans call an implementation (`SystemConfig.implementation`), if that is something else. One adapter or several,
# by the same operation, are fitted together.
KINDS = {"fused-multi": "fused", "peft": "peft-wide", "peft-bf16": "peft"}
PASSES = ("forward", "backward")
FEW_TOKENS = 2048
DISTINCT = 3  # numbers of tokens, from which on what each microbatch takes besides is fitted
SMALL = 0.02  # of a pass, below which a part of it is not looked at in the other


def points_of(table: pd.DataFrame) -> pd.DataFrame:
    """A row for each microbatch that was measured: what it holds, and its seconds by metric and pass, as medians over
    the repeats. Raises `MeasurementError` where there is none."""
    rows = table[(table["statistic"] == "single") & table["cell"].str.contains("/implementation~.*/tokens~")]
    rows = rows[rows["status"] == "ok"]
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


def fitted(points: pd.DataFrame, base: LayerCosts) -> LayerCosts:
    """The costs that fit points of a model and an implementation best. base: of the model's FLOP, of which the tile is
    taken, and the costs of attention where all samples are of one length.

    In which passes a device waited for its host follows from both, so they are fitted in turns: at first by the larger
    half of the microbatches.
    """
    host, step = _host(points), _step(points)
    if not host:  # a CPU does what follows a pass itself
        points = points.assign(
            backward=points["backward"] + step.pop("after") + points["layers"] * step.pop("after_layer")
        )
    waiting = predicted(LayerCosts(token=LEAST_TOKEN, **host), points)
    large = points["tokens"] >= points["tokens"].median()
    chosen = {which: large for which in PASSES}
    for _ in range(TURNS):
        device = _device(points, base, chosen)
        alone = predicted(device, points)
        chosen = {which: alone[which] > HOST_BOUND * waiting[which] for which in PASSES}
        if not all(choice.any() for choice in chosen.values()):
            break
    return device.model_copy(update=host | step)


def _device(points: pd.DataFrame, base: LayerCosts, chosen: dict[str, pd.Series]) -> LayerCosts:
    """The costs of the device alone. chosen: by pass, the points in which it was the slower one."""
    columns, of_forward = _columns(points, base.tile), points[chosen["forward"]]
    if of_forward["tokens"].nunique() < DISTINCT:  # else nothing tells them from a token's
        columns = {name: column for name, column in columns.items() if name not in ("fixed", "microbatch")}
    same_lengths = of_forward["sample"].nunique() < 2
    square = columns.pop("square") if same_lengths else None
    attention = 0 * points["layers"] if square is None else base.square * square
    costs = least_squares(columns, points["forward"] - attention, chosen["forward"])
    costs["token"] = max(costs["token"], LEAST_TOKEN)
    costs["square"] = base.square if same_lengths else costs["square"]
    model = LayerCosts(tile=base.tile, attention_backward=base.attention_backward, **costs)
    return model.model_copy(update=_ratios(points, model, chosen["backward"], same_lengths))


def _columns(points: pd.DataFrame, tile: int) -> dict[str, pd.Series]:
    """How much each point has of what costs something in the forward pass."""
    layers = points["layers"]
    return {"token": layers * (-(-points["tokens"] // tile) * tile), "square": layers * points["squares"],
            "fixed": layers, "adapter": layers * np.maximum(points["adapters"] - 1, 0),
            "head": points["is_last"] * points["tokens"], "microbatch": 0 * layers + 1}  # fmt: skip


def _ratios(points: pd.DataFrame, model: LayerCosts, chosen: pd.Series, same_lengths: bool) -> dict[str, float]:
    """The backward pass over the forward pass of each kind of cost."""
    parts = {name: getattr(model, name) * column for name, column in _columns(points, model.tile).items()}
    fixed = parts["fixed"] + parts["adapter"] + parts["microbatch"]
    again = (parts["token"] + parts["square"] + parts["fixed"] + parts["adapter"]) * points["recompute"]
    columns = {"backward": parts["token"], "head_backward": parts["head"], "attention_backward": parts["square"],
               "fixed_backward": fixed}  # fmt: skip
    seconds = points["backward"] - again
    if same_lengths:
        seconds -= model.attention_backward * columns.pop("attention_backward")
    if (fixed < SMALL * points["forward"])[chosen].all():  # a ratio of next to nothing is no number
        del columns["fixed_backward"]
    ratios = least_squares(columns, seconds, chosen)
    return {name: ratio if name == "head_backward" else max(ratio, LEAST_TOKEN) for name, ratio in ratios.items()}


def least_squares(columns: dict[str, pd.Series], seconds: pd.Series, chosen: pd.Series) -> dict[str, float]:
    """What each column costs, none less than nothing, such that the squares of relative errors are least."""
    chosen = chosen & (seconds > 0)
    if not chosen.any():
        return dict.fromkeys(columns, 0.0)
    matrix = np.column_stack([column[chosen] for column in columns.values()]).astype(float)
    matrix /= seconds[chosen].to_numpy(float)[:, None]
    scales = np.where(np.abs(matrix).max(axis=0) > 0, np.abs(matrix).max(axis=0), 1.0)
    values, _ = nnls(matrix / scales, np.ones(len(matrix)))
    return dict(zip(columns, (values / scales).tolist(), strict=True))


def _host(points: pd.DataFrame) -> dict[str, float]:
    """What the host takes: by microbatches of few tokens, for which its queue does not fill up. It takes no longer than
    the passes do while it runs ahead."""
    points = points[points["host_time_forward"].notna()]
    points = points[points["tokens"] <= max(FEW_TOKENS, points["tokens"].min())]
    if points.empty:
        return {}
    times = {which: points[[f"host_time_{which}", which]].min(axis=1) for which in PASSES}
    layers = points["layers"]
    columns = {"host": layers, "host_adapter": layers * np.maximum(points["adapters"] - 1, 0),
               "host_microbatch": 0 * layers + 1}  # fmt: skip
    costs = least_squares(columns, times["forward"], layers > 0)
    again = (costs["host"] * layers + costs["host_adapter"] * columns["host_adapter"]) * points["recompute"]
    columns = {"host_backward": costs["host"] * layers + costs["host_microbatch"],
               "host_adapter_backward": columns["host_adapter"]}  # fmt: skip
    return costs | least_squares(columns, times["backward"] - again, layers > 0)


def _step(points: pd.DataFrame) -> dict[str, float]:
    """Of an adapter's optimizer step, for a layer."""
    stepping = points["step_time"].notna() & (points["adapters"] > 0)
    columns = {"step": points["layers"] * points["adapters"]}
    if points["host_time_forward"].isna().all():
        columns |= {"after_layer": points["layers"], "after": 0 * points["layers"] + 1}
    return least_squares(columns, points["step_time"], stepping)


def saved_bytes(points: pd.DataFrame) -> float:
    """Bytes that a layer keeps of a token, where it keeps all and no head is in the way."""
    whole = points["saved_memory"].notna() & ~points["recompute"] & ~points["is_last"]
    return least_squares({"byte": points["layers"] * points["tokens"]}, points["saved_memory"], whole)["byte"]


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


def left_out(points: pd.DataFrame, base: LayerCosts) -> pd.DataFrame:
    """Seconds of the passes of each point, by the costs that fit all others."""
    parts = [predicted(fitted(points.drop(cell), base), points.loc[[cell]]) for cell in points.index]
    return pd.concat(parts) if len(points) > 1 else predicted(fitted(points, base), points)


def base_costs(model: str, on_gpu: bool) -> LayerCosts:
    """By the model's FLOP."""
    return model_costs(read_model(model), 1, machine=H200 if on_gpu else CPU)


def relative_errors(points: pd.DataFrame, predictions: pd.DataFrame) -> pd.Series:
    """Of both passes together."""
    measured = points[list(PASSES)].sum(axis=1)
    return (predictions[list(PASSES)].sum(axis=1) / measured - 1).abs()
