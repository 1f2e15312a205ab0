"""Every system has the same work: the same tokens, labels, weights and LoRA parameters, whatever its order, its padding
and its kind."""

from __future__ import annotations

import functools
from collections import Counter
from itertools import product

import pytest
import torch

from lorafusion.core.config import read_model, read_systems
from lorafusion.core.plugins import load
from lorafusion.core.workload import ALL_LINEAR, MERGED, Job, Sample, Workload
from lorafusion.data.packing import IGNORE, BatchBuilder
from lorafusion.data.tokens import SyntheticTokens, Tokens
from lorafusion.lab.experiments.end_to_end import unavailable
from lorafusion.model.lora import inject_adapters, named_adapter_parameters
from lorafusion.model.merged import merge_qkv
from lorafusion.model.stage import Stage
from lorafusion.planning import plan_system

SYSTEMS = {name: system for name, system in read_systems().items() if not unavailable(system)}
TINY = read_model("tiny")
CPU = torch.device("cpu")
LENGTHS = (
    (19, 7, 33, 2, 26, 5, 14, 21, 9, 30, 17, 11),
    (40, 8, 15, 23, 6, 31, 10),
    (3, 2, 64, 4),
    (12,) * 9,
)


class Answers(SyntheticTokens):
    """Questions of any length before what is learnt, at most all but one token."""

    def tokens(self, job, sample):
        return Tokens(super().tokens(job, sample).ids, 1 + 7 * sample.id % (sample.tokens - 1))

    def labels(self, job, sample):
        return sample.tokens - self.tokens(job, sample).first_label


SOURCE = Answers(TINY.vocab_size)


def job(index, lengths, **changes) -> Job:
    fields = {
        "name": f"job-{index}", "dataset": "toy", "rank": 3 + index, "alpha": 8.0, "dropout": 0.1 * index,
        "seed": index + 1, "global_batch_size": 4, "samples": tuple(Sample(i, one) for i, one in enumerate(lengths)),
    }  # fmt: skip
    return Job(**(fields | changes))


ODD = (
    {"global_batch_size": 5, "epochs": 2},
    {"global_batch_size": 3, "start": 1},
    {"global_batch_size": 1},
    {"steps": 2},
)
WORKLOADS = {
    "one adapter": (job(0, LENGTHS[0]),),
    "four like adapters": tuple(job(index, LENGTHS[1]) for index in range(4)),
    "mixed lengths and batches": tuple(job(index, LENGTHS[index], **ODD[index]) for index in range(4)),
    "more adapters than stages": tuple(job(index, LENGTHS[index % 4], **ODD[-index % 4]) for index in range(6)),
}


def arrangements(system):
    for stages, replicas in product((1, 2, 3, 4), (1, 2)):
        if stages <= (system.max_stages or 4) and stages * replicas <= (system.max_gpus or 8):
            yield stages, replicas


def seen(workload, plan):
    """By adapter and place in its stream of samples what a run would be given: its real tokens' ids, labels, weights,
    places within the sample and within the stream; and how many tokens that are no sample's."""
    builder, found, padding = BatchBuilder(workload, SOURCE, CPU), {}, 0
    for microbatch in plan.microbatches:
        if microbatch.noop:
            continue
        batch = builder.build(microbatch)
        length = batch.input_ids.shape[1]
        assert length == microbatch.length <= plan.capacity
        begins = iter(batch.borders.offsets.tolist())
        for part in microbatch.segments:
            for position in part.samples:
                begin, tokens = next(begins), workload.jobs[part.adapter].sample_at(position).tokens
                row = slice(begin, begin + (microbatch.row_tokens or tokens))
                assert (batch.labels[row][tokens - 1 :] == IGNORE).all()
                padding += row.stop - row.start - tokens
                here = slice(begin, begin + tokens)
                assert (part.adapter, position) not in found
                found[part.adapter, position] = (
                    *(one[0, here].tolist() for one in (batch.input_ids, batch.position_ids)),
                    *(one[here].tolist() for one in (batch.labels, batch.weights, batch.positions)),
                )
        assert next(begins) == length
    return found, padding


