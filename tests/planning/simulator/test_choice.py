"""Which costs a plan uses: the first source that has an answer, and what does not fit is named."""

from __future__ import annotations

import pytest
import yaml

from lorafusion.core import config
from lorafusion.core.config import read_model, read_systems
from lorafusion.core.schema import LONGEST, UserError
from lorafusion.planning import plan_system
from lorafusion.planning.simulator import (
    Question,
    choice,
    chosen_costs,
    costs_for,
    even_costs,
    model_costs,
    simulate_plan,
)
from lorafusion.planning.simulator.costs import CPU, adapter_parameters
from lorafusion.planning.simulator.profile import dimensions_of, read_profile
from lorafusion.planning.simulator.timeline import STEP

LARGE, TINY = read_model("llama-3.1-8b"), read_model("tiny")
FIT = {"model": "llama-3.1-8b", "dimensions": dimensions_of(LARGE), "implementation": "fused", "points": 9,
       "costs": {"token": 3e-6, "head": 2e-5}, "mean_error": 0.01, "worst_error": 0.02}  # fmt: skip
PROFILE = {"version": 1, "device": "cuda", "gpu_name": "GPU X", "dtype": "bfloat16", "fits": [FIT]}


@pytest.fixture
def profile(tmp_path):
    """Writes a file with a profile; returns its path."""

    def write(name="profile.yaml", **changes):
        path = tmp_path / name
        path.write_text(yaml.safe_dump(PROFILE | changes))
        return path

    return write


@pytest.fixture
def machines(tmp_path, monkeypatch):
    """An empty folder of configs/machines."""
    for module in (config, choice):
        monkeypatch.setattr(module, "CONFIGS", tmp_path)
    (tmp_path / "machines").mkdir()
    return tmp_path / "machines"


def test_a_file_comes_first_then_a_recorded_profile_then_the_models_flop(profile, machines):
    assert costs_for(Question(2)) == even_costs(2)
    assert costs_for(Question(2, LARGE, gpu_name="GPU X")) == model_costs(LARGE, 2)
    assert costs_for(Question(2, LARGE, device="cpu")) == model_costs(LARGE, 2, machine=CPU)
    profile("machines/x.yaml")
    of_here = costs_for(Question(2, LARGE, gpu_name="GPU X"))
    assert (of_here.token, sum(of_here.layers), of_here.stages) == (3e-6, 32, 2)
    assert costs_for(Question(2, LARGE, machine="x")) == of_here
    assert costs_for(Question(2, LARGE, machine="x", checkpointing=True)).checkpointing
    other = profile(fits=[FIT | {"costs": {"token": 4e-6}}])
    assert costs_for(Question(2, LARGE, other, gpu_name="GPU X")).token == 4e-6


@pytest.mark.parametrize(
    "question",
    [Question(1, LARGE), Question(1, LARGE, gpu_name="GPU Y"), Question(1, TINY, machine="x"),
     Question(1, LARGE, machine="x", implementation="looped"), Question(1, LARGE, machine="x", gpu_name="GPU Y")],
)  # fmt: skip
def test_a_recorded_profile_of_something_else_is_passed_over(profile, machines, question):
    profile("machines/x.yaml")
    assert costs_for(question) == model_costs(question.model, 1)


def test_a_profile_of_a_gpu_is_none_of_a_cpu(profile, machines):
    profile("machines/x.yaml")
    assert costs_for(Question(1, LARGE, machine="x", device="cpu")) == model_costs(LARGE, 1, machine=CPU)


@pytest.mark.parametrize(
    ("changes", "question", "message"),
    [
        ({}, {"gpu_name": "GPU Y"}, "profile.yaml: gpu_name: found GPU X, expected GPU Y"),
        ({"device": "cpu"}, {"device": "cuda"}, "profile.yaml: device: found cpu, expected cuda"),
        ({}, {"model": TINY}, r"profile.yaml: fits: found llama-3.1-8b \(fused\); expected a model of hidden_size 64"),
        ({}, {"model": None}, "profile.yaml: a profile of llama-3.1-8b; expected a model"),
        ({"version": 2}, {}, r"profile.yaml: version: input should be 1 \(found 2\)"),
        ({"fits": []}, {}, "profile.yaml: fits: "),
        ({"fits": [FIT | {"costs": {"token": -1.0}}]}, {}, r"fits.0.costs.token: .*greater than .*\(found -1.0\)"),
        (
            {"fits": [FIT | {"costs": {"token": float("nan")}}]},
            {},
            r"fits.0.costs.token: .*finite number \(found nan\)",
        ),
        ({"fits": [FIT | {"costs": {"token": 1.0, "head": -2.0}}]}, {}, "fits.0.costs.head: .*greater than or equal"),
        ({"fits": [FIT | {"costs": {"token": 1.0, "heads": 2.0}}]}, {}, "costs.heads: unknown key .* mean head"),
    ],
)
def test_what_does_not_fit_in_a_file_is_one_line(profile, changes, question, message):
    path = profile(**changes)
    with pytest.raises(UserError, match=message) as caught:
        costs_for(Question(**{"stages": 2, "model": LARGE, "file": path} | question))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) <= LONGEST


