"""Cost models: what a microbatch costs, how layers are split, and that a mistake in a file is named."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorafusion.core.config import read_model
from lorafusion.core.schema import UserError
from lorafusion.planning import plan_workload
from lorafusion.planning.partition import split_layers
from lorafusion.planning.simulator import CostModel, costs_of, model_costs, read_cost_model, simulate_plan

KERNELS = Path(__file__).parents[3] / "results" / "reference" / "nvidia-h200" / "kernels.parquet"


def costs(model, tokens, squares=(0,), adapters=(1,), steps=(0,)):
    return model.costs(*(np.array(column, float) for column in (tokens, squares, adapters, steps)))


def test_a_microbatch_costs_what_it_holds():
    model = CostModel(
        layers=(2, 3), token=1.0, square=0.5, fixed=10.0, head=4.0, backward=2.0, attention_backward=3.0, adapter=0.1,
        tile=8, step=7.0, latency=0.25, transfer=0.5,
    )  # fmt: skip
    table = costs(model, [5], [9], [2], [1])
    dense, attention = 8 + 10 + 0.1, 4.5
    assert table.forward[:, 0].tolist() == pytest.approx([2 * (dense + attention), 3 * (dense + attention) + 20])
    backward = 2 * dense + 3 * attention
    assert table.backward[:, 0].tolist() == pytest.approx([2 * backward, 3 * backward + 40])
    assert table.step[:, 0].tolist() == [14.0, 21.0]
    assert table.transfer.tolist() == [0.25 + 2.5]


def test_a_noop_costs_nothing():
    table = costs(model_costs(read_model("llama-3.1-8b"), 2), [0], [0], [0])
    assert not any(value.any() for value in (table.forward, table.backward, table.step, table.transfer))


def test_checkpointing_computes_the_forward_again():
    plain, again = (model_costs(read_model("llama-3.1-8b"), 1, checkpointing=on) for on in (False, True))
    first, second = costs(plain, [8192]), costs(again, [8192])  # so many that the host does not matter
    assert second.forward == pytest.approx(first.forward)
    layers = first.forward - plain.head * 8192
    assert second.backward == pytest.approx(first.backward + layers)


def test_a_pass_takes_as_long_as_its_host_at_least():
    model = CostModel(
        layers=(2, 3), token=1.0, head=4.0, backward=2.0, host=20.0, host_adapter=1.0, host_backward=1.5
    )  # fmt: skip
    table = costs(model, [0, 5, 50], [0] * 3, [0, 3, 3], [0] * 3)
    assert table.forward.tolist() == [[0.0, 2 * 22.0, 2 * 50.0], [0.0, 3 * 22.0, 3 * 50.0 + 200]]
    assert table.backward.tolist() == [[0.0, 2 * 33.0, 4 * 50.0], [0.0, 3 * 33.0, 6 * 50.0 + 400]]
    again = costs(model.model_copy(update={"checkpointing": True}), [5], [0], [3], [0])
    assert again.backward[:, 0].tolist() == [2 * (33.0 + 22.0), 3 * (33.0 + 22.0)]


def test_a_microbatch_of_few_tokens_takes_what_the_h200s_host_took():
    table = costs(model_costs(read_model("llama-3.1-8b"), 1), [512], [512**2], [4])
    assert (table.forward + table.backward).item() == pytest.approx(0.285 + 3 * 0.003)


@pytest.mark.parametrize("model", ["llama-3.1-8b", "qwen2.5-32b", "llama-3.1-70b"])
def test_a_layers_cost_is_what_the_h200_measured(model):
    """Within 12 % of the fused layer with 8192 tokens in samples of 512; the rate is that of Llama-3.1-70B."""
    rows = pd.read_parquet(KERNELS).query(f"model == '{model}' and implementation == 'fused' and tokens == 8192")
    measured = rows.query("metric == 'time' and statistic == 'median'").set_index("pass")["value"]
    predicted = model_costs(read_model(model), 1).layer(*(np.array([x], float) for x in (8192, 16 * 512**2, 1)))
    assert predicted[0][0] == pytest.approx(measured["forward"], rel=0.12)
    assert predicted[0][0] + predicted[1][0] == pytest.approx(measured["both"], rel=0.12)


@given(layers=st.integers(1, 90), stages=st.integers(1, 9), head=st.floats(0, 4))
def test_no_other_split_of_the_layers_is_faster(layers, stages, head):
    if stages > layers:
        with pytest.raises(UserError, match=f"{stages} stages, but the model has {layers} layers"):
            split_layers(layers, stages, head)
        return
    split = split_layers(layers, stages, head)
    assert sum(split) == layers
    assert len(split) == stages
    assert min(split) >= 1
    slowest = max(*split[:-1], split[-1] + head) if stages > 1 else layers + head
    for last in range(1, layers - stages + 2) if stages > 1 else ():
        assert slowest <= max(-(-(layers - last) // (stages - 1)), last + head) + 1e-9


def test_the_70b_models_head_takes_a_layer_from_the_last_of_four_stages():
    assert model_costs(read_model("llama-3.1-70b"), 4).layers == (21, 20, 20, 19)


def test_a_file_with_costs(tmp_path, make_workload):
    path = tmp_path / "costs.yaml"
    path.write_text("layers: [1, 1]\ntoken: 2.0e-6\n")
    plan = plan_workload(make_workload(), "fast", stages=2, capacity=16)
    table = costs_of(plan, make_workload(), read_cost_model(path))
    assert table.forward[0].sum() == pytest.approx(2e-6 * plan.statistics.tokens)
    timeline, unit = simulate_plan(plan, make_workload(), costs=path)
    assert (unit, timeline.stages) == ("s", 2)
    path.write_text(f"layers: [1, {'9' * 400}]\ntoken: 2.0e-6\n")
    with pytest.raises(UserError, match=r"costs.yaml: layers.1: .* less than or equal to 1000 "):
        read_cost_model(path)
    path.write_text("layers: [1, 1]\ntokens: 2.0e-6\n")
    with pytest.raises(UserError, match=r"costs.yaml: token: field required"):
        read_cost_model(path)


def test_models_and_plans_must_fit(make_workload, tmp_path):
    (tmp_path / "x.yaml").write_text("layers: [1, 1]\ntoken: 2.0e-6\n")
    plan = plan_workload(make_workload(), "fast", stages=2, capacity=16)
    with pytest.raises(UserError, match="cost model: 3 stages, but the plan has 2"):
        costs_of(plan, make_workload(), model_costs(read_model("llama-3.1-8b"), 3))
    with pytest.raises(UserError, match="need the plan's workload"):
        simulate_plan(plan, None, model="llama-3.1-8b")
    with pytest.raises(UserError, match="either a model or a file with costs"):
        simulate_plan(plan, make_workload(), model="llama-3.1-8b", costs=tmp_path / "x.yaml")
    assert simulate_plan(plan, None)[1] == "units"
