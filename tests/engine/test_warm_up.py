"""What is run before the clock starts."""

from __future__ import annotations

import functools
import weakref
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from lorafusion.core.config import read_systems
from lorafusion.core.plan import Microbatch, Segment
from lorafusion.core.plugins import load
from lorafusion.core.workload import Workload
from lorafusion.engine import fork_server
from lorafusion.engine.build import build_run
from lorafusion.engine.process import WorkerProcess
from lorafusion.engine.training import TrainingRun, of_each_size
from lorafusion.engine.warm_up import of_a_step, warm_up_executor
from lorafusion.lab.checks.toy_runs import toy_jobs
from lorafusion.launch.heartbeat import Position
from lorafusion.launch.spec import RunSpec
from lorafusion.planning import plan_system


def microbatch(*tokens: int) -> Microbatch:
    parts = tuple(Segment(adapter=index, samples=(0,), tokens=one) for index, one in enumerate(tokens))
    return Microbatch(segments=parts) if parts else Microbatch(noop=True)


@pytest.mark.parametrize(
    ("sizes", "most", "expected"),
    [
        ([(5,), (5,), (3,)], 9, [2, 0]),
        ([(5,), (2, 3), (), (4, 1)], 9, [0, 1]),  # as long, but of more adapters
        ([(5,), (3,)], 0, []),
        ([(length,) for length in range(9, 0, -1)], 3, [8, 5, 2]),
        ([(length,) for length in range(1, 11)], 4, [0, 3, 6, 9]),
        ([()], 9, []),
    ],
)
def test_a_microbatch_of_each_size_is_met(sizes, most, expected):
    assert of_each_size([microbatch(*one) for one in sizes], most) == expected


@pytest.mark.parametrize("arrangement", [(1, 1), (2, 1), (1, 2), (2, 3)])
@pytest.mark.parametrize("flush", [False, True])
def test_a_warm_up_step_is_a_step_of_the_first_job(arrangement, flush):
    stages, replicas = arrangement
    jobs = Workload(name="toy", jobs=toy_jobs(dropout=0.0))
    few = jobs.model_copy(update={"jobs": (jobs.jobs[0].model_copy(update={"samples": jobs.jobs[0].samples[:2]}),)})
    for workload in (jobs, few):
        plan = plan_system(workload, "fused-sequential" if flush else "lorafusion", stages=stages, capacity=96,
                           data_parallel=replicas)  # fmt: skip
        made, short = of_a_step(workload, plan)
        (slot,) = short.slots()
        assert (short.stages, short.flush, len(slot)) == (stages, flush, replicas)
        assert sum(not one.noop for one in slot) == min(replicas, len(workload.jobs[0].samples))
        assert [job.name for job in made.jobs] == [workload.jobs[0].name]
        assert made.jobs[0].learning_rate_at(0) == 0.0


@pytest.mark.parametrize("norms", [(None, None), (None, 0.5), (0.25, 0.5)])
def test_a_warm_up_step_clips_if_any_job_is_clipped(norms):
    jobs = [job.model_copy(update={"max_grad_norm": one}) for job, one in zip(toy_jobs(), norms, strict=False)]
    workload = Workload(name="toy", jobs=jobs)
    made, _ = of_a_step(workload, plan_system(workload, "lorafusion", stages=1, capacity=96))
    assert made.jobs[0].max_grad_norm == next((one for one in norms if one), None)


@pytest.mark.parametrize(
    ("system", "stages"),
    [("lorafusion", 1), ("lorafusion", 2), ("mlora", 2), ("peft", 1), ("megatron-pp", 1), ("megatron-pp", 2),
     ("megatron-fsdp", 1)],
)  # fmt: skip
def test_what_comes_before_the_clock_leaves_no_trace(tmp_path, system, stages):
    """In the file that training writes, all that it depends on: weights, gradients, moments, steps. The run
    of the warm-up step goes, with all its memory. Where there are processes to wait for, they met in it."""
    with ProcessPoolExecutor(stages, fork_server.FORKSERVER) as processes:
        for done in [processes.submit(_warm_up, tmp_path, system, stages, rank) for rank in range(stages)]:
            done.result()


def _warm_up(folder: Path, system: str, stages: int, rank: int) -> None:
    if stages > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=stages)
    execute, executed = load(read_systems()[system].executor, "executor"), []

    def noted(run: TrainingRun, *own: object) -> None:
        executed.append((weakref.ref(run), [job.name for job in run.workload.jobs]))
        execute(run, *own)

    functools.update_wrapper(noted, execute)

    meet, met = dist.barrier, []
    dist.barrier = lambda **given: met.append(given) or meet(**given)
    run = build(folder, system, stages, rank)
    before = state(run)
    warm_up_executor(run, noted)
    assert len(met) == dist.is_initialized()
    ((warm_up_step, jobs),) = executed
    assert jobs == [run.workload.jobs[0].name]
    assert warm_up_step() is None
    run.warm_up()
    after = state(run)
    assert list(before) == list(after)
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert not run.record.losses
    assert not run.record.done
    assert [adapter.steps for adapter in run.adapters] == [0] * len(run.adapters)
    if stages > 1:
        dist.destroy_process_group()


def build(folder: Path, system: str, stages: int, rank: int) -> TrainingRun:
    jobs = Workload(name="toy", jobs=toy_jobs(dropout=0.0))
    spec = RunSpec(system=system, model="tiny", workload="", device="cpu", dtype="float32", adapter_dtype="float32")
    plan = plan_system(jobs, system, stages=stages, capacity=96)
    return build_run(WorkerProcess(spec, torch.device("cpu"), Position(folder, rank), rank), jobs, plan)


def state(run: TrainingRun) -> dict[str, torch.Tensor]:
    return {
        f"{adapter.job.name}/{name}": value.clone()
        for adapter in run.adapters
        for name, value in adapter.state().items()
    }
