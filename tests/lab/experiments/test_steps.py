"""The experiment `steps`: what it refuses, that its arms train around the same weights, what its numbers are."""

from __future__ import annotations

import json
import re
import shlex
from functools import partial
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from typer.testing import CliRunner

from lorafusion.cli.main import app
from lorafusion.core.clock import Duration
from lorafusion.core.schema import UserError
from lorafusion.core.seals import seal
from lorafusion.lab import profiler
from lorafusion.lab.experiments import EXPERIMENTS, implementations, step_times
from lorafusion.lab.experiments.bench import Variant
from lorafusion.lab.experiments.step_times import Arms, seconds
from lorafusion.lab.experiments.steps_suite import StepsBench, workload_and_plan
from lorafusion.lab.experiments.trainers import Shared, Trainer
from lorafusion.lab.profiler import IDLE, KernelTotals, Span, at_full_speed, breakdown, busy_share, class_of
from lorafusion.lab.report.registry import FIGURES
from lorafusion.lab.table import table
from lorafusion.lab.table.table import MeasurementError
from lorafusion.launch.heartbeat import Position
from lorafusion.launch.outcome import FaultyRunError

BENCH = {"model": "tiny", "tokens": 64, "sample_tokens": 16, "microbatches": 2,
         "implementations": ["frozen", "peft-bf16", "fused-multi"], "adapters": [2]}  # fmt: skip
STEPS = EXPERIMENTS["steps"]
FROZEN, PEFT, MULTI = StepsBench(**BENCH).arms


@pytest.fixture
def suite(small_suite):
    return small_suite(STEPS, BENCH)


def shared_by(tmp_path, suite, bench):
    return Shared.of(bench, suite, Position(tmp_path, 0))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stage": [4, 4]}, r"stage must be an index and a count above it, found \[4, 4\]"),
        ({"stage": [0, 9]}, "9 stages, but model tiny has only 4 layers"),
        ({"model": "tinny"}, "small.benches.toy: unknown model 'tinny'"),
        ({"tokens": 80}, "tokens must be a multiple of sample_tokens x 2 adapters"),
        ({"adapters": [0]}, r"adapters.0: input should be greater than or equal to 1 \(found 0\)"),
        ({"adapters": [2, 2]}, "must name each arm once"),
        ({"token": 1}, "token: unknown key"),
    ],
)
def test_mistakes_in_the_file_are_named(suite, changes, message):
    with pytest.raises(UserError, match=message) as caught:
        suite(**changes)
    assert "\n" not in str(caught.value)


def test_the_suites_that_come_with_the_project_are_sound():
    assert {STEPS.more_outputs(point) for point in STEPS.points("smoke")} == {()}
    assert {STEPS.more_outputs(point)[0] for point in STEPS.points("h200")} == {".profile.csv"}
    known = STEPS.entry_of("h200")
    assert set(known.benches) == {"llama-3.1-8b", "qwen2.5-32b", "llama-3.1-70b-stage"}
    for bench in known.benches.values():
        for arm in bench.arms:
            assert {batch.tokens for batch in workload_and_plan(bench, arm)[1].microbatches} == {8192}


