"""The profile of a table of the experiment `costs`: fits of its stages, and what short runs of systems say besides."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import yaml
from scipy.optimize import brentq

from lorafusion.core.config import ModelConfig, read_model, read_system
from lorafusion.core.files import write
from lorafusion.lab.cost_fit import base_costs, fitted, least_squares, left_out, points_of, relative_errors, saved_bytes
from lorafusion.lab.experiments.costs_suite import WHOLE, SystemBench, bench_of, workload_and_plan
from lorafusion.lab.table.table import read
from lorafusion.planning.simulator import simulate
from lorafusion.planning.simulator.costs import H200, LayerCosts, contents_of
from lorafusion.planning.simulator.profile import CostFit, CostProfile, dimensions_of, stage_costs

ORIGIN = ("suite", "git_sha", "torch", "triton", "cuda", "driver")  # columns that the profile repeats


def profile_of(table: pd.DataFrame) -> CostProfile:
    """The profile of a table of the experiment `costs`."""
    points = points_of(table)
    origin = table[table["cell"] == points.index[0]].iloc[0]
    is_gpu, fits = pd.notna(origin["gpu_name"]), []
    link, cores = _link(table), table.loc[table["metric"] == "cores", "value"].max()
    for (model, implementation), of_fit in points.groupby(["model", "implementation"]):
        config, base = read_model(str(model)), base_costs(str(model), is_gpu)
        errors = relative_errors(of_fit, left_out(of_fit, base))
        itemsize = 4 if origin["dtype"] == "float32" else 2
        besides = {"latency": link[0], "transfer": link[1] * config.hidden_size * itemsize,
                   "cores": 0 if pd.isna(cores) else int(cores)}  # fmt: skip
        fits.append(CostFit(model=str(model), dimensions=dimensions_of(config), implementation=str(implementation),
                            costs=fitted(of_fit, base).model_copy(update=besides), points=len(of_fit),
                            mean_error=errors.mean(), worst_error=errors.max(),
                            saved_bytes=saved_bytes(of_fit)))  # fmt: skip
    made_from = {name: None if pd.isna(origin[name]) else str(origin[name]) for name in ORIGIN}
    return CostProfile(device="cuda" if is_gpu else "cpu", gpu_name=origin["gpu_name"] if is_gpu else None,
                       dtype=origin["dtype"], made_from=made_from, fits=_by_runs(fits, table))  # fmt: skip


class _Run(NamedTuple):
    """A bench of a system. seconds: by name, of a microbatch's passes and steps; of a pipeline the whole and the mean
    forward pass of its stages."""

    bench: SystemBench
    model: ModelConfig
    seconds: Mapping[str, float]

    def is_of(self, fit: CostFit) -> bool:
        """Is a fit of its model and LoRA operation, and of its system or any?"""
        implementation, system = read_system(self.bench.system).implementation, self.bench.system
        return (fit.dimensions, fit.implementation) == (dimensions_of(self.model), implementation) and fit.system in (
            None, system)  # fmt: skip

    def alone(self, fit: CostFit) -> dict[str, float]:
        """Its seconds by name, as a fit of stages alone has them."""
        tokens = self.bench.tokens
        held = [np.array([value], float) for value in (tokens, tokens * self.bench.sample_tokens, 1, 1)]
        costs = stage_costs(fit, self.model, 1, checkpointing=False).costs(*held)
        return {name: getattr(costs, name).item() for name in self.seconds}

    def latency(self, fit: CostFit) -> float:
        """Of a message, with which the simulated pipeline takes as long as the measured one. How fast the machine was
        then is known from the forward passes."""
        workload, plan = workload_and_plan(self.bench)
        costs, held = stage_costs(fit, self.model, plan.stages, checkpointing=False), contents_of(plan, workload)
        without = costs.model_copy(update={"latency": 0.0, "transfer": 0.0}).costs(*held).forward
        expected = self.seconds[WHOLE] * without[without > 0].mean() / self.seconds["forward"]

        def late(latency: float) -> float:
            return simulate(plan, costs.model_copy(update={"latency": latency}).costs(*held)).makespan - expected

        return float(brentq(late, 0, expected)) if late(0) < 0 else 0.0


def _runs(table: pd.DataFrame) -> list[_Run]:
    rows = table[table["cell"].str.contains("/stages~[0-9]+/") & (table["status"] == "ok")]
    runs = []
    for (model, cell), of_cell in rows[rows["statistic"] == "single"].groupby(["model", "cell"]):
        names = of_cell["pass"].fillna(of_cell["metric"].map({"time": WHOLE, "step_time": "step"}))
        seconds = of_cell.astype({"value": float}).groupby(names)["value"].median()
        runs.append(_Run(bench_of(str(cell), str(model)), read_model(str(model)), seconds.to_dict()))
    return runs


def _by_runs(fits: Sequence[CostFit], table: pd.DataFrame) -> tuple[CostFit, ...]:
    """Fits with what short runs of systems say besides.

    What a microbatch and steps take more than by the fit of their implementation is the executor's work, and becomes a
    fit of that system. A pipeline says what a message takes: in that system, if it has a fit of its own, or else in all
    that have none. None has more processes than cores."""
    runs = _runs(table)
    pairs = [(run, fit) for run in runs for fit in fits if run.bench.stages == 1 and run.is_of(fit)
             and run.bench.processes <= fit.costs.cores]  # fmt: skip
    fits = [*fits, *(_with_executor(fit, run) for run, fit in pairs)]
    latencies = {}
    for run in [run for run in runs if run.bench.stages > 1]:
        fit = next((fit for fit in reversed(fits) if run.is_of(fit)), None)  # its own is the last one
        if fit and run.bench.processes <= fit.costs.cores:
            latencies[fit.system] = run.latency(fit)
    return tuple(
        fit.model_copy(update={"costs": fit.costs.model_copy(update={"latency": latencies[fit.system]})})
        if fit.system in latencies else fit for fit in fits
    )  # fmt: skip


def _with_executor(fit: CostFit, run: _Run) -> CostFit:
    """The fit of a system: what a microbatch took more than by the fit of its implementation is work of the executor in
    each layer, whatever the microbatch holds; and what steps took more is that of a stage."""
    more = {name: max(0.0, run.seconds[name] - seconds) for name, seconds in run.alone(fit).items()}
    costs = _with_more(fit.costs, run.model.num_hidden_layers, **more)
    return fit.model_copy(update={"system": run.bench.system, "costs": costs})


def _with_more(costs: LayerCosts, layers: int, forward: float, backward: float, step: float) -> LayerCosts:
    """Costs with some more seconds of each microbatch and of each step, where a model has so many layers."""
    fixed, ratio = layers * costs.fixed + costs.microbatch, costs.fixed_backward or costs.backward
    update = {"fixed": costs.fixed + forward / layers, "steps": costs.steps + step,
              "fixed_backward": (ratio * fixed + backward) / (fixed + forward)}  # fmt: skip
    return costs.model_copy(update=update)


def _link(table: pd.DataFrame) -> tuple[float, float]:
    """Seconds of a message, and of a byte of it; of an H200's links where none was measured."""
    rows = table[(table["metric"] == "transfer_time") & (table["status"] == "ok") & (table["statistic"] == "single")]
    if rows.empty:
        return 10e-6, 1 / H200.bandwidth
    seconds = rows["value"].astype(float)
    sizes = rows["cell"].str.extract("/bytes~([0-9]+)")[0].astype(float)
    costs = least_squares({"latency": 0 * sizes + 1, "byte": sizes}, seconds, seconds > 0)
    return costs["latency"], costs["byte"]


def fit_tables(tables: Sequence[Path], out: Path) -> str:
    """Write the profile of some tables, those of links among them; returns its errors in a line."""
    profile = profile_of(pd.concat([read(path) for path in tables], ignore_index=True))
    content = profile.model_dump(mode="json", exclude_defaults=True) | {"version": profile.version}
    write(out, yaml.safe_dump(content, sort_keys=False, width=120))
    return ", ".join(f"{fit.model} {fit.implementation}: {fit.points} points, error {fit.mean_error:.1%}, at worst "
                     f"{fit.worst_error:.1%}" for fit in profile.fits)  # fmt: skip
