"""An adapter's step: clipping in every dtype, and states that are there before it."""

from __future__ import annotations

import pytest
import torch

from lorafusion.checks import toy_jobs
from lorafusion.runtime import worker
from lorafusion.runtime.adapters import AdapterTraining
from lorafusion.runtime.board import Position
from lorafusion.runtime.spec import RunSpec
from lorafusion.scheduler import plan_system
from lorafusion.workload import Workload


@pytest.fixture
def adapter(tmp_path):
    def make(dtype: str, **changes) -> AdapterTraining:
        job = toy_jobs(dropout=0.0)[0].model_copy(update=changes)
        jobs = Workload(name="toy", jobs=(job,))
        spec = RunSpec(system="peft-bf16", model="tiny", workload="", device="cpu", dtype=dtype, adapter_dtype=dtype)
        plan = plan_system(jobs, "peft-bf16", stages=1, capacity=96)
        run = worker.build_run(spec, jobs, plan, torch.device("cpu"), Position(tmp_path, 0), 0)
        (one,) = run.adapters
        generator = torch.Generator().manual_seed(0)
        for gradient in one.gradients:
            gradient.copy_(torch.randn(gradient.shape, generator=generator))
        return one

    return make


def moments(adapter: AdapterTraining) -> torch.Tensor:
    """The first moments after a step, which are a tenth of the gradient that it saw, in one vector."""
    return torch.cat([state["exp_avg"].double().flatten() for state in adapter.optimizer.state.values()])


@pytest.mark.parametrize(("dtype", "precision"), [("float64", 1e-12), ("float32", 1e-6), ("bfloat16", 2**-8)])
@pytest.mark.parametrize("bound", [0.5, 1e6, None])
def test_a_step_sees_the_gradient_with_at_most_the_jobs_norm(adapter, dtype, precision, bound):
    one = adapter(dtype, max_grad_norm=bound)
    before = torch.cat([gradient.double().flatten() for gradient in one.gradients])
    norm = one.step(one.squared_norm())
    assert float(norm) == pytest.approx(float(before.norm()), rel=1e-6)
    factor = min(1.0, bound / (float(before.norm()) + 1e-6)) if bound else 1.0
    assert torch.allclose(moments(one), 0.1 * factor * before, rtol=2 * precision, atol=0)
    assert all(not gradient.any() for gradient in one.gradients)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
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