def test_a_bench_becomes_rows_of_the_table_and_a_figure(suite, tmp_path):
    path = tmp_path / "steps" / "runs" / "toy" / "repeat~1.json"
    command = ["lab", "run", "small", "--step", str(path)]
    assert CliRunner().invoke(app, command, catch_exceptions=False).exit_code == 0
    recorded = json.loads(path.read_text())["provenance"]["command"]
    assert shlex.split(recorded) == ["lorafusion", *command]
    frame = table.summarise(table.read_results([path]))
    table.validate(frame)
    rows = frame[(frame["statistic"] == "median") & ~frame["implementation"].str.startswith("canary")]
    assert set(rows["implementation"]) == {"frozen", "peft-bf16", "fused-multi"}
    values = rows.set_index(["implementation", "metric"])["value"]
    assert values["frozen", "throughput"] == pytest.approx(64 / values["frozen", "time"])
    assert {name for name, metric in values.index if metric == "overhead"} == {"peft-bf16", "fused-multi"}
    assert {name for name, metric in values.index if metric == "speedup"} == {"fused-multi"}
    files = FIGURES["steps_speed"].draw(frame, tmp_path / "speed")
    assert [file.suffix for file in files] == [".pdf", ".png", ".csv"]
    shown = pd.read_csv(files[2])
    assert list(shown["variant"]) == ["frozen", "peft-bf16", "fused-multi, 2 adapters"]
    with pytest.raises(MeasurementError, match="no median throughput"):
        FIGURES["steps_speed"].draw(frame[frame["metric"] == "loss"], tmp_path / "speed")


def test_arms_share_their_weights_and_nothing_else(suite, tmp_path):
    entry = suite()
    bench = entry.benches["toy"]
    shared = shared_by(tmp_path, entry, bench)
    expected = {weight.data_ptr() for weight in shared.stage.parameters()}
    runs = [Trainer(bench, arm, shared).run for arm in bench.arms]
    for run in runs:
        frozen = {weight.data_ptr() for weight in run.stage.parameters() if not weight.requires_grad}
        assert frozen == expected
    modules = [set(map(id, run.stage.modules())) for run in runs]
    assert not modules[0] & modules[1]
    assert not modules[1] & modules[2]


@pytest.mark.parametrize("stage", [(0, 1), (0, 4), (1, 4), (3, 4)])
def test_every_stage_trains_and_gradients_reach_a_frozen_ones_first_layer(suite, tmp_path, stage):
    entry = suite(stage=list(stage), checkpointing=0.5)
    bench = entry.benches["toy"]
    shared = shared_by(tmp_path, entry, bench)
    frozen, multi = (Trainer(bench, arm, shared) for arm in (FROZEN, MULTI))
    reached, first = [], next(iter(frozen.run.stage.model.layers.values()))
    first.self_attn.o_proj.register_full_backward_hook(lambda _module, inputs, _outputs: reached.append(inputs[0]))
    frozen.train()
    assert len(reached) == bench.microbatches
    assert all(gradient.any() for gradient in reached)
    before = [value.detach().clone() for value in multi.run.adapters[1].parameters.values()]
    multi.train()
    multi.finish()
    after = multi.run.adapters[1]
    assert after.steps_made() == bench.microbatches
    multi.seconds()
    multi.require_sound()
    assert not all(torch.equal(one, other) for one, other in zip(before, after.parameters.values(), strict=True))


def test_an_arm_without_memory_is_rows_without_values(suite, tmp_path, monkeypatch):
    inject = implementations.lora.inject_adapters

    def injected(stage, jobs, dtype, kind):
        if kind is implementations.lora.peft:
            raise torch.OutOfMemoryError("too large")
        return inject(stage, jobs, dtype, kind)

    monkeypatch.setattr(implementations.lora, "inject_adapters", injected)
    arms, rows = step_times.measure(STEPS.point("small", "toy"), 1, Position(tmp_path, 0))
    failed = [row for row in rows if row["status"] != "ok"]
    assert {row["metric"] for row in failed} == {"peak_memory", "time", "throughput", "overhead", "speedup"}
    assert all(row["status"] == "oom" and row["value"] is None and row["note"] == "too large" for row in failed)
    assert {row["implementation"] for row in failed} == {"peft-bf16"}
    assert set(arms.trainers) == {FROZEN, MULTI}
    assert not [row for row in rows if row["metric"] == "speedup" and row["status"] == "ok"]


