"""Proposals: what fits, groups with adapters of their own, GPUs that stay idle, and reasons where nothing fits."""

from __future__ import annotations

import itertools

import pytest

from lorafusion.cli.proposal import print_choices
from lorafusion.core.config import CONFIGS, read_model
from lorafusion.core.schema import UserError
from lorafusion.core.workload import Workload
from lorafusion.data.lengths import make_workload
from lorafusion.planning.groups import makespan, places
from lorafusion.planning.memory import GIB, WORKSPACE, PipelineMemory
from lorafusion.planning.propose import GPU_HOURS, PREFERENCES, THROUGHPUT, Choice, Cluster, Search, with_links
from lorafusion.planning.simulator import model_costs
from lorafusion.planning.simulator.costs import adapter_parameters


def workload_of(adapters: int, samples: int = 64, batch: int = 16, name: str = "mixed") -> Workload:
    """Adapters of the workload of that name, again and again, of as many, half and a quarter of the samples."""
    jobs = make_workload(CONFIGS / "workloads" / f"{name}.yaml", samples=samples, global_batch=batch, seed=1).jobs
    more = (
        jobs[index % len(jobs)].model_copy(
            update={"name": f"a{index}", "samples": jobs[index % len(jobs)].samples[: samples >> index % 3]}
        )
        for index in range(adapters)
    )
    return Workload(name=f"{adapters}-adapters", jobs=tuple(more))


def choices_of(
    workload: Workload,
    model: str,
    gpus: int,
    gib: float = 80,
    checkpointing: bool = False,
    prefer: str = THROUGHPUT,
    **cluster,
) -> list[Choice]:
    config = read_model(model)

    def costs(stages):
        return model_costs(config, stages, checkpointing=checkpointing)

    place = Cluster(gpus, int(gib * GIB), **cluster)
    return Search(workload, config, place, costs, checkpointing, prefer=prefer).choices()


@pytest.mark.parametrize(
    ("adapters", "model", "gpus", "gib", "checkpointing"),
    [
        (4, "llama-3.1-8b", 4, 80, False),
        (4, "llama-3.1-8b", 7, 80, False),
        (30, "llama-3.1-8b", 24, 40, True),
        (12, "llama-3.1-70b", 16, 141, True),
        (300, "llama-3.1-8b", 64, 80, False),
        (300, "llama-3.1-8b", 2, 80, False),
    ],
)
def test_a_choice_fits_has_each_adapter_once_and_accounts_for_each_gpu(adapters, model, gpus, gib, checkpointing):
    workload, config = workload_of(adapters), read_model(model)
    choices = [c for c in choices_of(workload, model, gpus, gib, checkpointing) if not c.reason]
    places = [(choice.nodes > 1, choice.makespan) for choice in choices]
    assert places == sorted(places)
    longest = max(sample.tokens for job in workload.jobs for sample in job.samples)
    for choice in choices:
        assert choice.at_once * choice.stages * choice.data_parallel + choice.idle == gpus
        assert choice.at_once <= choice.groups
        assert sorted(itertools.chain(*choice.members)) == list(range(adapters))
        assert len(choice.members) == len(choice.times) == choice.groups
        assert choice.makespan == makespan(choice.times, choice.at_once)
        assert choice.throughput == pytest.approx(workload.tokens / choice.makespan)
        size = choice.stages * choice.data_parallel
        assert choice.gpu_hours == pytest.approx(sum(choice.times) * size / 3600)
        assert longest <= choice.capacity <= choice.largest_capacity
        costs = model_costs(config, choice.stages, checkpointing=checkpointing)
        memory = PipelineMemory(config, costs, gib * GIB, checkpointing)
        used = [
            memory.most_used(sum(adapter_parameters(config, workload.jobs[job]) for job in jobs), choice.capacity)
            for jobs in choice.members
        ]
        assert WORKSPACE < max(used) == choice.memory <= 0.94 * gib * GIB


@pytest.mark.parametrize(
    ("adapters", "model", "checkpointing"), [(10, "llama-3.1-8b", False), (5, "llama-3.1-70b", True)]
)
def test_more_gpus_are_never_slower(adapters, model, checkpointing):
    workload, shortest = workload_of(adapters, samples=64, batch=8), float("inf")
    for gpus in (3, 5, 7, 8, 9, 16, 17, 32):
        makespan = choices_of(workload, model, gpus, 141, checkpointing)[0].makespan
        assert makespan <= 1.02 * shortest, gpus
        shortest = min(shortest, makespan)


