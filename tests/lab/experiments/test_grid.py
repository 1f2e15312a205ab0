"""The experiment `grid`: which points it has, that PEFT's linears compute the same tokens, and what its figure says."""

from __future__ import annotations

import time

import pandas as pd
import pytest
import torch
import yaml

from lorafusion.core.config import read_model
from lorafusion.core.schema import UserError
from lorafusion.lab.experiments import EXPERIMENTS
from lorafusion.lab.experiments.grid_times import measured, run_fused
from lorafusion.lab.experiments.implementations import Builder, Setting
from lorafusion.lab.experiments.kernel_suite import LayerBlock
from lorafusion.lab.experiments.timing import FEWEST_CALLS, ROUNDS, call_seconds
from lorafusion.lab.report.figures.grid import place, share_of
from lorafusion.lab.report.registry import FIGURES
from lorafusion.lab.table import table
from lorafusion.lab.table.table import MeasurementError

CPU = torch.device("cpu")
GRID = EXPERIMENTS["grid"]


def test_the_grid_of_record_has_at_most_400_points_and_all_that_decides():
    benches = {point.name: point.subject for point in GRID.points("h200")}
    points = [
        (model, bench.shape, bench.rank, bench.dropout, tokens, adapters)
        for model, of_model in benches.items() for bench in of_model
        for tokens in bench.block.token_counts for adapters in bench.block.adapters
    ]  # fmt: skip
    assert len(set(points)) == len(points) <= 400
    _, _, ranks, dropouts, tokens, adapters = (set(values) for values in zip(*points, strict=True))
    assert (min(tokens), max(tokens), 2304 in tokens) == (64, 32768, True)
    assert ({4, 16, 128} <= ranks, dropouts, {1, 4, 16} <= adapters) == (True, {0.0, 0.1}, True)
    assert set(benches) == {"llama-3.1-8b", "qwen2.5-32b", "llama-3.1-70b"}
    for model, of_model in benches.items():
        assert {bench.shape for bench in of_model} == set(read_model(model).linears.values())


@pytest.mark.parametrize(
    ("models", "message"),
    [
        ({"tinny": [{"tokens": [16]}]}, "grid.yaml: small: unknown model 'tinny'"),
        ({"tiny": []}, "models.tiny: list should have at least 1 item"),
        ({"tiny": [{"tokens": []}]}, "models.tiny.0.tokens: list should have at least 1 item"),
        ({"tiny": [{"tokens": [16], "adapters": [0]}]}, r"tiny.0.adapters.0: .* \(found 0\)"),
        ({"tiny": [{"tokens": [16, 32]}, {"tokens": [32]}]}, "small.models.tiny: .*tokens~32.* is in the grid twice"),
    ],
)
def test_a_bad_entry_is_named(tmp_path, monkeypatch, models, message):
    path = tmp_path / "grid.yaml"
    path.write_text(yaml.safe_dump({"small": {"device": "cpu", "dtype": "float32", "models": models}}))
    monkeypatch.setattr(GRID, "config", path)
    with pytest.raises(UserError, match=message) as caught:
        GRID.points("small")
    assert "\n" not in str(caught.value)


def test_layers_have_no_pefts_in_turns():
    with pytest.raises(ValueError, match="peft-multi is one of linears alone"):
        LayerBlock(models=["tiny"], tokens=[16], implementations=["frozen", "peft-multi"])


@pytest.fixture
def builder():
    bench = next(bench for bench in GRID.point("smoke", "tiny").subject if bench.shape == (64, 32))
    return Builder(bench, Setting(CPU, torch.float32, 1))


def test_peft_computes_the_tokens_of_one_adapter_after_those_of_the_other(builder):
    """Without dropout the y and the gradients of adapters that are PEFT's are those of their own tokens."""
    builder.bench = builder.bench.model_copy(update={"dropout": 0.0})
    frozen, _, peft, ours, _ = (builder.build(case) for case in builder.bench.cases(33)[:5])
    assert [tuple(y.shape) for y in peft.forward()] == [(16, 32), (17, 32)]
    assert torch.equal(torch.cat(peft.leaves[:2]), frozen.leaves[0])
    gradients = peft.both()
    assert [tuple(gradient.shape) for gradient in gradients[2:]] == 2 * [(16, 64), (32, 16)]
    y, dx = torch.cat(peft.forward()), torch.cat(gradients[:2])
    modules = builder.kept["peft-multi", 2]
    for module, rows in zip(modules, (slice(0, 16), slice(16, 33)), strict=True):
        x = frozen.leaves[0].detach()[rows].requires_grad_()
        expected = module(x)
        torch.testing.assert_close(y[rows], expected)
        (gradient,) = torch.autograd.grad(expected, x, frozen.dy[rows])
        torch.testing.assert_close(dx[rows], gradient)
    assert len(ours.leaves) == 3