@functools.cache
def due(name):
    """What the workload says, sample by sample, as `seen` has it."""
    workload, found = Workload(name="fair", jobs=WORKLOADS[name]), {}
    for adapter, one in enumerate(workload.jobs):
        for positions in one.batches[one.start :]:
            samples = {position: SOURCE.tokens(one, one.sample_at(position)) for position in positions}
            learnt = sum(len(tokens.ids) - tokens.first_label for tokens in samples.values())
            for position, (ids, first) in samples.items():
                ids, count = ids.tolist(), len(ids)
                labels = [IGNORE] * (first - 1) + ids[first:] + [IGNORE]
                offset = sum(one.sample_at(before).tokens for before in range(position))
                places = (list(range(count)), labels, [1 / learnt] * count, list(range(offset, offset + count)))
                found[adapter, position] = (ids, *places)
    return workload, found


@pytest.mark.parametrize("capacity", [64, 96])
@pytest.mark.parametrize("name", WORKLOADS)
@pytest.mark.parametrize("system", SYSTEMS)
def test_every_system_sees_the_same_samples(system, name, capacity):
    workload, expected = due(name)
    padded = "row_multiple" in SYSTEMS[system].options
    for stages, replicas in arrangements(SYSTEMS[system]):
        plan = plan_system(workload, system, stages=stages, capacity=capacity, data_parallel=replicas)
        found, padding = seen(workload, plan)
        assert found == expected
        assert plan.statistics.tokens == workload.tokens == sum(len(ids) for ids, *_ in expected.values())
        assert bool(padding) == padded


@pytest.mark.parametrize("name", WORKLOADS)
def test_every_system_makes_the_same_steps(name):
    workload, _ = due(name)
    for system, entry in SYSTEMS.items():
        for stages, replicas in arrangements(entry):
            plan = plan_system(workload, system, stages=stages, capacity=96, data_parallel=replicas)
            steps = Counter(adapter for one in plan.microbatches for adapter in one.step_after)
            assert steps == {index: len(one.batches) - one.start for index, one in enumerate(workload.jobs)}


PLACEMENTS = {
    "apart": (ALL_LINEAR, ("q_proj", "v_proj"), ("down_proj",)),
    "merged": ((MERGED, "o_proj"), (MERGED, *ALL_LINEAR[3:]), ("gate_proj",)),
}


def parameters(system, jobs, stages):
    """Each adapter's parameters on all stages, by their names in PEFT's format."""
    found = {one.name: {} for one in jobs}
    for index in range(stages):
        stage = Stage(TINY, index, stages)
        if Workload(name="fair", jobs=jobs).merges_qkv:
            merge_qkv(stage)
        inject_adapters(stage, jobs, torch.float64, load(SYSTEMS[system].lora, "LoRA kind"), CPU)
        for one in jobs:
            part = named_adapter_parameters(stage, one)
            assert all(parameter.requires_grad for parameter in part.values())
            assert not found[one.name].keys() & part.keys()
            found[one.name] |= part
        trained = {name for name, parameter in stage.named_parameters() if parameter.requires_grad}
        assert all(".lora_A." in name or ".lora_B." in name for name in trained)
    return found


@pytest.mark.parametrize("stages", [1, 3])
@pytest.mark.parametrize("modules", PLACEMENTS.values(), ids=PLACEMENTS)
def test_every_system_trains_the_same_parameters_from_the_same_values(modules, stages):
    jobs = tuple(job(index, LENGTHS[index], target_modules=one) for index, one in enumerate(modules))
    expected = parameters("peft-bf16", jobs, 1)
    for one, names in zip(jobs, modules, strict=True):
        assert len(expected[one.name]) == 2 * TINY.num_hidden_layers * len(names)
    assert all(bool(value.any()) == ("lora_A" in name) for one in expected.values() for name, value in one.items())
    kinds = {system.lora: name for name, system in SYSTEMS.items()}
    for system in kinds.values():
        found = parameters(system, jobs, min(stages, SYSTEMS[system].max_stages or stages))
        assert found.keys() == expected.keys()
        for one in jobs:
            assert found[one.name].keys() == expected[one.name].keys()
            assert all(torch.equal(value, expected[one.name][name]) for name, value in found[one.name].items())
