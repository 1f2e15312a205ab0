"""Unsloth's functions get the right modules and the right adapter. The package itself cannot run here: functions with
its signatures, in plain torch, stand in for it, and write the input's gradient over the input as its own do."""

from __future__ import annotations

import sys
import warnings
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from baselines.unsloth.lora import fast
from fused_lora import LoRABatch
from lorafusion.core.config import read_model, read_systems
from lorafusion.core.workload import ALL_LINEAR, Job, Sample
from lorafusion.data.packing import AdapterSegment, PackedBatch, SampleBorders
from lorafusion.lab.experiments.end_to_end import unavailable
from lorafusion.model import lora
from lorafusion.model.stage import build_stage

TINY = read_model("tiny")
QWEN = TINY.model_copy(update={"architecture": "qwen2"})
TOKENS = 24
QKV, O, MLP = "apply_lora_qkv", "apply_lora_o", "apply_lora_mlp_swiglu"


class Computed(torch.autograd.Function):
    """What `compute` makes of x and the factors, with a backward pass of its own that may write over x."""

    @staticmethod
    def forward(ctx, compute, inplace, x, *factors):
        ctx.compute, ctx.inplace = compute, inplace
        ctx.save_for_backward(x, *factors)
        return compute(x, *factors)

    @staticmethod
    def backward(ctx, *gradients):
        x, *factors = ctx.saved_tensors
        leaves = [one.detach().clone().requires_grad_() for one in (x, *factors)]
        with torch.enable_grad():
            outputs = ctx.compute(*leaves)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        dx, *others = torch.autograd.grad(outputs, leaves, gradients)
        return None, None, x.copy_(dx) if ctx.inplace else dx, *others


def stand_in(calls: list) -> ModuleType:
    """unsloth.kernels.fast_lora: the functions that take an attention or an MLP, and x."""

    def parameters(proj):
        assert not proj.disable_adapters
        assert not proj.merged
        name = proj.active_adapters[0]
        return proj.base_layer.weight, proj.lora_A[name].weight, proj.lora_B[name].weight, proj.scaling[name]

    def linear(x, weight, a, b, scaling):
        return x @ weight.T + (x @ a.T) @ (scaling * b.T)

    def applied(function, self, names, x, inplace, combine):
        calls.append((function, self.q_proj.active_adapters[0] if "q_proj" in names else None))
        parts = [parameters(getattr(self, name)) for name in names]

        def compute(x, *factors):
            pairs = zip(parts, factors[::2], factors[1::2], strict=True)
            return combine(x, [lambda x, w=w, s=s, a=a, b=b: linear(x, w, a, b, s) for (w, _, _, s), a, b in pairs])

        return Computed.apply(compute, inplace, x, *(one for _, a, b, _ in parts for one in (a, b)))

    def apply_lora_qkv(self, X, inplace=True):
        names = ("q_proj", "k_proj", "v_proj")
        return applied(QKV, self, names, X, inplace, lambda x, three: tuple(one(x) for one in three))

    def apply_lora_o(self, X):
        return applied(O, self, ("o_proj",), X, False, lambda x, one: one[0](x))

    def apply_lora_mlp_swiglu(self, X, inplace=True):
        names = ("gate_proj", "up_proj", "down_proj")
        return applied(MLP, self, names, X, inplace, lambda x, three: three[2](F.silu(three[0](x)) * three[1](x)))

    module = ModuleType("unsloth.kernels.fast_lora")
    vars(module).update({QKV: apply_lora_qkv, O: apply_lora_o, MLP: apply_lora_mlp_swiglu})
    return module


@pytest.fixture
def calls(monkeypatch):
    """The calls of the stand-in, which is installed."""
    made: list = []
    package, kernels = ModuleType("unsloth"), ModuleType("unsloth.kernels")
    kernels.fast_lora = stand_in(made)
    package.kernels = kernels
    modules = {"unsloth": package, "unsloth.kernels": kernels, "unsloth.kernels.fast_lora": kernels.fast_lora}
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    return made


def job(index, modules=ALL_LINEAR, dropout=0.0):
    return Job(
        name=f"job-{index}", dataset="none", rank=4 + index, alpha=7 + index, dropout=dropout, target_modules=modules,
        seed=index, global_batch_size=1, samples=(Sample(0, 2),),
    )  # fmt: skip


