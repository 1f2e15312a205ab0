"""Errors in how plans are packed, searched and judged."""

from __future__ import annotations

import numpy as np

from tests.planted.plant import planted

FAST = "tests/planning/test_fast.py"


@planted(
    "lorafusion.planning.fast:Trials._targets",
    caught_by=f"{FAST}::test_a_capacity_above_all_that_is_in_hand_is_not_filled",
)
def targets_are_parts_of_the_capacity(original):
    """Tokens of a microbatch are tried down to a sixth of the capacity, however little the jobs have in hand."""
    return lambda trials, model: (trials.capacity * part // 100 for part in (75, 55, 40, 30, 22, 16))


@planted(
    "lorafusion.planning.fast:Trials._ramp",
    caught_by=f"{FAST}::test_the_first_and_the_last_microbatches_are_smaller_where_many_follow_each_other",
)
def ramps_are_level(original):
    """The first and the last microbatches are as large as all the others."""
    return lambda trials, model, target, begin, length: original(trials, model, target, 1, length)


@planted("lorafusion.planning.fast:_rounded", caught_by=f"{FAST}::test_targets_are_whole_tiles")
def targets_are_any_number_of_tokens(original):
    """Microbatches are filled to a few tokens more than a number of tiles."""
    return lambda tokens, model: max(1, round(tokens))


@planted(
    "lorafusion.planning.simulator.stream:_passes",
    caught_by="tests/planning/simulator/test_stream.py::test_empty_slots_may_be_left_out",
)
def empty_slots_that_are_left_out_take_no_turn(original):
    """The simulator takes slots between which there are empty ones for neighbours."""
    return lambda stages, busy, turns: original(stages, busy, np.arange(len(turns)))


SHARING = "tests/planning/simulator/test_sharing.py"


@planted(
    "lorafusion.planning.simulator.sharing:speed",
    caught_by=(
        f"{SHARING}::test_on_one_core_every_schedule_takes_as_long_as_its_work",
        f"{SHARING}::test_a_pipeline_on_fewer_cores_takes_longer_and_no_less_than_its_work",
    ),
)
def every_process_has_a_core(original):
    """Four processes on two cores are predicted to go as fast as four on four."""
    return lambda costs, busy: 1.0


COMPLETION = "tests/planning/test_completion.py"
PACKER = "tests/planning/test_packer.py"


@planted(
    "lorafusion.planning.packer:Packer._key",
    caught_by=(
        f"{PACKER}::test_jobs_come_by_priority_and_then_by_tokens_left_over_weight",
        f"{COMPLETION}::test_a_job_that_comes_while_others_train_goes_first_by_its_priority",
    ),
)
def a_lower_priority_comes_first(original):
    """Jobs of a lower priority are planned ahead of those of a higher one."""

    def key(packer, adapter):
        order = original(packer, adapter)
        return (1, -order[1], *order[2:]) if len(order) == 3 and order[0] else order

    return key


@planted(
    "lorafusion.planning.packer:_Stream.tokens_left",
    caught_by=f"{PACKER}::test_a_job_counts_by_what_it_has_left",
)
def a_job_counts_by_what_it_had_at_first(original):
    """Shortest job first counts the tokens that are trained already."""
    return property(lambda stream: stream.job.stream_offset(stream.job.batches[stream.end - 1].stop))


@planted(
    "lorafusion.planning.packer:Packer._put_in_order",
    caught_by=f"{PACKER}::test_who_waits_is_looked_at_again_when_little_else_is_left",
)
def who_waits_is_not_looked_at_again(original):
    """A job that is ready keeps its place in the order, however little else is left."""
    return lambda packer: None


@planted(
    "lorafusion.planning.completion:LONGER",
    caught_by=f"{COMPLETION}::test_any_plan_is_exact_and_costs_no_more_than_it_may",
)
def early_ends_may_cost_much(original):
    """Plans in which jobs end early may take half as long again as the fastest one."""
    return 0.5


@planted(
    "lorafusion.planning.simulator.timeline:Timeline.job_ends",
    caught_by="tests/planning/simulator/test_gantt.py"
    "::test_a_job_ends_when_all_stages_and_replicas_have_done_its_last_step",
)
def a_job_ends_with_its_first_step(original):
    """A job's end is when its first optimizer step is done."""
    return lambda timeline, stepping: original(timeline, list(_first_only(stepping)))


def _first_only(stepping):
    seen = set()
    for adapters in stepping:
        yield [adapter for adapter in adapters if adapter not in seen]
        seen |= set(adapters)


@planted(
    "lorafusion.train.progress:needed_tokens",
    caught_by="tests/train/test_progress.py::test_a_line_says_when_each_job_is_expected_to_end",
)
def a_job_is_expected_to_end_as_if_it_were_alone(original):
    """The time that is left for a job does not count what the plan has before it."""

    def needed_tokens(plan):
        needed = {}
        for segment in (segment for one in plan.microbatches for segment in one.segments):
            needed[segment.adapter] = needed.get(segment.adapter, 0) + segment.tokens
        return needed

    return needed_tokens


@planted(
    "lorafusion.train.folder:OutputFolder._require_the_same",
    caught_by="tests/train/test_run.py::test_a_job_of_a_higher_priority_comes_in_ahead_of_the_others",
)
def a_job_that_is_done_takes_any_priority(original):
    """A priority on a job that is done is taken without a word."""
    return lambda folder, job, steps, before, is_done: original(folder, job, steps, before, False)


GROUPS, MEMORY, PROPOSE = (f"tests/planning/test_{name}.py" for name in ("groups", "memory", "propose"))


@planted(
    "lorafusion.planning.groups:distribute",
    caught_by=f"{GROUPS}::test_every_job_is_in_one_group_and_no_group_is_over_its_room",
)
def groups_take_more_than_they_hold(original):
    """Adapters are distributed by their time alone, whether their states fit or not."""
    return lambda seconds, sizes, groups, room: original(seconds, sizes, groups, float("inf"))


@planted(
    "lorafusion.planning.propose:with_links",
    caught_by=(
        f"{PROPOSE}::test_between_nodes_the_network_counts",
        f"{PROPOSE}::test_reducing_gradients_takes_time_by_the_link",
    ),
)
def gradients_are_reduced_in_no_time(original):
    """Any number of replicas sums its gradients at once."""
    return lambda model, *rest: model


@planted(
    "lorafusion.planning.simulator.choice:over_replicas",
    caught_by=(
        "tests/planning/simulator/test_choice.py::test_replicas_sum_the_gradients_of_the_jobs_that_step",
        "tests/train/test_planner.py::test_a_training_is_planned_by_the_costs_of_its_device",
    ),
)
def a_training_sums_gradients_in_no_time(original):
    """Only proposals count what it takes to sum gradients over replicas."""
    return lambda model, *rest: model


@planted(
    "lorafusion.planning.memory:PipelineMemory.reason",
    caught_by=(
        f"{MEMORY}::test_the_reason_is_what_does_not_fit",
        f"{PROPOSE}::test_an_adapter_that_fits_nowhere_is_the_reason",
    ),
)
def whatever_does_not_fit_is_called_the_weights(original):
    """Adapters' states and activations that are too large are called weights."""
    return lambda memory, *rest: "the weights do not fit" if original(memory, *rest) else ""
