"""The experiment `costs`: what it refuses, that its rows are a table, and that a fit finds the costs that made them."""

from __future__ import annotations

from itertools import product

import numpy as np
import pandas as pd
import pytest
import yaml
from typer.testing import CliRunner

from lorafusion.cli.main import app
from lorafusion.core.config import CONFIGS, read_model
from lorafusion.core.schema import UserError
from lorafusion.lab import cost_fit, cost_profile
from lorafusion.lab.experiments import EXPERIMENTS, cost_times
from lorafusion.lab.experiments.cost_systems import PASSES
from lorafusion.lab.experiments.costs_suite import SystemBench, bench_of, cell_of, workload_and_plan
from lorafusion.lab.report.registry import FIGURES
from lorafusion.lab.table import table
from lorafusion.lab.table.table import MeasurementError
from lorafusion.planning.simulator import simulate
from lorafusion.planning.simulator.costs import CostModel, LayerCosts, contents_of
from lorafusion.planning.simulator.profile import read_profile, stage_costs

COSTS = EXPERIMENTS["costs"]
BENCH = {"model": "tiny", "parts": [{"stage": [0, 1]}, {"layers": 6, "stage": [1, 3]}],
         "grids": [{"implementations": ["fused"], "sizes": [[16, 16], [64, 16], [64, 64]]},
                   {"implementations": ["fused-multi", "frozen"], "adapters": [2], "recompute": True,
                    "sizes": [[64, 16]]}]}  # fmt: skip
TRUE = LayerCosts(
    token=2e-6, square=3e-9, fixed=4e-4, microbatch=1e-3, head=5e-6, adapter=2e-5, tile=128, step=3e-5,
    backward=1.1, head_backward=0.2, attention_backward=2.4, fixed_backward=0.7,
    host=2e-3, host_adapter=1e-4, host_adapter_backward=3e-4, host_microbatch=3e-3, host_backward=1.4,
)  # fmt: skip


@pytest.fixture
def suite(small_suite):
    return small_suite(COSTS, BENCH)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"parts": [{"stage": [2, 2]}]}, "stage must be an index and a count above it"),
        ({"parts": [{"layers": 2, "stage": [0, 3]}]}, "3 stages, but model tiny has only 2 layers"),
        ({"model": "tinny"}, "small.benches.toy: unknown model 'tinny'"),
        ({"grids": [{"implementations": ["fused-multi"], "adapters": [3], "sizes": [[64, 16]]}]}, "multiple of 16"),
    ],
)
def test_mistakes_in_the_file_are_named(suite, changes, message):
    with pytest.raises(UserError, match=message) as caught:
        suite(**changes)
    assert "\n" not in str(caught.value)


def test_the_suites_that_come_with_the_project_are_sound():
    names = {point.name for point in COSTS.points("h200")}
    assert {"llama-3.1-8b", "qwen2.5-32b", "llama-3.1-70b"} < names
    assert [point.name for point in COSTS.points("h200-x2")] == ["links"]
    assert COSTS.resources(COSTS.points("h200-x2")[0]).gpus == 2
    for point in [point for suite in ("smoke", "h200", "cpu-tiny") for point in COSTS.points(suite)]:
        for grid in getattr(point.subject, "grids", []):
            for arm, (tokens, sample) in product(grid.arms, grid.sizes):
                assert point.subject.steps_bench(arm, tokens, sample).arms == [arm], point.suite


def test_a_bench_becomes_a_profile_and_a_figure(suite, tmp_path):
    folder = tmp_path / "results"
    run = ["lab", "run", "small", "--step", str(folder / "costs" / "runs" / "toy" / "repeat~1.json")]
    assert CliRunner().invoke(app, run, catch_exceptions=False).exit_code == 0
    done = CliRunner().invoke(app, ["lab", "profile-costs", "small", "--folder", str(folder)])
    assert done.exit_code == 0, done.output
    frame = table.read(folder / "costs" / "measurements.csv")
    points = cost_fit.points_of(frame)
    assert len(points) == 2 * (3 + 2)
    assert set(points["layers"]) == {4, 2}
    assert points.groupby("implementation").size().to_dict() == {"fused": 8, "frozen": 2}
    assert (points[["forward", "backward"]] > 0).all(axis=None)
    profile = read_profile(folder / "costs" / "profile.yaml")
    assert (profile.device, profile.gpu_name) == ("cpu", None)
    assert {fit.implementation for fit in profile.fits} == {"fused", "frozen"}
    assert (folder / "figures" / "cost_fit.png").exists()


