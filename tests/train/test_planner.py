"""What a training is planned by: the costs of its model on its own device."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import yaml

from lorafusion.core.config import read_model
from lorafusion.core.schema import UserError
from lorafusion.engine.memory_probe import Measured, Needs
from lorafusion.planning import plan_system
from lorafusion.planning.simulator import model_costs
from lorafusion.planning.simulator.costs import CPU
from lorafusion.train import planner
from lorafusion.train.config import read_train_config
from lorafusion.train.planner import RunPlanner
from lorafusion.train.run import Training

MIB = 2.0**20
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


def stage(usable: float) -> Measured:
    """One of two stages, with two microbatches in flight: 1 MiB kept a token, and 1 MiB in passing."""
    needs = Needs(0.0, (0.0, MIB), (0.0, MIB))
    return Measured(usable * MIB, 2, needs, needs)


def planner_of(tmp_path, monkeypatch, graphs, usable, capacity=None, device="cuda", model=LARGE) -> RunPlanner:
    path = tmp_path / "jobs.yaml"
    settings = {"processes": 2, "capacity": capacity, "checkpointing": "none", "graphs": graphs, "device": device}
    data = {"model": "llama-3.1-8b", "output": "out", "jobs": [{"name": "a", "data": {"synthetic": {}}}]} | settings
    path.write_text(yaml.safe_dump(data))
    run_planner = RunPlanner(read_train_config(path), model, None, None)
    monkeypatch.setattr(run_planner, "_measured", lambda workload: [stage(usable)])
    monkeypatch.setattr(planner, "gpu_state", lambda: {"gpu_name": "GPU Y"})
    return run_planner


@pytest.mark.parametrize(
    ("graphs", "usable", "capacity", "tokens"),
    [("off", 12288, None, 4096), ("on", 12288, None, 3072), ("auto", 12288, None, 3072), ("on", 12288, 2048, 2048),
     ("auto", 12288, 3584, None)],
)  # fmt: skip
def test_graphs_take_a_pool_of_memory_for_each_microbatch_in_flight(
    tmp_path, monkeypatch, caplog, make_job, make_workload, graphs, usable, capacity, tokens
):
    """A token takes 3 MiB, with graphs 4. Where these do not fit, `auto` does without and says so."""
    workload = make_workload(make_job("a", (512,) * 12, global_batch_size=4))
    with caplog.at_level("INFO"):
        plan = planner_of(tmp_path, monkeypatch, graphs, usable, capacity).plan(workload)
    assert plan.capacity == (tokens or capacity)
    assert bool(plan.buckets) == (graphs != "off" and tokens is not None)
    said = "without graphs: capacity: graphs of microbatches of 3584 tokens do not fit in the memory, of 3072 they do"
    assert (said in caplog.text) == (tokens is None)


def test_graphs_that_do_not_fit_are_refused_where_they_are_asked_for(tmp_path, monkeypatch, make_job, make_workload):
    workload = make_workload(make_job("a", (512,) * 12, global_batch_size=4))
    with pytest.raises(
        UserError, match=r"jobs.yaml: graphs: found on, expected auto or off: capacity: graphs of micro"
    ):
        planner_of(tmp_path, monkeypatch, "on", 12288, 3584).plan(workload)
    longer = make_workload(make_job("a", (3584,), global_batch_size=1))
    assert planner_of(tmp_path, monkeypatch, "auto", 12288).plan(longer).capacity == 4096
    with pytest.raises(UserError, match="graphs: found on, expected auto or off: capacity: 3072 to"):
        planner_of(tmp_path, monkeypatch, "on", 12288).plan(longer)


def test_a_cpu_has_no_graphs_and_says_so_where_it_may(tmp_path, monkeypatch, caplog, make_workload):
    with caplog.at_level("INFO"):
        assert not planner_of(tmp_path, monkeypatch, "auto", 0, device="cpu").plan(make_workload()).buckets
    assert "without graphs: the device is cpu, and graphs need a GPU" in caplog.text


def test_a_rotation_that_asks_its_device_has_no_graphs(tmp_path, monkeypatch, caplog, make_workload):
    model = LARGE.model_copy(update={"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}})
    reason = "the host asks the device for the longest position of a rotary embedding of type dynamic"
    with caplog.at_level("INFO"):
        assert not planner_of(tmp_path, monkeypatch, "auto", 12288, 64, model=model).plan(make_workload()).buckets
    assert f"without graphs: {reason}" in caplog.text
    with pytest.raises(UserError, match=f"jobs.yaml: graphs: found on, expected auto or off: {reason}"):
        planner_of(tmp_path, monkeypatch, "on", 12288, 64, model=model).plan(make_workload())


@pytest.mark.parametrize(("before", "now", "goes_on"), [
    (False, "off", True), (False, "on", False), (False, "auto", True),
    (True, "on", True), (True, "off", False), (True, "auto", True),
])  # fmt: skip
def test_a_run_goes_on_by_its_plan_unless_graphs_are_switched(tmp_path, make_workload, before, now, goes_on):
    """What was planned with buckets is planned anew without, and the other way round."""
    workload = make_workload()
    plan = plan_system(workload, "lorafusion", stages=1, capacity=64, graphs=before)
    run = SimpleNamespace(plan=tmp_path / "plan.json")
    run.plan.write_text(plan.to_json())
    output = SimpleNamespace(remaining=lambda _: workload, in_hand=run, require_continued=lambda *_: None,
                             take_over=lambda *_: None)  # fmt: skip
    config = SimpleNamespace(stages=1, data_parallel=1, capacity=None, graphs=now)
    state = SimpleNamespace(output=output, config=config, workload=workload, _checkpoint_before=None)
    assert Training._in_hand(state) == (run if goes_on else None, workload)