def test_a_file_with_a_model_must_be_a_profile(profile, tmp_path):
    assert chosen_costs(2, "llama-3.1-8b", profile()).token == 3e-6
    (tmp_path / "model.yaml").write_text("layers: [1, 1]\ntoken: 1.0\n")
    with pytest.raises(UserError, match="either a model or a file with costs, found both; .*model.yaml is no profile"):
        chosen_costs(2, "llama-3.1-8b", tmp_path / "model.yaml")
    with pytest.raises(UserError, match=r"model.yaml: 2 stages, expected 3"):
        chosen_costs(3, costs=tmp_path / "model.yaml")


def test_a_profile_of_a_cpu_may_be_named_where_no_device_is(profile):
    assert chosen_costs(2, "llama-3.1-8b", profile(device="cpu", gpu_name=None)).token == 3e-6


def test_replicas_sum_the_gradients_of_the_jobs_that_step(profile, make_workload):
    """Over the links that hidden states take; a time that a file states is kept, but where there is one replica."""
    jobs = make_workload().jobs

    def reduction(replicas, file=None):
        return costs_for(Question(1, LARGE, file, data_parallel=replicas, jobs=jobs)).reduction

    gradients = 4 * sum(adapter_parameters(LARGE, job) for job in jobs) / len(jobs)
    assert reduction(1) == 0
    assert reduction(4) == pytest.approx(6 * (gradients / 4 / 300e9 + 10e-6 / 32))
    slow = FIT["costs"] | {"transfer": 2 * 4096 / 1e9}
    assert reduction(2, profile(fits=[FIT | {"costs": slow}])) == pytest.approx(gradients / 1e9)
    assert reduction(2, profile()) == pytest.approx(gradients / 300e9)  # whose links are not stated
    stated = profile(fits=[FIT | {"costs": slow | {"reduction": 0.5}}])
    assert [reduction(replicas, stated) for replicas in (1, 2, 8)] == [0, 0.5, 0.5]


def test_a_plan_of_replicas_is_simulated_with_the_sum_of_gradients(make_job, make_workload):
    workload = make_workload(make_job(lengths=(9, 9), rank=64))
    seconds = {}
    for replicas in (1, 2):
        plan = plan_system(workload, "lorafusion", stages=1, capacity=9, data_parallel=replicas)
        timeline, _ = simulate_plan(plan, workload, "llama-3.1-8b")
        seconds[replicas] = sum(end - start for kind, _, start, end in timeline.of(0) if kind == STEP)
    gradients = 4 * 32 * adapter_parameters(LARGE, workload.jobs[0])
    assert seconds[2] - seconds[1] == pytest.approx(gradients / 300e9 + 2 * 10e-6)


def test_the_recorded_profiles_are_sound():
    for name in config.names_in("machines"):
        fits = read_profile(config.config_path("machine", name)).fits
        assert len({(fit.model, fit.implementation) for fit in fits}) == len(fits)


def test_each_system_has_its_implementation_in_profiles():
    kinds = {name: system.implementation for name, system in read_systems().items()}
    assert (kinds["lorafusion"], kinds["peft"], kinds["peft-bf16"]) == ("fused", "peft-wide", "peft")
    assert (kinds["mlora"], kinds["unfused-ours"]) == ("looped", "looped")


def test_a_system_plans_by_costs_if_its_planner_takes_any(make_workload):
    workload = make_workload()
    for system in ("lorafusion", "mlora"):
        plans = [plan_system(workload, system, stages=1, capacity=16, costs=costs)
                 for costs in (None, model_costs(LARGE, 1))]  # fmt: skip
        assert (plans[0].key != plans[1].key) == (system == "lorafusion")