def results(kind, jobs, order, config=TINY, checkpointing=False):
    """Of microbatches of one adapter each: y, the gradient of x, and at the end those of the adapters."""
    stage = build_stage(config, index=1, count=config.num_hidden_layers, device=torch.device("cpu"), seed=1,
                        dtype=torch.float64, checkpointing=checkpointing)  # fmt: skip
    active = lora.inject_adapters(stage, jobs, torch.float64, kind)
    generator = torch.Generator().manual_seed(0)
    trained = [one for one in stage.parameters() if one.requires_grad]
    for parameter in trained:
        nn.init.normal_(parameter, std=0.3, generator=generator)
    for name, parameter in stage.named_parameters():
        if name.endswith(".bias"):
            nn.init.normal_(parameter, std=0.3, generator=generator)
    places, none = torch.arange(TOKENS), torch.empty(0)
    borders = SampleBorders.of((9, TOKENS - 9), places.device)
    found = []
    for index in order:
        segments = (AdapterSegment(0, TOKENS, index, 0),)
        active.batch = PackedBatch(none, places[None], none, none, borders, LoRABatch.of(segments, places), segments)
        x = torch.randn(1, TOKENS, config.hidden_size, generator=generator, dtype=torch.float64).requires_grad_()
        y = stage(x, active.batch.position_ids, borders)
        y.square().sum().backward()
        found += [y, x.grad]
    return found + [torch.zeros_like(one) if one.grad is None else one.grad for one in trained]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("config", [TINY, QWEN], ids=["llama", "qwen2"])
def test_it_computes_what_peft_computes(calls, config, checkpointing):
    jobs = (job(0), job(1), job(2, ("q_proj", "v_proj", "o_proj", "down_proj")))
    order = (0, 1, 2, 0)
    expected = results(lora.peft, jobs, order, config)
    assert not calls
    for ours, other in zip(results(fast, jobs, order, config, checkpointing), expected, strict=True):
        torch.testing.assert_close(ours, other, rtol=1e-10, atol=1e-10)
    passes = 2 if checkpointing else 1
    functions = [name for name, _ in calls]
    # Qwen2's q, k and v have biases; the third adapter is not on all of q, k, v nor on all of an MLP.
    assert functions.count(QKV) == (0 if config is QWEN else 3 * passes)
    assert functions.count(O) == 4 * passes
    assert functions.count(MLP) == 3 * passes
    if config is TINY and not checkpointing:
        assert [adapter for name, adapter in calls if name == QKV] == ["job-0", "job-1", "job-0"]


def test_adapters_with_dropout_have_pefts_forward_and_there_is_one_warning(calls):
    jobs = (job(0, dropout=0.1), job(1, dropout=0.2), job(2))
    with pytest.warns(UserWarning, match="PEFT's are used for job-0, job-1, as Unsloth") as caught:
        results(fast, jobs, (0, 1))
    assert len([one for one in caught if "unsloth" in str(one.message)]) == 1
    assert not calls
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        results(fast, (job(0),), (0,))
    assert {name for name, _ in calls} == {QKV, O, MLP}


def test_two_adapters_in_a_microbatch_are_refused(calls):
    stage = build_stage(TINY, index=1, count=4, device=torch.device("cpu"), seed=1, dtype=torch.float64)
    active = lora.inject_adapters(stage, (job(0), job(1)), torch.float64, fast)
    places, none = torch.arange(TOKENS), torch.empty(0)
    segments = (AdapterSegment(0, 9, 0, 0), AdapterSegment(9, TOKENS, 1, 0))
    borders = SampleBorders.of((9, TOKENS - 9), places.device)
    active.batch = PackedBatch(none, places[None], none, none, borders, LoRABatch.of(segments, places), segments)
    with pytest.raises(ValueError, match="one adapter a microbatch, found 2"):
        stage(torch.zeros(1, TOKENS, TINY.hidden_size, dtype=torch.float64), places[None], borders)


@pytest.mark.parametrize(("name", "package"), [("unsloth", "unsloth"), ("peft-liger", "liger_kernel")])
def test_optional_systems_are_skipped_with_their_reason(name, package, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert unavailable(read_systems()[name]) == f"the package {package} is not installed"


def test_the_arms_of_peft_differ_in_ligers_kernels_alone():
    systems = read_systems()
    base = systems["peft-bf16"].model_dump(exclude={"description"}) | {"ablation": True}
    assert systems["peft-transformers"].model_dump(exclude={"description"}) == base | {"liger": False}
    assert systems["peft-liger"].model_dump(exclude={"description"}) == base | {"requires": "liger_kernel"}