def test_prompts_leave_room_for_larger_microbatches():
    workload = workload_of(4)
    prompts = workload.model_copy(
        update={"jobs": tuple(job.model_copy(update={"prompt": 0.9}) for job in workload.jobs)}
    )
    (whole, *_), (less, *_) = (choices_of(item, "llama-3.1-8b", 1) for item in (workload, prompts))
    assert less.largest_capacity > whole.largest_capacity


def test_many_adapters_are_divided_into_groups():
    """250 adapters of 8B on 256 GPUs: a gang waits, and reduces gradients between nodes."""
    choices = choices_of(workload_of(250), "llama-3.1-8b", 256)
    gang = next(choice for choice in choices if choice.groups == 1)
    chosen = choices[0]
    assert chosen.groups > 30
    assert chosen.throughput > 1.2 * gang.throughput


def test_gpus_stay_idle_where_numbers_do_not_divide():
    """70B needs three GPUs here, and a pipeline of seven waits for the only adapter."""
    choices = choices_of(workload_of(1, batch=4, name="xsum"), "llama-3.1-70b", 7, 80, True)
    chosen = choices[0]
    assert (chosen.stages * chosen.data_parallel * chosen.groups, chosen.idle) == (6, 1)
    whole = [choice for choice in choices if not choice.idle and not choice.reason]
    assert whole
    assert min(choice.makespan for choice in whole) > chosen.makespan


def test_the_guide_quotes_what_is_proposed(capsys):
    """The table of the guide, and the array of Slurm tasks that follows from its first row."""
    choices = choices_of(workload_of(250, samples=128), "llama-3.1-8b", 256)
    print_choices(choices)
    printed = {line.rstrip() for line in capsys.readouterr().out.splitlines()}
    guide = (CONFIGS.parent / "docs" / "guide" / "many-gpus.md").read_text()
    table = guide.split("\n groups  at once")[1].split("```")[0].splitlines()[1:]
    assert {row for row in table if row != "..."} <= printed
    best, *_ = choices
    size = best.stages * best.data_parallel
    assert f"sbatch --array=0-{best.groups - 1} --gpus-per-node={size} " in guide
    assert f"`--array=0-{best.groups - 1}%{best.groups // 2}` half" in guide


@pytest.mark.parametrize(
    ("adapters", "model", "gpus", "gib"), [(4, "llama-3.1-8b", 8, 80), (12, "llama-3.1-70b", 8, 141)]
)
def test_the_cheapest_way_leaves_gpus_to_others_and_is_the_fastest_of_those_that_cost_as_much(
    adapters, model, gpus, gib
):
    """The stages of 70B have bubbles, which more adapters on fewer GPUs fill."""
    workload = workload_of(adapters, samples=32)
    fast, cheap = (choices_of(workload, model, gpus, gib, True, prefer) for prefer in (THROUGHPUT, GPU_HOURS))
    every = [choice for choice in (*fast, *cheap) if not choice.reason and choice.nodes == 1]
    least = min(choice.gpu_hours for choice in every)
    assert least <= cheap[0].gpu_hours <= 1.03 * least
    assert cheap[0].makespan <= min(c.makespan for c in every if c.gpu_hours <= cheap[0].gpu_hours)
    assert fast[0].makespan <= 1.005 * min(choice.makespan for choice in every)
    assert cheap[0].idle > fast[0].idle
    assert cheap[0].gpu_hours < 0.99 * fast[0].gpu_hours


@pytest.mark.parametrize("prefer", PREFERENCES)
def test_there_is_a_place_for_each_group(prefer):
    """Ten GPUs would do for three pipelines of three stages, but a node of five holds one."""
    choices = choices_of(workload_of(12, samples=16), "llama-3.1-70b", 10, 80, True, prefer, per_node=5)
    sizes = {(choice.at_once, choice.stages * choice.data_parallel) for choice in choices if not choice.reason}
    assert sizes
    assert all(at_once <= places(10, size, 5) for at_once, size in sizes)


def test_an_unknown_preference_is_named():
    with pytest.raises(UserError, match=r"plan propose: unknown preference 'gpus'; known: gpu-hours, throughput"):
        choices_of(workload_of(1), "llama-3.1-8b", 1, prefer="gpus")


def test_reducing_gradients_takes_time_by_the_link():
    """Four replicas of one adapter, whose GPUs are linked fast, slowly, and very slowly."""
    workload, links, times = workload_of(1, samples=64, batch=4), (300e9, 4e9, 4e8), []
    for link in links:
        choices = choices_of(workload, "llama-3.1-8b", 4, link=link)
        times.append(next(c.makespan for c in choices if (c.stages, c.data_parallel) == (1, 4)))
    # 42 million parameters of 4 bytes, of which a ring of four sends six quarters; 16 steps.
    rings = [16 * 1.5 * 4 * 41.9e6 / link for link in links]
    assert times[1] - times[0] == pytest.approx(rings[1] - rings[0], rel=0.05)
    assert times[2] - times[0] == pytest.approx(rings[2] - rings[0], rel=0.05)


