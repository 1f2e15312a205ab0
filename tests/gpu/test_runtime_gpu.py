"""The runtime on a GPU: the loss without whole logits, Liger's layer, runs that are killed, measured and spoilt."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml

from lorafusion.core.config import CONFIGS, read_model
from lorafusion.core.plan import Plan
from lorafusion.core.workload import Workload
from lorafusion.data.packing import IGNORE, SampleBorders
from lorafusion.engine.checkpoint import identity, newest
from lorafusion.engine.memory_probe import Measured, capacity_of
from lorafusion.engine.saving import HostCopy
from lorafusion.lab.checks.toy_runs import toy_jobs
from lorafusion.launch.launch import launch
from lorafusion.launch.spec import PROBE_MEMORY, RunSpec, Saving
from lorafusion.model.loss import CHUNK_ROWS, weighted_losses
from lorafusion.model.stage import build_stage
from lorafusion.planning import fast
from lorafusion.train.run import DONE, FAILED, train

GPU = torch.device("cuda")


@pytest.mark.parametrize("tokens", [1, 513, CHUNK_ROWS + 100])
@pytest.mark.parametrize("vocabulary", [1000, 128256])
def test_the_chunked_loss_equals_float64(tokens, vocabulary):
    """Losses and the gradient of the hidden states; error relative to eager bfloat16 over whole logits."""
    pytest.importorskip("liger_kernel", reason="Liger is not installed")
    generator = torch.Generator(GPU).manual_seed(0)
    hidden = torch.randn(1, tokens, 256, device=GPU, generator=generator).bfloat16()
    head = (torch.randn(vocabulary, 256, device=GPU, generator=generator) / 4).bfloat16()
    labels = torch.randint(vocabulary, (tokens,), device=GPU, generator=generator)
    labels[::7] = IGNORE
    weights = torch.rand(tokens, device=GPU, generator=generator, dtype=torch.float64) / tokens

    def whole(dtype):
        x = hidden.to(dtype).requires_grad_()
        logits = F.linear(x[0], head.to(dtype))
        accurate = torch.promote_types(dtype, torch.float32)
        losses = F.cross_entropy(logits.to(accurate), labels, ignore_index=IGNORE, reduction="none") * weights
        losses.sum().backward()
        return losses.detach().double(), x.grad.double()

    x = hidden.clone().requires_grad_()
    losses = weighted_losses(x, head, labels, weights)
    losses.sum().backward()
    exact, eager = whole(torch.float64), whole(torch.bfloat16)
    for name, ours, other, reference in zip(("loss", "gradient"), (losses.double(), x.grad.double()), eager, exact,
                                            strict=True):  # fmt: skip
        error, allowed = ((one - reference).square().mean().sqrt() for one in (ours, other))
        assert error <= 2 * allowed + 1e-9 * reference.abs().max(), f"{name}: {error:.3g} against {allowed:.3g}"
    with torch.no_grad():
        assert torch.equal(weighted_losses(hidden, head, labels, weights), losses.detach())
    rows = (labels != IGNORE).nonzero()[:, 0]
    leaf = hidden.clone().requires_grad_()
    some = weighted_losses(leaf, head, labels, weights, rows)
    some.sum().backward()
    torch.testing.assert_close((some, leaf.grad), (losses, x.grad), rtol=2e-2, atol=1e-2 * float(x.grad.abs().max()))
    assert not leaf.grad[0][labels == IGNORE].any()


@pytest.mark.parametrize("model", ["llama-3.1-8b", "qwen2.5-32b"])
def test_ligers_layer_equals_transformers_in_float64(model):
    """A layer with rotations, norms and gate by Liger; error relative to transformers' own in bfloat16."""
    pytest.importorskip("liger_kernel", reason="Liger is not installed")
    from lorafusion.model.liger import use_liger

    config = read_model(model).model_copy(update={"num_hidden_layers": 3})
    generator = torch.Generator(GPU).manual_seed(1)
    x = torch.randn(1, 700, config.hidden_size, device=GPU, generator=generator).bfloat16()
    borders = SampleBorders.of((130, 1, 569), GPU)
    places = torch.cat([torch.arange(length, device=GPU) for length in borders.lengths])[None]
    results = []
    for device, dtype, liger in (
        (GPU, torch.bfloat16, True),
        (GPU, torch.bfloat16, False),
        ("cpu", torch.float32, False),
    ):
        stage = build_stage(config, index=1, count=3, device=GPU, dtype=torch.bfloat16, seed=0)
        if liger:
            use_liger(stage)
        stage.to(device, dtype)
        leaf = x.detach().to(device, dtype, copy=True).requires_grad_()
        y = stage(leaf, places.to(device), SampleBorders.of(borders.lengths, torch.device(device)))
        y.backward(torch.ones_like(y))
        results.append([tensor.detach().cpu().double() for tensor in (y, leaf.grad)])
    for name, ours, eager, exact in zip(("y", "dx"), *results, strict=True):
        error, allowed = ((one - exact).square().mean().sqrt() for one in (ours, eager))
        assert error <= 1.5 * allowed, f"{name}: {error:.3g} against {allowed:.3g} of transformers' own"