def rows_of(costs: LayerCosts) -> pd.DataFrame:
    """The table of a GPU whose passes take what some costs say."""
    rows, sizes = [], [(256, 256), (2048, 512), (4096, 1024), (8192, 512), (8192, 4096), (16384, 2048)]
    arms = [("fused", 1), ("fused-multi", 4)]
    parts = [((0, 1), 8), ((1, 3), 4), ((2, 3), 2)]
    for ((index, count), layers), (arm, adapters), (tokens, sample), again in product(
        parts, arms, sizes, (False, True)
    ):
        cell = (f"bench~x/layers~{layers}/stage~{index}-of-{count}/recompute~{'all' if again else 'none'}"
                f"/implementation~{arm}/adapters~{adapters}/tokens~{tokens}/sample~{sample}")  # fmt: skip
        model = costs.model_copy(update={"checkpointing": again})
        held = [np.array([value], float) for value in (tokens, tokens * sample, adapters)]
        device, ends = model.layer(*held), model.ends(held[0], float(index == count - 1))
        host = [layers * layer + besides for layer, besides in
                zip(model.host_time(held[0], held[2]), model.host_besides(held[0]), strict=True)]  # fmt: skip
        for which, layer, end, launched in zip(("forward", "backward"), device, ends, host, strict=True):
            seconds = max((layers * layer + end).item(), launched.item())
            rows += [(cell, "time", which, seconds), (cell, "host_time", which, launched.item())]
        rows += [(cell, "step_time", None, costs.step * layers * adapters),
                 (cell, "saved_memory", None, 1e4 * layers * tokens)]  # fmt: skip
    frame = pd.DataFrame(rows, columns=["cell", "metric", "pass", "value"])
    return frame.assign(statistic="single", status="ok", model="llama-3.1-8b", gpu_name="GPU X", dtype="bfloat16",
                        system=pd.NA, gpus=1, suite="small", git_sha="0", torch="2", triton="3", cuda="13",
                        driver="5").astype({"metric": "string", "pass": "string", "cell": "string"})  # fmt: skip


def test_a_fit_finds_the_costs_that_the_times_were_made_from():
    profile = cost_profile.profile_of(rows_of(TRUE))
    (fit,) = profile.fits
    fitted, expected = fit.costs.model_dump(), TRUE.model_dump()
    for name in set(expected) - {"latency", "transfer"}:
        assert fitted[name] == pytest.approx(expected[name], rel=1e-3), name
    assert fit.worst_error < 1e-3
    assert fit.saved_bytes == pytest.approx(1e4)
    model = stage_costs(fit, read_model("llama-3.1-8b"), 2, checkpointing=True)
    assert (sum(model.layers), model.checkpointing) == (32, True)
    assert (profile.device, profile.gpu_name) == ("cuda", "GPU X")


def test_the_recorded_profile_is_that_of_the_recorded_table():
    recorded = read_profile(CONFIGS / "machines" / "nvidia-h200.yaml")
    frame = table.read(CONFIGS.parent / "results" / "reference" / "nvidia-h200" / "costs.parquet")
    again = cost_profile.profile_of(frame)
    assert again.gpu_name == recorded.gpu_name
    for fit, expected in zip(again.fits, recorded.fits, strict=True):
        assert fit.dimensions == expected.dimensions
        values, others = (part.costs.model_dump(exclude_none=True) for part in (fit, expected))
        assert values == pytest.approx(others, rel=1e-4, abs=1e-14)


def test_no_cost_is_less_than_nothing_whatever_was_measured():
    frame = rows_of(TRUE)
    noise = np.random.default_rng(0).uniform(0.2, 5, len(frame))
    for fit in cost_profile.profile_of(frame.assign(value=frame["value"] * noise)).fits:
        assert min(value for value in fit.costs.model_dump().values() if value is not None) >= 0
        assert fit.worst_error > 0


def test_links_are_of_the_messages_that_were_timed():
    links = pd.DataFrame({"cell": [f"bench~links/bytes~{size}" for size in (1e3, 1e6, 1e9)],
                          "value": [20e-6 + size / 1e11 for size in (1e3, 1e6, 1e9)]}).replace(
                              {"cell": r"\.0$"}, {"cell": ""}, regex=True)  # fmt: skip
    frame = pd.concat([rows_of(TRUE), links.assign(metric="transfer_time", status="ok", statistic="single")])
    costs = cost_profile.profile_of(frame).fits[0].costs
    assert costs.latency == pytest.approx(20e-6, rel=0.01)
    assert costs.transfer == pytest.approx(2 * 4096 / 1e11, rel=0.01)