def test_an_arm_that_does_not_train_is_rows_without_values(suite, tmp_path, monkeypatch):
    """Its gradients are not finite, which makes it neither slower nor faster."""
    built = Trainer.__init__

    def spoiled(trainer, bench, arm, shared):
        built(trainer, bench, arm, shared)
        if arm == PEFT:
            for parameter in trainer.run.adapters[0].parameters.values():
                parameter.register_hook(lambda gradient: gradient * float("nan"))

    monkeypatch.setattr(Trainer, "__init__", spoiled)
    arms, rows = step_times.measure(STEPS.point("small", "toy"), 1, Position(tmp_path, 0))
    assert set(arms.trainers) == {FROZEN, MULTI}
    assert arms.lost[PEFT][0] == "nan"
    assert re.fullmatch(r"\S+ made 0 of \d+ steps: it was stopped by a gradient that is not finite", arms.lost[PEFT][1])
    failed = [row for row in rows if row["status"] == "nan"]
    assert {row["metric"] for row in failed} == {"time", "throughput", "overhead", "speedup"}
    assert all(row["value"] is None for row in failed)


def test_an_arm_whose_clocks_disagree_has_no_time(suite, tmp_path):
    entry = suite()
    bench = entry.benches["toy"]
    trainer = Trainer(bench, MULTI, shared_by(tmp_path, entry, bench))
    trainer.seconds()
    trainer.require_sound()
    trainer.clocks.append(Duration(device=1.0, host=1.02))
    with pytest.raises(FaultyRunError, match="more than 1% apart"):
        trainer.require_sound()


def test_an_arm_that_runs_out_of_memory_later_leaves_the_others():
    def train(fails):
        if fails:
            raise torch.OutOfMemoryError("too large")
        return 1.0

    trainers = {arm: SimpleNamespace(seconds=partial(train, arm == PEFT)) for arm in (FROZEN, PEFT, MULTI)}
    arms = Arms(trainers)
    times = seconds(StepsBench(**BENCH), arms, torch.device("cpu"), 3, seed=1)
    assert times == {FROZEN: [1.0] * 3, MULTI: [1.0] * 3}
    assert arms.lost == {PEFT: ("oom", "too large")}


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("nvjet_tst_128x256_64x4_2x1_v_bz_coopB_TNN", "GEMM"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize64x64x64_cublas", "GEMM"),
        ("void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm_relu_bf16_128x256>", "GEMM"),
        ("void cublasLt::splitKreduce_kernel<32, 16, int, float>", "GEMM"),
        ("output_gemm_kernel", "GEMM"),
        ("input_gemm_kernel", "GEMM"),
        ("void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<>", "attention"),
        ("void cutlass::device_kernel<flash::enable_sm90<flash::FlashAttnFwdSm90>>", "attention"),
        ("mask_and_project_kernel", "LoRA"),
        ("finish_input_kernel", "LoRA"),
        ("output_pass_kernel", "LoRA"),
        ("expand_output_kernel", "LoRA"),
        ("pad_kernel", "LoRA"),
        ("gate_backward_kernel", "elementwise"),
        ("_rms_norm_forward_kernel", "elementwise"),
        ("_triton_rope", "elementwise"),
        (
            "void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<c10::BFloat16>>",
            "elementwise",
        ),
        ("void at::native::(anonymous namespace)::CatArrayBatchedCopy<>", "elementwise"),
        ("void at::native::(anonymous namespace)::fused_dropout_kernel_vec<>", "elementwise"),
        ("liger_cross_entropy_kernel", "loss"),
        ("void at::native::(anonymous namespace)::multi_tensor_apply_kernel<FusedAdamMathFunctor>", "optimizer"),
        ("Memcpy DtoH (Device -> Pinned)", "copies"),
        ("Memset (Device)", "copies"),
        ("something_new", "other"),
    ],
)
def test_kernels_are_told_apart_by_name(name, known):
    assert class_of(name) == known