def test_a_case_without_memory_is_rows_without_values(builder, monkeypatch):
    build = Builder.build

    def failing(self, case):
        if case.implementation == "peft-multi":
            raise torch.OutOfMemoryError("too large")
        return build(self, case)

    monkeypatch.setattr(Builder, "build", failing)
    rows = measured(builder.bench, 16, builder, turn=1)
    assert {(row["metric"], row["status"]) for row in rows if row["implementation"] == "peft-multi"} == {
        ("host", "oom"), ("wall", "oom")}  # fmt: skip
    assert {row["status"] for row in rows if row["implementation"] != "peft-multi"} == {"ok"}


def test_what_a_bench_compiles_is_run_for_all_its_tokens_and_adapters(builder, monkeypatch):
    cases, build = [], Builder.build

    def noted(self, case):
        cases.append((case.implementation, case.tokens, case.adapters))
        if case.tokens == 16:
            raise torch.OutOfMemoryError("too large beside the others")
        return build(self, case)

    monkeypatch.setattr(Builder, "build", noted)
    run_fused(GRID.entry_of("smoke"), builder.bench)
    assert cases == [("fused-multi", tokens, adapters) for tokens in (16, 33) for adapters in (1, 2)]


def test_a_call_has_times_of_host_and_wall_and_with_graphs_of_the_device():
    counts = {"call": 0, "graph": 0}

    def call():
        counts["call"] += 1
        time.sleep(0.004)

    def graph():
        counts["graph"] += 1
        time.sleep(0.001)

    times = call_seconds({"a": call, "b": call}, {"a": graph, "b": graph}, CPU)
    assert set(times) == {"a", "b"}
    for of in times.values():
        assert of["host"] >= 0.004
        assert of["wall"] >= 0.004
        assert 0.001 <= of["device"] < of["wall"]
    # Two to see how many fit in a row, and one before each row.
    assert counts["call"] <= 2 * (2 + ROUNDS * (1 + FEWEST_CALLS))
    assert counts["graph"] > counts["call"]
    assert set(call_seconds({"a": call}, {}, CPU)["a"]) == {"host", "wall"}


def test_the_hosts_time_is_not_that_of_a_queue_that_is_full():
    """From the sixth call on the host waits for the device."""
    calls = iter(range(10**6))
    row = [0.0]

    def call():
        number = next(calls)
        waits = number > 2 and row[0] > 5
        row[0] += 1
        time.sleep(0.003 if waits else 0.0005)

    def begin():
        row[0] = 0.0

    from lorafusion.lab.experiments import timing

    meter = timing.Meter(CPU)
    meter.synchronize = begin
    host, whole = timing._in_a_row(call, 20, meter)
    assert host < 0.002 < whole


def test_a_grid_becomes_a_table_and_a_figure(tmp_path):
    path = tmp_path / "repeat~1.json"
    assert GRID.run(GRID.point("smoke", "tiny"), 1, path, None) == "82 numbers, 0 failed"
    rows = table.summarise(table.read_results([path]))
    table.validate(rows)
    assert not rows["metric"].eq("device").any()
    data, draw = FIGURES["grid_speed"].make(rows)
    assert len(data) == 2 * 4 * 2 * 2
    assert data["value"].to_numpy() == pytest.approx((data["fused"] / data["peft"]).to_numpy())
    assert set(data["linears"]) == {"q, o", "k, v", "gate, up", "down"}
    footer = draw(data).get_supxlabel()
    for metric in ("host", "wall"):
        worst = share_of(data, metric).worst
        assert f"worst {worst['value']:.2f} at {place(worst)}" in footer


def test_the_worst_point_and_the_shares_are_those_of_the_numbers():
    data = pd.DataFrame({
        "metric": "wall", "value": [0.9, 1.0, 1.02, 1.3, None, 0.5],
        "in_features": 64, "out_features": 32, "tokens": range(6), "adapters": 4, "rank": 16, "dropout": 0.1,
    })  # fmt: skip
    data.loc[5, "metric"] = "host"
    share = share_of(data, "wall")
    assert (share.points, share.within) == (4, (0.5, 0.75))
    assert place(share.worst) == "64 → 32 with 3 tokens, adapters: 4, rank 16, dropout 0.1"


def test_a_table_without_a_grid_is_refused(smoke_rows):
    with pytest.raises(MeasurementError, match="no median of the grid's linears"):
        FIGURES["grid_speed"].make(smoke_rows)


@pytest.fixture
def smoke_rows():
    return table.frame([])
