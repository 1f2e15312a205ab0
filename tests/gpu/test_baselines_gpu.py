"""The systems on a GPU: nothing is compiled while the clock runs, nothing waits, and a step has few kernels. That they
train the same is test_checks_gpu.py's."""

from __future__ import annotations

import ctypes
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml

from lorafusion.core.config import CONFIGS, read_systems
from lorafusion.core.plugins import load
from lorafusion.data.lengths import make_workload
from lorafusion.engine.build import build_run
from lorafusion.engine.fork_server import FORKSERVER
from lorafusion.engine.process import WorkerProcess
from lorafusion.engine.training import TrainingRun
from lorafusion.engine.warm_up import warm_up_executor
from lorafusion.lab.profiler import trace
from lorafusion.launch.heartbeat import Position
from lorafusion.launch.spec import RunSpec
from lorafusion.planning import plan_system


@pytest.fixture
def large(tmp_path):
    """Makes a run of a system, as `make_large`."""
    return partial(make_large, tmp_path)


def make_large(folder: Path, system: str) -> TrainingRun:
    """A run on two layers of Llama-3.1-8B's size, with microbatches of many sizes, that is about to start."""
    data = yaml.safe_load((CONFIGS / "models" / "llama-3.1-8b.yaml").read_text()) | {"num_hidden_layers": 2}
    (folder / "model.yaml").write_text(yaml.safe_dump(data))
    jobs = make_workload(CONFIGS / "workloads" / "xsum.yaml", samples=12, global_batch=8, seed=1)
    clipped = tuple(job.model_copy(update={"max_grad_norm": 1.0}) for job in jobs.jobs)
    jobs = jobs.model_copy(update={"jobs": clipped})
    plan = plan_system(jobs, system, stages=1, capacity=8192)
    spec = RunSpec(system=system, model=str(folder / "model.yaml"), workload="", device="cuda", dtype="bfloat16",
                   adapter_dtype="bfloat16")  # fmt: skip
    run = build_run(WorkerProcess(spec, torch.device("cuda", 0), Position(folder, 0)), jobs, plan)
    warm_up_executor(run, executor(system))
    run.warm_up()
    return run


def executor(system: str):
    return load(read_systems()[system].executor, "executor")


@pytest.mark.parametrize("system", ["lorafusion", "fused-sequential", "mlora"])
def test_nothing_is_compiled_while_the_clock_runs(large, monkeypatch, system):
    triton = pytest.importorskip("triton")
    run, compiled = large(system), []

    def hook(*_, **said) -> None:
        compiled.append(said.get("repr"))

    monkeypatch.setattr(triton.knobs.runtime, "jit_post_compile_hook", hook)
    executor(system)(run)
    torch.cuda.synchronize()
    assert not compiled


@pytest.mark.parametrize("system", ["lorafusion", "fused-sequential", "mlora", "peft-bf16"])
def test_nothing_waits_for_the_device_while_the_clock_runs(large, system):
    run = large(system)
    torch.cuda.set_sync_debug_mode("error")
    try:
        executor(system)(run)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("system", ["megatron-pp", "megatron-fsdp"])
def test_the_start_needs_no_memory(tmp_path, system):
    """Not for NCCL, which has its own, where torch's allocator keeps what the warm-up took."""
    with ProcessPoolExecutor(1, FORKSERVER) as processes:
        processes.submit(start_without_memory, tmp_path, system).result()


def start_without_memory(folder: Path, system: str) -> None:
    run, driver, address = make_large(folder, system), ctypes.CDLL("libcuda.so.1"), ctypes.c_uint64()
    for size in (2**30, 2**21, 2**10):
        while driver.cuMemAlloc_v2(ctypes.byref(address), ctypes.c_size_t(size)) == 0:
            pass
    assert torch.distributed.is_initialized()
    run.pipeline.wait_for_everyone()
    torch.cuda.synchronize()


@pytest.mark.parametrize("system", ["lorafusion", "peft-bf16", "peft"])
def test_a_step_has_few_kernels(large, system):
    """Not one for each of an adapter's 28 tensors here, of 448 in the whole model."""
    run = large(system)
    adapter = run.adapters[0]
    spans = trace(lambda: adapter.step(adapter.squared_norm()))
    assert 0 < len(spans) < 28
