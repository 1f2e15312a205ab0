"""Where the time of a run goes: by a clock that the test knows, and with a stage, a host and messages that are slow."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from lorafusion.engine import fork_server, timed
from lorafusion.engine.adapters import AdapterTraining
from lorafusion.engine.training import TrainingRun
from lorafusion.lab.table.idle import stages_of
from tests.engine.test_timed import ONE_OF_EACH, build, executor, planned, result
from tests.known_meter import KnownMeter

BACKWARD, STEP, HOST = 3.0, 5.0, 7.0  # seconds of a backward pass, of an adapter's step, of making a batch
DELAY = 0.3  # seconds


def slower(meter: KnownMeter, function: Callable, seconds: float) -> Callable:
    """A function after which so much time has passed."""

    def called(*arguments, **options):
        value = function(*arguments, **options)
        meter.now += seconds
        return value

    return called


@pytest.mark.parametrize("system", ONE_OF_EACH)
def test_all_time_is_where_it_was_spent(tmp_path, monkeypatch, system):
    """A token's forward pass takes a second."""
    meter = KnownMeter(seconds=1.0)
    run = build(tmp_path, system, meter=meter)
    monkeypatch.setattr(TrainingRun, "_begin_backward", slower(meter, TrainingRun._begin_backward, BACKWARD))
    monkeypatch.setattr(AdapterTraining, "step", slower(meter, AdapterTraining.step, STEP))
    monkeypatch.setattr(run._builder, "build", slower(meter, run._builder.build, HOST))
    with meter.watching():
        timed.timed(run, executor(system))
    found = result(run)
    tokens, count = sum(part.length for part in run.plan.microbatches), len(run.plan.microbatches)
    whole = tokens + count * (BACKWARD + HOST) + 6 * STEP
    assert found["clocks"] == [{"device": whole, "host": whole}]
    [stage] = found["stages"]
    assert stage == pytest.approx({
        "stage": 0, "replica": 0, "forward": tokens, "backward": count * BACKWARD, "step": 6 * STEP, "wait": 0.0,
        "bubble": 0.0, "host": count * HOST / whole, "neighbour": 0.0,
    })  # fmt: skip
    shares = {row["metric"]: row["value"] for row in found["metrics"]}
    assert shares["host_idle"] == pytest.approx(count * HOST / whole)
    assert shares["bubble"] == shares["neighbour_idle"] == 0
    [times] = found["times"]
    assert times["forward"][:3] == [0, 1e6 * HOST, 1e6 * (HOST + run.plan.microbatches[0].length)]
    slots = [index for index in range(count) for _ in range(3)]
    assert [slots[place] for place in range(0, 3 * count, 3)] == times["forward"][::3] == times["backward"][::3]


def test_a_long_training_keeps_no_times(tmp_path):
    run = build(tmp_path, "lorafusion")
    timed.timed(run, executor("lorafusion"), lambda: setattr(run.record, "kept", False) or ())
    assert run.record.spans == []


# --- Two processes; what is slow in one of them is put down to its cause in both


def slow(function: Callable) -> Callable:
    def called(*arguments):
        time.sleep(DELAY)
        return function(*arguments)

    return called


def slow_stage(run: TrainingRun) -> None:
    run.stage.register_forward_pre_hook(lambda *_: time.sleep(DELAY))


def slow_host(run: TrainingRun) -> None:
    run._builder.build = slow(run._builder.build)


def slow_messages(run: TrainingRun) -> None:
    run.pipeline.send_after, run.pipeline.send_before = slow(run.pipeline.send_after), slow(run.pipeline.send_before)


STREAM, MEGATRON, SHARDED = SYSTEMS = ("mlora-packed", "megatron-pp", "megatron-fsdp")
STAGES = dict(zip(SYSTEMS, (2, 2, 1), strict=True))


@pytest.mark.parametrize(
    ("system", "spoiled", "rank", "causes"),
    [
        (STREAM, slow_stage, 1, {0: "bubble"}),
        (STREAM, slow_stage, 0, {1: "bubble"}),
        (STREAM, slow_host, 1, {0: "neighbour", 1: "host"}),
        (STREAM, slow_host, 0, {0: "host", 1: "neighbour"}),
        (STREAM, slow_messages, 0, {0: "host", 1: "neighbour"}),
        (STREAM, slow_messages, 1, {0: "neighbour", 1: "host"}),
        (MEGATRON, slow_stage, 1, {0: "bubble"}),
        (MEGATRON, slow_host, 0, {0: "host", 1: "neighbour"}),
        (MEGATRON, slow_host, 1, {0: "neighbour", 1: "host"}),
    ],
)
def test_what_is_slow_is_the_cause(tmp_path, system, spoiled, rank, causes):
    stages = _trained(tmp_path, system, spoiled, rank)
    for stage, cause in causes.items():
        shares = {name: stages[stage][name] for name in ("bubble", "host", "neighbour")}
        assert max(shares, key=shares.__getitem__) == cause, stages
        assert shares[cause] > 0.3


def test_sharded_replicas_do_not_work_while_they_wait_within_a_pass(tmp_path):
    """They meet at each layer, so both spend the same time in a pass of which one was late."""
    slow, other = _trained(tmp_path, SHARDED, slow_stage, 0)
    slots = len(planned(SHARDED, replicas=2)[1].slots())
    assert slow["forward"] - other["forward"] == pytest.approx(slots * DELAY, rel=0.3)
    assert other["wait"] - slow["wait"] == pytest.approx(slots * DELAY, rel=0.3)
    assert other["bubble"] > slow["bubble"]


def _trained(folder: Path, system: str, spoiled: Callable, rank: int) -> list[dict]:
    """The stages of two processes of which one is spoiled."""
    with ProcessPoolExecutor(2, fork_server.FORKSERVER) as processes:
        done = [processes.submit(_train, folder, system, of, spoiled if of == rank else None) for of in range(2)]
        return [part.result(timeout=120) for part in done][0]


def _train(folder: Path, system: str, rank: int, spoiled: Callable | None) -> list[dict]:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    run = build(folder, system, STAGES[system], rank, replicas=2 // STAGES[system])
    timed.timed(run, executor(system), lambda: (spoiled and spoiled(run)) or ())
    schedule = "sharded" if run.around else None
    found = stages_of(timed.report_of(run), run.plan, schedule)
    dist.destroy_process_group()
    return found