@pytest.fixture
def spec(tmp_path):
    jobs = tuple(job.model_copy(update={"epochs": 4, "max_grad_norm": 0.5}) for job in toy_jobs())
    workload = Workload(name="toy", jobs=jobs)
    (tmp_path / "workload.json").write_text(workload.to_json())
    (tmp_path / "plan.json").write_text(fast.plan(workload, "lorafusion", 1, 96).to_json())
    return RunSpec(
        system="lorafusion", model="tiny", workload=str(tmp_path / "workload.json"), plan=str(tmp_path / "plan.json"),
        device="cuda", dtype="bfloat16", save_adapters=str(tmp_path / "adapters"), events=str(tmp_path / "events"),
        saving=Saving(folder=str(tmp_path / "checkpoints"), every=6),
    )  # fmt: skip


def test_a_run_is_saved_and_gone_on_from(spec):
    """What was computed twice, before and after, is the same to the rounding of bfloat16."""
    assert launch(spec, 1, 240).status == "ok"
    events = Path(spec.events) / "replica-0.jsonl"
    whole = [json.loads(line) for line in events.read_text().splitlines()]
    folder = Path(spec.saving.folder)
    found, _ = newest(folder, identity(spec, Plan.read(spec.plan).content_hash))
    (found.path / "manifest.json").unlink()  # as if the last one had not been finished
    again = launch(spec, 1, 240)
    assert again.status == "ok"
    for one, other in zip(whole, map(json.loads, events.read_text().splitlines()), strict=True):
        assert one == pytest.approx(other, rel=2e-2)


def test_what_microbatches_take_is_measured(spec, tmp_path):
    outcome = launch(
        spec.model_copy(update={"plan": None, "saving": None, "model": "llama-3.1-8b", "task": PROBE_MEMORY}), 1, 240
    )
    assert outcome.status == "ok", outcome.note
    [stage] = outcome.report["stages"]
    stage = Measured.from_json(stage)
    assert 15 * 2**30 < stage.whole.base < 20 * 2**30
    # A token keeps 2.9 MB of the 32 layers, and 0.3 MB where they are computed again (planning/memory.py).
    assert 2.0e6 < stage.whole.kept[1] < 4.0e6
    assert 0.2e6 < stage.recomputed.kept[1] < 0.6e6
    capacity, share = capacity_of([stage], 4096, None)
    assert capacity >= 8192
    assert share < 1


def test_the_command_trains_and_stops_what_is_no_number(tmp_path):
    """Capacity and checkpointing are found by measuring; one adapter is spoilt, and the others are as without it."""
    settings = yaml.safe_load((CONFIGS / "models" / "tiny.yaml").read_text())
    (tmp_path / "model.yaml").write_text(yaml.safe_dump(settings | {"hidden_size": 256, "intermediate_size": 512}))
    job = {"data": {"synthetic": {"samples": 60, "dataset": "xsum", "scale": 4}}, "rank": 8, "learning_rate": 1e-2}
    wild = {"name": "wild", "learning_rate": 100, "weight_decay": 100, "alpha": 1e6, "max_grad_norm": None}
    jobs = [job | {"name": "good"}, job | wild]
    losses = []
    for names in ("both", "alone"):
        path = tmp_path / f"{names}.yaml"
        file = {"model": "model.yaml", "output": names, "jobs": jobs if names == "both" else jobs[:1]}
        path.write_text(yaml.safe_dump(file))
        assert train(path) == (FAILED if names == "both" else DONE)
        lines = (tmp_path / names / "metrics.jsonl").read_text().splitlines()
        losses.append([row["loss"] for row in map(json.loads, lines) if row["job"] == "good"])
    assert losses[0][-1] < losses[0][0] / 2
    assert losses[0] == pytest.approx(losses[1], rel=5e-2)


def test_a_copy_of_four_adapters_is_of_its_moment_and_holds_the_device_up_for_a_tenth_of_a_second():
    """As many tensors as rank 16 has on Llama-3.1-8B, weights, gradients and moments, which are changed at once."""
    tensors = {str(index): torch.zeros(90_000, dtype=torch.bfloat16, device=GPU) for index in range(4 * 4 * 448)}
    copy = HostCopy(tensors, GPU)
    copy.take()
    copy.wait()
    begin = time.perf_counter()
    copy.take()
    torch._foreach_add_(list(tensors.values()), 1.0)
    torch.cuda.synchronize()
    seconds = time.perf_counter() - begin
    assert not any(bool(tensor.any()) for tensor in copy.tensors.values())
    assert seconds < 0.1
