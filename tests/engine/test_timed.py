"""Every system is warmed up, timed and reported on by one function, and the report says what was trained."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from lorafusion.core.config import read_systems
from lorafusion.core.plan import Plan
from lorafusion.core.plugins import load
from lorafusion.core.workload import Workload
from lorafusion.engine import fork_server, timed, worker
from lorafusion.engine.adapters import AdapterTraining
from lorafusion.engine.build import build_run
from lorafusion.engine.process import WorkerProcess
from lorafusion.engine.training import TrainingRun
from lorafusion.lab import trials
from lorafusion.lab.checks.toy_runs import toy_jobs
from lorafusion.lab.table.result import result_of
from lorafusion.launch.heartbeat import Position
from lorafusion.launch.outcome import FaultyRunError, Outcome
from lorafusion.launch.spec import RunSpec
from lorafusion.planning import plan_system
from tests.known_meter import KnownMeter

# One job of each kind of executor; the first is ours.
ONE_OF_EACH = ("lorafusion", "mlora", "peft", "megatron-pp", "megatron-fsdp")


@pytest.fixture(autouse=True)
def _leaves_no_group():
    """Megatron's executors make a process group, if only of this process."""
    yield
    if dist.is_initialized():
        parallel_state = sys.modules["megatron.core.parallel_state"]
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def executor(system: str) -> Callable:
    return load(read_systems()[system].executor, "executor")


def planned(system: str, stages: int = 1, replicas: int = 1) -> tuple[Workload, Plan]:
    jobs = Workload(name="toy", jobs=tuple(job.model_copy(update={"epochs": 1}) for job in toy_jobs(dropout=0.0)))
    return jobs, plan_system(jobs, system, stages=stages, capacity=96, data_parallel=replicas)


def build(
    folder: Path, system: str, stages: int = 1, rank: int = 0, meter: KnownMeter | None = None, replicas: int = 1
) -> TrainingRun:
    jobs, plan = planned(system, stages, replicas)
    spec = RunSpec(system=system, model="tiny", workload="", device="cpu", dtype="float32", adapter_dtype="float32")
    return build_run(WorkerProcess(spec, torch.device("cpu"), Position(folder, rank), rank, meter=meter), jobs, plan)


def result(run: TrainingRun) -> dict:
    report = timed.report_of(run) | {"canary": {}}
    return result_of(Outcome("ok", report=report), run.workload, run.plan, {}, {})


