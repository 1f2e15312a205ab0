"""The same path on a GPU: packed attention, the LoRA reference, and whole runs of every system."""

from __future__ import annotations

import pytest
import torch

from fused_lora import LoRAAdapter, LoRASegment, keep_mask, lora_linear
from lorafusion.core.config import read_model, read_systems
from lorafusion.core.plugins import load
from lorafusion.core.workload import Workload
from lorafusion.data.packing import SampleBorders
from lorafusion.lab.checks.toy_runs import toy_jobs
from lorafusion.lab.table.result import result_of
from lorafusion.launch.launch import launch
from lorafusion.launch.spec import RunSpec
from lorafusion.model.attention import packed_attention
from lorafusion.model.stage import build_stage

GPU = torch.device("cuda")
LENGTHS = (130, 1, 257, 64, 3)


def borders(device):
    return SampleBorders.of(LENGTHS, device)


@pytest.mark.parametrize(("heads", "kv_heads"), [(8, 8), (8, 2), (40, 8)])
def test_variable_length_attention_equals_the_masked_one(heads, kv_heads):
    """Output and gradients in bfloat16, against float64 masked attention on the CPU; error relative to eager bf16."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, heads, sum(LENGTHS), 64), *[(1, kv_heads, sum(LENGTHS), 64)] * 2]
    inputs = [torch.randn(shape, generator=generator, dtype=torch.float64).bfloat16() for shape in shapes]
    results = []
    for device, dtype in (
        (GPU, torch.bfloat16),
        (torch.device("cpu"), torch.bfloat16),
        (torch.device("cpu"), torch.float64),
    ):
        leaves = [tensor.to(device, dtype).requires_grad_() for tensor in inputs]
        out, _ = packed_attention(torch.nn.Module(), *leaves, None, borders=borders(device), scaling=64**-0.5)
        weight = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape).to(device, dtype)
        grads = torch.autograd.grad(out, leaves, weight)
        results.append([tensor.detach().cpu().double() for tensor in (out, *grads)])
    for name, ours, eager, exact in zip(("out", "dq", "dk", "dv"), *results, strict=True):
        error, allowed = ((run - exact).square().mean().sqrt() for run in (ours, eager))
        assert error <= 2 * allowed, f"{name}: {error:.3g} against {allowed:.3g} in eager bfloat16"


def test_masks_are_bitwise_those_of_the_cpu():
    positions = torch.arange(513) * 7 + 2**34
    ours = keep_mask(0xDEADBEEFCAFEF00D, positions.to(GPU), 4099, 0.1).cpu()
    assert torch.equal(ours, keep_mask(0xDEADBEEFCAFEF00D, positions, 4099, 0.1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_lora_reference_equals_the_cpu_in_float64(dtype):
    generator = torch.Generator().manual_seed(1)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    x, weight, factors = normal(300, 129), normal(77, 129), [normal(5, 129), normal(77, 5)]
    outputs = []
    for device, kind in ((GPU, dtype), (torch.device("cpu"), torch.float64)):
        leaves = [tensor.to(device, kind).requires_grad_() for tensor in (x, *factors)]
        adapter = LoRAAdapter(leaves[1], leaves[2], 2.0, 0.2, 99)
        segments, positions = [LoRASegment(10, 290, 0)], torch.arange(300, device=device)
        y = lora_linear(leaves[0], weight.to(device, kind), None, [adapter], segments, positions)
        grads = torch.autograd.grad(y, leaves, torch.ones_like(y))
        outputs.append([tensor.detach().cpu().double() for tensor in (y, *grads)])
    for name, ours, exact in zip(("y", "dx", "da", "db"), *outputs, strict=True):
        bound = 1e-2 if dtype == torch.bfloat16 else 1e-5
        assert (ours - exact).norm() <= bound * exact.norm(), name


def trained(tmp_path, system, **changes):
    workload = Workload(name="toy", jobs=toy_jobs(dropout=0.0))
    plan = load(read_systems()[system].planner, "planner")(workload, system, 1, 96)
    (tmp_path / "workload.json").write_text(workload.to_json())
    (tmp_path / "plan.json").write_text(plan.to_json())
    paths = {"workload": str(tmp_path / "workload.json"), "plan": str(tmp_path / "plan.json")}
    outcome = launch(RunSpec(system=system, model="tiny", device="cuda", **paths, **changes), 1, 120)
    assert outcome.status == "ok", outcome.note
    assert result_of(outcome, workload, plan, {}, {})["status"] == "ok"
    return outcome.report


@pytest.mark.parametrize("system", ["lorafusion", "mlora", "megatron-pp", "peft"])
def test_every_system_trains_in_bfloat16(tmp_path, system):
    if system == "megatron-pp":
        pytest.importorskip("megatron.core", reason="megatron-core is not installed")
    report = trained(tmp_path, system, dtype="bfloat16", adapter_dtype="bfloat16")
    assert report["peak_memory"] > 0
    assert all(values[-1] < values[0] for values in report["losses"].values())


def test_systems_agree_in_bfloat16(tmp_path):
    """Losses of the first global batches, before rounding has had time to lead them apart."""
    losses = {
        system: trained(tmp_path, system, dtype="bfloat16", adapter_dtype="float32")["losses"]
        for system in ("lorafusion", "peft")
    }
    for job, values in losses["lorafusion"].items():
        assert values[:2] == pytest.approx(losses["peft"][job][:2], rel=1e-2)


def test_an_allocation_that_does_not_fit_is_out_of_memory(tmp_path):
    import yaml

    from lorafusion.core.config import CONFIGS

    data = yaml.safe_load((CONFIGS / "models" / "llama-3.1-70b.yaml").read_text()) | {"num_hidden_layers": 200}
    (tmp_path / "huge.yaml").write_text(yaml.safe_dump(data))
    workload = Workload(name="toy", jobs=toy_jobs())
    plan = load(read_systems()["lorafusion"].planner, "planner")(workload, "lorafusion", 1, 96)
    (tmp_path / "workload.json").write_text(workload.to_json())
    (tmp_path / "plan.json").write_text(plan.to_json())
    spec = RunSpec(
        system="lorafusion",
        model=str(tmp_path / "huge.yaml"),
        workload=str(tmp_path / "workload.json"),
        plan=str(tmp_path / "plan.json"),
        device="cuda",
        dtype="bfloat16",
    )
    assert launch(spec, 1, 240).status == "oom"


def test_a_layer_of_the_large_models_runs():
    """One decoder layer of each published size, forward and backward, on 4096 packed tokens."""
    for name in ("llama-3.1-8b", "qwen2.5-32b", "llama-3.1-70b"):
        config = read_model(name)
        stage = build_stage(config, index=1, count=config.num_hidden_layers, device=GPU, dtype=torch.bfloat16, seed=0)
        x = torch.randn(1, 4096, config.hidden_size, device=GPU, dtype=torch.bfloat16, requires_grad=True)
        position_ids = torch.cat([torch.arange(1000), torch.arange(3096)])[None].to(GPU)
        stage(x, position_ids, SampleBorders.of((1000, 3096), GPU)).sum().backward()
        assert x.grad.isfinite().all()