SYSTEM = {"model": "tiny", "system": "peft-bf16", "tokens": 64, "sample_tokens": 16}


def of_a_cpu(seconds: dict[str, tuple[dict, dict[str, float]]], cores: int = 2) -> pd.DataFrame:
    """The table of a CPU whose passes take what some costs say, and of systems there: by name the bench's settings, and
    seconds of a microbatch's passes and steps, or of the whole."""
    frame = rows_of(TRUE.model_copy(update={"host": 0.0, "host_adapter": 0.0, "host_adapter_backward": 0.0,
                                            "host_microbatch": 0.0}))  # fmt: skip
    frame = frame[~frame["metric"].isin(["host_time", "saved_memory"])].assign(gpu_name=pd.NA, dtype="float32")
    rows = [("bench~x/cores", "cores", pd.NA, cores, pd.NA)]
    for name, (settings, values) in seconds.items():
        cell = cell_of(name, bench(**settings))
        for which, value in values.items():
            rows.append((cell, "step_time" if which == "step" else "time", which if which in PASSES else pd.NA, value,
                         settings["system"]))  # fmt: skip
    more = pd.DataFrame(rows, columns=["cell", "metric", "pass", "value", "system"])
    return pd.concat([frame, more.assign(statistic="single", status="ok", model="llama-3.1-8b")], ignore_index=True)


def bench(**settings) -> SystemBench:
    return SystemBench(model="llama-3.1-8b", tokens=2048, sample_tokens=512, **settings)


def test_what_an_executor_does_besides_is_in_the_costs_of_its_system():
    config, held = read_model("llama-3.1-8b"), [np.array([value], float) for value in (2048, 2048 * 512, 1, 1)]
    alone = stage_costs(cost_profile.profile_of(of_a_cpu({})).fits[0], config, 1, False).costs(*held)
    forward, backward, step = (getattr(alone, name).item() for name in ("forward", "backward", "step"))
    profile = cost_profile.profile_of(of_a_cpu({
        "executor": ({"system": "fused-sequential"},
                     {"forward": forward + 0.04, "backward": backward + 0.02, "step": step + 0.003}),
        "crowded": ({"system": "fused-mlora", "replicas": 4}, dict.fromkeys((*PASSES, "step"), 1.0))}))  # fmt: skip
    assert [fit.system for fit in profile.fits] == [None, "fused-sequential"]
    assert profile.fit(config, "fused", "lorafusion") == profile.fits[0]
    assert [fit.costs.cores for fit in profile.fits] == [2, 2]
    again = stage_costs(profile.fit(config, "fused", "fused-sequential"), config, 1, False).costs(*held)
    assert again.forward.item() == pytest.approx(forward + 0.04)
    assert again.backward.item() == pytest.approx(backward + 0.02)
    assert again.step.item() == pytest.approx(step + 0.003)


def test_messages_take_as_long_as_pipelines_show_whatever_the_speed_of_the_machine():
    config, seconds, expected = read_model("llama-3.1-8b"), {}, {"lorafusion": 0.02, "fused-sequential": 0.09}
    profile = cost_profile.profile_of(of_a_cpu({}))
    for system, latency in expected.items():
        settings = {"system": system, "stages": 2}
        workload, plan = workload_and_plan(bench(**settings))
        model = stage_costs(profile.fits[0], config, 2, checkpointing=False).model_copy(update={"latency": latency})
        table = model.costs(*contents_of(plan, workload))
        forward = model.model_copy(update={"latency": 0.0, "transfer": 0.0}).costs(*contents_of(plan, workload)).forward
        whole = simulate(plan, table).makespan
        seconds[f"{system}-pair"] = settings, {"whole": 1.5 * whole, "forward": 1.5 * forward[forward > 0].mean()}
    held = [np.array([value], float) for value in (2048, 2048 * 512, 1, 1)]
    alone = stage_costs(profile.fits[0], config, 1, False).costs(*held)
    seconds["executor"] = (
        {"system": "fused-sequential"},
        {name: getattr(alone, name).item() for name in (*PASSES, "step")},
    )
    profile = cost_profile.profile_of(of_a_cpu(seconds))
    fits = {system: profile.fit(config, "fused", system) for system in expected}
    assert fits["fused-sequential"].system == "fused-sequential"
    assert {system: fit.costs.latency for system, fit in fits.items()} == pytest.approx(expected, rel=0.01)


