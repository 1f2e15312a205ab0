"""What a training is planned by: the costs of its model on its own device."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from lorafusion.core.config import read_model
from lorafusion.planning.simulator import model_costs
from lorafusion.planning.simulator.costs import CPU
from lorafusion.train import planner
from lorafusion.train.planner import RunPlanner

LARGE = read_model("llama-3.1-8b")


@pytest.mark.parametrize(
    ("device", "gpu", "token"),
    [("cpu", None, model_costs(LARGE, 2, machine=CPU).token), ("cuda", "GPU Y", model_costs(LARGE, 2).token),
     ("cuda", "NVIDIA H200", 7.42e-7)],
)  # fmt: skip
def test_a_training_is_planned_by_the_costs_of_its_device(monkeypatch, make_workload, device, gpu, token):
    monkeypatch.setattr(planner, "gpu_state", lambda: {"gpu_name": gpu})
    config = SimpleNamespace(stages=2, chosen_device=device, data_parallel=4)
    costs = RunPlanner(config, LARGE, None, None)._costs(make_workload(), share=0.5)
    assert costs.token == pytest.approx(token, rel=0.01)
    assert (costs.stages, costs.checkpointing) == (2, True)
    assert (costs.host > 0) == (device == "cuda")
    # Rank 4: 327,680 parameters a layer in float32, of which a ring of four sends six quarters in six messages.
    link = 300e9 if device == "cuda" else 1e9
    assert costs.reduction == pytest.approx(1.5 * 4 * 327680 / link + 6 * 10e-6 * 2 / 32, rel=0.01)
