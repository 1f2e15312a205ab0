"""An adapter's step: clipping in every dtype, and states that are there before it."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch

from lorafusion.core.workload import Workload
from lorafusion.engine.adapters import AdapterTraining
from lorafusion.engine.build import build_run
from lorafusion.engine.process import WorkerProcess
from lorafusion.lab.checks.toy_runs import toy_jobs
from lorafusion.launch.heartbeat import Position
from lorafusion.launch.spec import RunSpec
from lorafusion.planning import plan_system


def build(folder: Path, dtype: str, device: str = "cpu", **changes) -> AdapterTraining:
    """A toy job's adapter on the tiny model, with gradients that are the same on every device."""
    job = toy_jobs(dropout=0.0)[0].model_copy(update=changes)
    jobs = Workload(name="toy", jobs=(job,))
    spec = RunSpec(system="peft-bf16", model="tiny", workload="", device=device, dtype=dtype, adapter_dtype=dtype)
    plan = plan_system(jobs, "peft-bf16", stages=1, capacity=96)
    run = build_run(WorkerProcess(spec, torch.device(device), Position(folder, 0)), jobs, plan)
    (one,) = run.adapters
    generator = torch.Generator().manual_seed(0)
    for gradient in one.gradients:
        gradient.copy_(torch.randn(gradient.shape, generator=generator))
    return one


@pytest.fixture
def adapter(tmp_path):
    return partial(build, tmp_path)


def moments(adapter: AdapterTraining) -> torch.Tensor:
    """The first moments after a step, which are a tenth of the gradient that it saw, in one vector."""
    return torch.cat([state["exp_avg"].double().flatten() for state in adapter.optimizer.state.values()])


@pytest.mark.parametrize(
    ("dtype", "precision"), [("float64", 1e-12), ("float32", 1e-6), ("bfloat16", 2**-8), ("float16", 1e-6)]
)
@pytest.mark.parametrize("bound", [0.5, 1e6, None])
def test_a_step_sees_the_gradient_with_at_most_the_jobs_norm(adapter, dtype, precision, bound):
    one = adapter(dtype, max_grad_norm=bound)
    before = torch.cat([gradient.double().flatten() for gradient in one.gradients])
    norm = one.step(one.squared_norm())
    assert float(norm) == pytest.approx(float(before.norm()), rel=1e-6)
    factor = min(1.0, bound / (float(before.norm()) + 1e-6)) if bound else 1.0
    assert torch.allclose(moments(one), 0.1 * factor * before, rtol=2 * precision, atol=0)
    assert all(not gradient.any() for gradient in one.gradients)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("bound", [0.5, None])
@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_a_gradient_that_is_not_finite_changes_nothing_for_good(adapter, dtype, bound, bad):
    one = adapter(dtype, max_grad_norm=bound)
    one.step(one.squared_norm())
    kept = {name: value.clone() for name, value in one.state().items() if not name.endswith("/gradient")}
    for value in (bad, 1.0):
        one.gradients[0].fill_(value)
        one.step(one.squared_norm())
    after = one.state()
    assert bool(after.pop("stopped"))
    assert not bool(kept.pop("stopped"))
    assert all(torch.equal(after[name], value) for name, value in kept.items())
    assert one.steps_made() == 1


def test_the_states_are_there_before_the_first_step(adapter):
    one = adapter("float32")
    state = one.state()
    assert {name.rpartition("/")[2] for name in state} == {"stopped", "weight", "gradient", "exp_avg", "exp_avg_sq",
                                                           "optimizer_steps"}  # fmt: skip
    assert one.steps_made() == 0
    one.step(one.squared_norm())
    assert one.steps_made() == 1


def trained(one: AdapterTraining, scale: float, steps: range) -> dict[str, torch.Tensor]:
    """The weights after steps on gradients of this size, which are the same in every dtype."""
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for gradient in one.gradients:
            gradient.copy_((scale * torch.randn(gradient.shape, generator=generator)).half())
        one.step(one.squared_norm())
    return {name: value.float() for name, value in one.state().items() if name.endswith("/weight")}


@pytest.mark.parametrize("dtype", ["float64", "bfloat16", "float16"])
def test_an_adapter_begins_with_the_same_numbers_in_every_dtype(adapter, dtype):
    one, other = adapter("float32").parameters, adapter(dtype).parameters
    assert all(torch.equal(other[name], parameter.to(getattr(torch, dtype))) for name, parameter in one.items())


@pytest.mark.parametrize("bound", [0.5, None])
@pytest.mark.parametrize("scale", [1e-2, 1e-4, 1e-6])
def test_a_float16_adapter_is_trained_as_a_float32_one_is(adapter, scale, bound):
    """Its weights are rounded, and nothing else: also where a gradient's square is zero in float16."""
    changes = {"max_grad_norm": bound, "learning_rate": 1e-3, "weight_decay": 0.1}
    one, half = adapter("float32", **changes), adapter("float16", **changes)
    before = {name: value.clone() for name, value in one.state().items()}
    exact, half = trained(one, scale, range(12)), trained(half, scale, range(12))
    for name, value in exact.items():
        rounded = (before[name].half().float() - before[name]).abs() + 2**-11 * value.abs()
        assert ((half[name] - value).abs() <= rounded + 1e-7).all(), name
    assert max(value.abs().max() for name, value in half.items() if "lora_B" in name) < 0.02


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_what_is_gone_on_with_ends_in_the_same_bits(adapter, dtype):
    changes = {"max_grad_norm": 0.5, "learning_rate": 1e-3}
    whole = adapter(dtype, **changes)
    trained(whole, 1e-3, range(12))
    first, second = adapter(dtype, **changes), adapter(dtype, **changes)
    trained(first, 1e-3, range(5))
    second.load({name: value.clone() for name, value in first.state().items()}, first.steps)
    trained(second, 1e-3, range(5, 12))
    expected, found = whole.state(), second.state()
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