def test_parts_add_up_to_the_time_from_the_first_kernel_to_the_last():
    """In ms: a GEMM of 4, a pass that began while it ran and ended 2 after it, 3 without work, a copy of 1; the pass
    within the GEMM costs nothing."""
    ms = 10**6
    spans = [Span("Memset", 9 * ms, 10 * ms), Span("nvjet", 0, 4 * ms), Span("pad_kernel", 1 * ms, 2 * ms),
             Span("output_pass_kernel", 3 * ms, 6 * ms)]  # fmt: skip
    parts = breakdown(spans, microbatches=2)
    assert {name: part.milliseconds for name, part in parts.items()} == {"GEMM": 2, "LoRA": 1, "copies": 0.5, IDLE: 1.5}
    assert (parts["LoRA"].kernels, parts[IDLE].kernels) == (1, 0)
    assert busy_share(parts) == pytest.approx(0.7)
    assert profiler.unknown_kernels([*spans, Span("new", 0, ms), Span("new", 0, ms)]) == ["no class: 2.000 ms of new"]


@pytest.mark.parametrize(("milliseconds", "idle"), [(9.0, 4.0), (5.0, 0.0), (4.9, 0.0)])
def test_what_is_idle_is_told_by_the_time_without_the_profiler(milliseconds, idle):
    parts = {"GEMM": KernelTotals(3.0, 7), IDLE: KernelTotals(8.0, 0), "LoRA": KernelTotals(2.0, 1)}
    assert at_full_speed(parts, milliseconds) == parts | {IDLE: KernelTotals(idle, 0)}
    assert at_full_speed({"GEMM": KernelTotals(5.0, 7)}, milliseconds)[IDLE] == KernelTotals(idle, 0)


def test_only_the_devices_work_is_taken_from_a_trace():
    def event(name, device, annotation=False):
        return SimpleNamespace(
            name=lambda: name,
            device_type=lambda: device,
            is_user_annotation=lambda: annotation,
            start_ns=lambda: 5,
            duration_ns=lambda: 7,
            correlation_id=lambda: 3,
        )

    cpu, cuda = torch.autograd.DeviceType.CPU, torch.autograd.DeviceType.CUDA
    events = [event("cudaLaunchKernel", cpu), event("nvjet", cuda), event("Optimizer.step#AdamW.step", cuda, True),
              event("Stream Sync", cuda)]  # fmt: skip
    assert profiler.device_spans(events) == [Span("nvjet", 5, 12, 3)]


def test_a_profile_is_drawn_by_implementation_and_before_and_after(suite, tmp_path):
    parts = breakdown([Span("nvjet", 0, 10**6), Span("new", 2 * 10**6, 3 * 10**6)], 1)
    paths = []
    for commit in ("a" * 40, "b" * 40):
        identity = {"suite": "small", "bench": "toy", "gpu_name": None, "git_sha": commit}
        rows = [
            one
            for arm in (FROZEN, Variant(implementation="fused-multi", adapters=4))
            for one in profiler.csv_rows(parts, **identity, **arm.model_dump())
        ]
        paths.append(tmp_path / f"{commit[0]}.csv")
        pd.DataFrame(rows, columns=step_times.PROFILE_COLUMNS).to_csv(paths[-1], index=False)
        seal(paths[-1])
    one = pd.read_csv(FIGURES["steps_profile"].draw([paths[0], paths[0]], tmp_path / "one")[2])
    assert list(one["variant"].unique()) == ["frozen", "fused-multi, 4 adapters"]
    assert list(one["milliseconds"][:3]) == [1, 1, 1]
    assert list(one["class"][:3]) == ["GEMM", "other", IDLE]
    both = pd.read_csv(FIGURES["steps_profile"].draw(paths, tmp_path / "both")[2])
    assert list(both["variant"].unique())[:2] == ["frozen\n" + "a" * 10, "frozen\n" + "b" * 10]
    paths[0].write_text("suite,bench\n")
    seal(paths[0])
    with pytest.raises(MeasurementError, match="no column"):
        FIGURES["steps_profile"].draw(paths[:1], tmp_path / "none")