def test_between_nodes_the_network_counts():
    config = read_model("llama-3.1-8b")
    plain, costs = model_costs(config, 4), {}
    for per_node in (1, 4, 16):
        cluster = Cluster(16, 80 * GIB, per_node, link=400e9, network=20e9)
        costs[per_node] = with_links(plain, config, cluster, 4, 1e6)
    assert costs[1].reduction == costs[4].reduction > 10 * costs[16].reduction > 0
    assert costs[1].transfer == pytest.approx(2 * 4096 / 20e9)
    assert costs[4].transfer == costs[16].transfer == plain.transfer
    assert with_links(plain, config, cluster, 1, 1e6).reduction == 0


def test_what_spans_nodes_is_not_what_can_be_trained():
    choices = choices_of(workload_of(4), "llama-3.1-8b", 8, per_node=2)
    assert {choice.nodes for choice in choices} > {1, 4}
    assert choices[0].nodes == 1


def test_checkpointing_makes_room_and_takes_time():
    plain, again = (choices_of(workload_of(4), "llama-3.1-70b", 4, 141, on)[0] for on in (False, True))
    assert again.largest_capacity > 2 * plain.largest_capacity
    assert again.makespan > plain.makespan


def test_no_more_tokens_are_proposed_than_a_groups_global_batches_have():
    """All that memory holds would be many times as much, and its GiB not those that are used."""
    jobs = workload_of(3, samples=32, batch=4).jobs
    short = tuple(job.model_copy(update={"samples": job.samples[:8]}) for job in jobs)
    most = sum(max(job.batch_tokens(batch) for batch in range(len(job.batches))) for job in short)
    for choice in choices_of(Workload(name="short", jobs=short), "llama-3.1-8b", 2, 5000):
        assert choice.capacity <= most < choice.largest_capacity / 10
        assert choice.memory < 1000 * GIB


@pytest.mark.parametrize(
    ("adapters", "model", "gpus", "gib", "reason"),
    [
        (4, "llama-3.1-70b", 1, 80, "1 GPUs of 80 GiB: nothing fits; 1 stage: the weights do not fit: 131.4 GiB"),
        (4, "llama-3.1-70b", 8, 80, "8 stages: holds 2560 tokens even without adapters, a sample has 3737; try check"),
        (4, "llama-3.1-70b", 4, 1, "the weights do not fit"),
    ],
)
def test_where_nothing_fits_the_reason_is_said(adapters, model, gpus, gib, reason):
    with pytest.raises(UserError, match=reason):
        choices_of(workload_of(adapters), model, gpus, gib)


def test_adapters_that_do_not_fit_at_once_train_one_group_after_another():
    """The states of 300 adapters of 8B take 188 GiB, and eight GPUs of 40 GiB have half of that beside the weights."""
    chosen, *_ = choices_of(workload_of(300), "llama-3.1-8b", 8, 40)
    assert chosen.groups > chosen.at_once
    assert chosen.makespan < 1.1 * sum(chosen.times) / chosen.at_once


def test_an_adapter_that_fits_nowhere_is_the_reason():
    (job, *_) = workload_of(1).jobs
    workload = Workload(name="large", jobs=(job.model_copy(update={"rank": 256}),))
    with pytest.raises(UserError, match="1 stage: an adapter's states do not fit beside the weights: 10.0 GiB"):
        choices_of(workload, "llama-3.1-8b", 1, 24, True)


def test_stages_that_do_not_fit_have_their_reason():
    by_stages = {choice.stages: choice for choice in choices_of(workload_of(4), "llama-3.1-70b", 4, 80, True)}
    assert by_stages[1].reason == "the weights do not fit: 131.4 GiB"
    assert not by_stages[4].reason


def test_a_timeline_is_of_the_first_batches_of_the_slowest_group():
    workload, config = workload_of(30, samples=400), read_model("llama-3.1-8b")
    search = Search(workload, config, Cluster(8, 80 * GIB), lambda stages: model_costs(config, stages))
    chosen, *_ = search.choices()
    plan, timeline = search.timeline(chosen, "lorafusion")
    assert (plan.stages, plan.data_parallel) == (chosen.stages, chosen.data_parallel)
    assert timeline.tokens.sum() == plan.statistics.tokens < workload.tokens
    assert plan.statistics.lower_bound
