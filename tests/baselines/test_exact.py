"""Every system, in every kind of arrangement that it has, trains what plain libraries train, to the last bits of a
float64. Without dropout: kinds that draw their masks from a generator draw others."""

from __future__ import annotations

import functools
from itertools import product

import pytest
import torch

from lorafusion.core.config import read_systems
from lorafusion.core.workload import MERGED, MERGED_PARTS, Workload
from lorafusion.lab import definitions, plain_training
from lorafusion.lab.checks.comparison import LOSS_TOLERANCE, WEIGHT_TOLERANCE, PlainReference, smallest_b
from lorafusion.lab.checks.toy_runs import EXACT, TrainingResult, toy_jobs, train, train_plainly
from lorafusion.lab.experiments.end_to_end import unavailable
from lorafusion.lab.suite import Arrangement
from lorafusion.planning import plan_system

pytestmark = pytest.mark.usefixtures("forked_runs")
SYSTEMS = {name: system for name, system in read_systems().items() if not unavailable(system)}
# Half of the second one's tokens are a prompt: of these no logits are made.
JOBS = tuple(
    job.model_copy(update={"prompt": share}) for job, share in zip(toy_jobs(dropout=0.0), (0, 0.5), strict=True)
)
OTHERS = ("o_proj", "gate_proj", "up_proj", "down_proj")
CAPACITY = 96


def arrangements(system) -> list[str]:
    """One process, and what of pipelining, replicas and recomputation the system can do, on two and on four."""
    if system.max_gpus == 1:
        return ["1x1"]
    if system.max_stages == 1:
        return ["1x1", "1x2"]  # on four below, where samples are fewer
    return ["1x1", "2x1", "4x1", "2x2+recompute"]


CASES = [(name, arrangement) for name, system in SYSTEMS.items() for arrangement in arrangements(system)]


def workload_of(jobs) -> Workload:
    return Workload(name="exact", jobs=jobs)


def trained(jobs, system, arrangement) -> TrainingResult:
    return train(workload_of(jobs), system, Arrangement.read(arrangement), CAPACITY)


@functools.cache
def plainly(jobs) -> TrainingResult:
    return train_plainly(jobs, EXACT, "float64")


def assert_equal(ours, plain, jobs):
    loss, weight = PlainReference(plain, None).errors(ours, jobs)
    assert loss <= LOSS_TOLERANCE
    assert weight <= WEIGHT_TOLERANCE


def assert_learnt(found, jobs):
    """Every B, zero at first, has moved, and the second epoch's losses are below the first's on the same samples. An
    optimizer that finds no gradients changes nothing, and says nothing either."""
    for job in jobs:
        assert smallest_b(found.weights[job.name]) > 1e-3
        losses, steps = found.losses[job.name], len(job.batches) // job.epochs
        assert all(after < before for before, after in zip(losses, losses[steps:], strict=False))


@pytest.mark.parametrize(("system", "arrangement"), CASES)
def test_a_system_trains_what_plain_libraries_train(system, arrangement):
    found = trained(JOBS, system, arrangement)
    assert_learnt(found, JOBS)
    assert_equal(found, plainly(JOBS), JOBS)


def idle_jobs():
    """Global batches of 3 + 1 and of 2 + 2 + 1 samples, the first adapter's gradients clipped over all replicas."""
    first, second = JOBS
    return (
        first.model_copy(update={"global_batch_size": 3, "samples": first.samples[:4], "max_grad_norm": 0.5}),
        second.model_copy(update={"global_batch_size": 2, "samples": second.samples[:5], "weight_decay": 0.1}),
    )


IDLE = idle_jobs()