class Diary(KnownMeter):
    """What is done with a run, in its order; what is repeated stands once."""

    def __init__(self) -> None:
        super().__init__(seconds=1.0)
        self.lines: list[str] = []

    def note(self, line: str) -> None:
        if self.lines[-1:] != [line]:
            self.lines.append(line)

    def noted(self, owner: object, name: str, line: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """Have calls of a function stand between two lines, or at one where nothing comes between."""
        original = getattr(owner, name)

        def function(*arguments, **options):
            self.note(f"{line} begins")
            value = original(*arguments, **options)
            self.note(f"{line} ends")
            return value

        monkeypatch.setattr(owner, name, function)

    def point(self):
        self.note("clock")
        return super().point()

    def synchronize(self) -> None:
        self.note("synchronized")

    def passed(self, tokens: int) -> None:
        self.note("work")

    def reset_peak_memory(self) -> None:
        self.note("reset")
        super().reset_peak_memory()


BEFORE = [
    "executor begins", "work", "synchronized", "barrier begins", "barrier ends", "executor ends",
    "warm-up begins", "work", "synchronized", "warm-up ends",
    "placed",
    "reset", "barrier begins", "barrier ends", "synchronized", "clock",
]  # fmt: skip
AFTER = ["clock", "synchronized"]


@pytest.mark.parametrize("system", ONE_OF_EACH)
def test_what_comes_before_and_after_the_clock_is_the_same_for_every_system(tmp_path, monkeypatch, system):
    diary = Diary()
    run = build(tmp_path, system, meter=diary)
    diary.noted(timed, "warm_up_executor", "executor", monkeypatch)
    diary.noted(TrainingRun, "warm_up", "warm-up", monkeypatch)
    diary.noted(TrainingRun, "wait_for_everyone", "barrier", monkeypatch)

    def step(adapter, *arguments, original=AdapterTraining.step):
        if adapter.job.learning_rate:  # not in the warm-up step
            diary.note("step")
        return original(adapter, *arguments)

    monkeypatch.setattr(AdapterTraining, "step", step)
    with diary.watching():
        assert timed.timed(run, executor(system), lambda: diary.note("placed") or ())
    assert diary.lines[: len(BEFORE)] == BEFORE
    assert diary.lines[-len(AFTER) :] == AFTER
    trained = diary.lines[len(BEFORE) : -len(AFTER)]
    assert trained == ["work", "step"] * (len(trained) // 2)
    assert len(trained) > 2


def test_every_executor_of_the_systems_is_tried():
    systems = read_systems()
    assert {system.executor for system in systems.values()} == {systems[name].executor for name in ONE_OF_EACH}


@pytest.mark.parametrize("system", ONE_OF_EACH)
def test_the_clock_sees_the_runs_own_tokens_and_nothing_else(tmp_path, system):
    """A token takes 1/8 s wherever it passes through the stage, also before the clock starts."""
    meter = KnownMeter(seconds=0.125, memory=1000)
    run = build(tmp_path, system, meter=meter)
    with meter.watching():
        timed.timed(run, executor(system))
    report = timed.report_of(run)
    tokens = sum(microbatch.length for microbatch in run.plan.microbatches)
    assert report["clocks"] == [[tokens / 8, tokens / 8]]
    assert report["seconds"][-1] == [len(run.plan.microbatches) - 1, tokens / 8]
    assert report["peak_memory"] == 1000 * max(microbatch.length for microbatch in run.plan.microbatches)
    assert report["steps"] == {"job-0": 3, "job-1": 3}
    assert report["stopped"] == []
    assert result(run)["status"] == "ok"


def test_a_host_that_disagrees_is_seen(tmp_path):
    meter = KnownMeter(seconds=0.125, host=1.02)
    run = build(tmp_path, "lorafusion", meter=meter)
    with meter.watching():
        timed.timed(run, executor("lorafusion"))
    assert "more than 1% apart" in result(run)["note"]


def test_on_a_cpu_both_clocks_are_one(tmp_path):
    run = build(tmp_path, "lorafusion")
    timed.timed(run, executor("lorafusion"))
    [[device, host]] = timed.report_of(run)["clocks"]
    assert device == host > 0


def spoil(run: TrainingRun, name: str) -> None:
    """Have every gradient of a factor be NaN."""
    for parameter_name, parameter in run.adapters[0].parameters.items():
        if name in parameter_name:
            parameter.register_hook(lambda gradient: gradient * float("nan"))


@pytest.mark.parametrize("factor", ["lora_A", "lora_B"])
def test_a_run_whose_gradients_are_not_finite_is_not_ok(tmp_path, factor):
    """Its losses are finite, as no weight ever changes."""
    run = build(tmp_path, "mlora")
    timed.timed(run, executor("mlora"), lambda: spoil(run, factor) or ())
    found = result(run)
    assert (found["status"], found["metrics"]) == ("nan", [])
    assert found["note"] == "job-0 made 0 of 3 steps: it was stopped by a gradient that is not finite"
    assert all(value is not None for values in found["losses"].values() for value in values)


def test_a_trial_whose_gradients_are_not_finite_has_no_throughput(tmp_path):
    run = build(tmp_path, "mlora")
    spoil(run, "lora_A")
    with pytest.raises(FaultyRunError, match="job-0 made 0 of 3 steps") as caught:
        trials._throughput(run, executor("mlora"))
    assert worker.status_of(caught.value) == "nan"


def test_a_trial_is_timed_as_a_run_is(tmp_path):
    meter = KnownMeter(seconds=0.125)
    run = build(tmp_path, "mlora", meter=meter)
    with meter.watching():
        throughput = trials._throughput(run, executor("mlora"))
    padded = sum(microbatch.length for microbatch in run.plan.microbatches)
    assert throughput == pytest.approx(8 * run.workload.tokens / padded)
    assert padded > run.workload.tokens


def skip_last_step(run: TrainingRun) -> None:
    adapter = run.adapters[1]
    count, step = itertools.count(1), adapter.step
    adapter.step = lambda norm: step(norm) if next(count) < 3 else norm.sqrt()


def forget_a_loss(run: TrainingRun) -> None:
    run.record.losses = _Forgetful()


class _Forgetful(list):
    """Of losses: the second is lost."""

    def append(self, item) -> None:
        super().append(item)
        if len(self) == 2 and not hasattr(self, "done"):
            self.done = True
            self.pop()


@pytest.mark.parametrize(
    ("spoiled", "note"),
    [(skip_last_step, "job-1 made 2 of 3 steps"), (forget_a_loss, "is missing or in part")],
)
def test_what_was_not_done_is_told(tmp_path, spoiled, note):
    run = build(tmp_path, "peft-bf16")
    timed.timed(run, executor("peft-bf16"), lambda: spoiled(run) or ())
    assert result(run)["status"] == "crash"
    assert note in result(run)["note"]


def test_steps_are_those_while_the_clock_ran(tmp_path):
    """An adapter that begins with moments of earlier steps."""
    run = build(tmp_path, "lorafusion")

    def placed():
        for adapter in run.adapters:
            for state in adapter.optimizer.state.values():
                state["step"].fill_(40)
        return ()

    timed.timed(run, executor("lorafusion"), placed)
    assert timed.report_of(run)["steps"] == {"job-0": 3, "job-1": 3}


# --- Two processes, of which the second is the one to tell about.


def test_the_report_is_of_all_processes(tmp_path):
    """On the first a token's forward pass takes a second and a byte, on the second three of each. There are 355 tokens,
    at most 71 in a microbatch."""
    reports = in_two_processes(tmp_path, {})
    assert reports[0] == reports[1]
    (first, _), (second, _) = reports[0]["clocks"]
    assert second == 3 * first == 3 * 355
    assert reports[0]["peak_memory"] == 3 * 71
    assert reports[0]["status"] == "ok"


@pytest.mark.parametrize("rank", [0, 1])
def spoil_gradients(run: TrainingRun) -> None:
    spoil(run, "lora_A")


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(
    ("spoiled", "status", "note"),
    [
        (spoil_gradients, "nan", "job-0 made 0 of 3 steps: it was stopped by a gradient"),
        (skip_last_step, "crash", "job-1 made 2 of 3 steps"),
    ],
)
def test_what_one_stage_did_not_do_is_told(tmp_path, spoiled, status, note, rank):
    for report in in_two_processes(tmp_path, {rank: spoiled}):
        assert report["status"] == status
        assert note in report["note"]


@pytest.mark.parametrize(
    ("spoiled", "status", "note"),
    [
        (forget_a_loss, "crash", "is missing or in part"),
        (skip_last_step, "crash", "job-1 made 2 of 3 steps"),
        (None, "ok", ""),
    ],
)
def test_what_one_replica_did_not_do_is_told(tmp_path, spoiled, status, note):
    for report in in_two_processes(tmp_path, {1: spoiled} if spoiled else {}, stages=1):
        assert report["status"] == status
        assert note in report["note"]


def nothing(run: TrainingRun) -> None:
    pass


def in_two_processes(folder: Path, spoiled: dict[int, Callable[[TrainingRun], None]], stages: int = 2) -> list[dict]:
    with ProcessPoolExecutor(2, fork_server.FORKSERVER) as processes:
        done = [processes.submit(_train_a_part, folder, rank, stages, spoiled.get(rank, nothing)) for rank in range(2)]
        return [one.result(timeout=120) for one in done]


def _train_a_part(folder: Path, rank: int, stages: int, spoiled: Callable[[TrainingRun], None]) -> dict:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    meter = KnownMeter(seconds=float(1 + 2 * rank), memory=1 + 2 * rank)
    run = build(folder, "mlora-packed", stages, rank, meter, replicas=2 // stages)
    with meter.watching():
        timed.timed(run, executor("mlora-packed"), lambda: spoiled(run) or ())
    found = result(run)
    report = timed.report_of(run) | {"status": found["status"], "note": found["note"]}
    dist.destroy_process_group()
    return report