def test_on_a_cpu_what_follows_a_pass_is_in_the_costs_of_a_microbatch():
    frame = of_a_cpu({})
    late = (frame["metric"] == "step_time").to_numpy(float)
    layers = frame["cell"].str.extract("layers~([0-9]+)")[0].astype(float)
    slow = cost_profile.profile_of(frame.assign(value=frame["value"] + late * (2e-3 + 1e-3 * layers.fillna(0)))).fits[0]
    assert slow.costs.step == pytest.approx(TRUE.step, rel=1e-3)
    held = [np.array([value], float) for value in (2048, 2048 * 512, 1, 1)]
    before, after = (CostModel(**fit.costs.model_dump() | {"layers": (4,)}).costs(*held).backward.item()
                     for fit in (cost_profile.profile_of(frame).fits[0], slow))  # fmt: skip
    assert after == pytest.approx(before + 6e-3, rel=1e-2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"system": "mlra"}, "unknown system 'mlra'"), ({"model": "tinny"}, "toy.systems.run: unknown model 'tinny'"),
     ({"tokens": 60}, "60 must be a multiple of sample_tokens, 16")],
)  # fmt: skip
def test_mistakes_in_a_system_that_is_to_run_are_named(tmp_path, monkeypatch, changes, message):
    entry = {"device": "cpu", "dtype": "float32", "rounds": 1, "systems": {"run": SYSTEM | changes}}
    (tmp_path / "costs.yaml").write_text(yaml.safe_dump({"toy": entry}))
    monkeypatch.setattr(COSTS, "config", tmp_path / "costs.yaml")
    with pytest.raises(UserError, match=message):
        list(COSTS.measure(*COSTS.points("toy"), 1, tmp_path / "result.json"))


@pytest.mark.parametrize(("stages", "names"), [(1, {"forward", "backward", "step"}), (2, {"forward", "whole"})])
def test_a_system_is_run_and_its_microbatches_are_timed(tmp_path, monkeypatch, stages, names):
    system = SYSTEM | ({"system": "mlora", "stages": 2} if stages == 2 else {})
    entry = {"device": "cpu", "dtype": "float32", "rounds": 1, "systems": {"run": system}}
    (tmp_path / "costs.yaml").write_text(yaml.safe_dump({"toy": entry}))
    monkeypatch.setattr(COSTS, "config", tmp_path / "costs.yaml")
    (point,) = COSTS.points("toy")
    COSTS.run(point, 1, tmp_path / "result.json", None)
    frame = table.read_results([tmp_path / "result.json"])
    assert set(frame["status"]) == {"ok"}
    assert bench_of(frame["cell"].iloc[0], "tiny") == point.subject
    seconds = frame.set_index(frame["pass"].fillna(frame["metric"].replace({"time": "whole", "step_time": "step"})))[
        "value"
    ]
    assert set(seconds.index) == names
    assert (seconds.drop("step", errors="ignore") > 0).all()


def test_messages_between_two_processes_are_timed(tmp_path, monkeypatch):
    path = tmp_path / "costs.yaml"
    path.write_text(yaml.safe_dump({"pair": {"device": "cpu", "dtype": "float32", "rounds": 1, "links": [1, 65536]}}))
    monkeypatch.setattr(COSTS, "config", path)
    COSTS.run(COSTS.points("pair")[0], 1, tmp_path / "result.json", None)
    frame = table.read_results([tmp_path / "result.json"])
    assert set(frame["status"]) == {"ok"}
    assert (frame["value"] > 0).all()


def test_a_table_without_times_of_stages_is_refused():
    with pytest.raises(MeasurementError, match="no times of stages"):
        FIGURES["cost_fit"].make(rows_of(TRUE).assign(status="oom"))


def test_what_runs_out_of_memory_is_rows_without_values(suite, tmp_path, monkeypatch):
    turn = cost_times._turn

    def short_of_memory(trainer):
        if trainer.run.microbatches[0].tokens == 64:
            raise cost_times.torch.OutOfMemoryError("too large")
        return turn(trainer)

    monkeypatch.setattr(cost_times, "_turn", short_of_memory)
    COSTS.run(COSTS.points("small")[0], 1, tmp_path / "result.json", None)
    frame = table.summarise(table.read_results([tmp_path / "result.json"]))
    table.validate(frame)
    assert set(frame[frame["status"] == "oom"]["tokens"]) == {64}
    assert set(frame[(frame["status"] == "ok") & frame["tokens"].notna()]["tokens"]) == {16}