@pytest.mark.parametrize(
    ("system", "arrangement"),
    [("megatron-fsdp", "1x2+recompute"), ("megatron-fsdp", "1x4"), ("megatron-pp", "1x2+recompute")],
)
def test_a_replica_without_a_microbatch_changes_nothing(system, arrangement):
    """Nor does the end of an adapter: the next one's samples wait for the next slot."""
    stages, replicas, _ = Arrangement.read(arrangement)
    plan = plan_system(workload_of(IDLE), system, stages=stages, capacity=CAPACITY, data_parallel=replicas)
    idle = [slot for slot in plan.slots() if any(part.noop for part in slot)]
    alone = [slot for slot in idle if sum(not part.noop for part in slot) == 1]
    assert alone  # the others have no sample at all of that global batch, or of that part of it
    found = trained(IDLE, system, arrangement)
    assert_learnt(found, IDLE)
    assert_equal(found, plainly(IDLE), IDLE)


def test_no_slot_of_a_flushing_plan_has_two_adapters():
    """Megatron trains one adapter after another: its executors have the gradients of one at a time."""
    for system, replicas in product(("megatron-fsdp", "megatron-pp", "fused-sequential"), (1, 2, 3, 4)):
        plan = plan_system(workload_of(IDLE), system, stages=1, capacity=CAPACITY, data_parallel=replicas)
        for slot in plan.slots():
            assert len({part.adapter for microbatch in slot for part in microbatch.segments}) == 1


def merged(job, modules):
    return job.model_copy(update={"target_modules": modules})


APART = tuple(merged(job, (*MERGED_PARTS, *rest)) for job, rest in zip(JOBS, (("o_proj",), OTHERS), strict=True))
TOGETHER = tuple(merged(job, (MERGED, *rest)) for job, rest in zip(JOBS, (("o_proj",), OTHERS), strict=True))


BUILD_MODEL = plain_training.build_model


def tied(*arguments):
    """`plain_training.build_model` with one A for q, k and v, which is what one adapter on the three together is;
    it begins as that of the merged linear does."""
    job, (whole, place) = arguments[0], BUILD_MODEL(*arguments)
    for name, attention in whole.base_model.model.named_modules():
        if name.endswith(".self_attn"):
            first = attention.q_proj.lora_A[plain_training.ADAPTER]
            begin = definitions.first_a(job, f"{name}.{MERGED}", first.in_features, torch.float64, torch.device("cpu"))
            first.weight.data.copy_(begin)
            for other in (attention.k_proj, attention.v_proj):
                other.lora_A[plain_training.ADAPTER] = first
    return whole, place


@functools.cache
def merged_plainly() -> TrainingResult:
    """Plain libraries with q, k and v apart and A in common, under the names that the merged linear has."""
    with pytest.MonkeyPatch.context() as patches:
        patches.setattr(plain_training, "build_model", tied)
        plain = train_plainly(APART, EXACT, "float64")
    return TrainingResult(plain.losses, {name: joined(state) for name, state in plain.weights.items()})


def joined(state):
    first, *others = (f".{part}." for part in MERGED_PARTS)
    out = {}
    for name, tensor in state.items():
        if first in name:
            parts = [tensor, *(state[name.replace(first, other)] for other in others)]
            assert "lora_B" in name or all(part.equal(tensor) for part in parts)
            out[name.replace(first, f".{MERGED}.")] = torch.cat(parts) if "lora_B" in name else tensor
        elif not any(other in name for other in others):
            out[name] = tensor
    return out


@pytest.mark.parametrize(
    ("system", "arrangement"),
    [
        ("peft-bf16", "1x1"),
        ("lorafusion", "2x1"),
        ("lorafusion", "1x2+recompute"),
        ("mlora", "2x1"),
        ("megatron-pp", "2x1"),
        ("megatron-fsdp", "1x2"),
    ],
)
def test_one_adapter_for_q_k_and_v_is_the_same_in_every_system(system, arrangement):
    found = trained(TOGETHER, system, arrangement)
    assert_learnt(found, TOGETHER)
    assert_equal(found, merged_plainly(), TOGETHER)
    # B is zero at first, so that the first loss is the base model's: the merged linear is the three.
    for job in JOBS:
        assert found.losses[job.name][0] == pytest.approx(plainly(JOBS).losses[job.name][0], rel=LOSS_TOLERANCE)
        assert found.losses[job.name][-1] != pytest.approx(plainly(JOBS).losses[job.name][-1], rel=1e-4)
