"""Errors in jobs, plans and their checker."""

from __future__ import annotations

import re
from dataclasses import replace

from tests.planted.plant import planted

PLAN = "tests/core/test_plan.py"
EACH_BREACH = f"{PLAN}::test_each_breach_is_seen"
# A rule of the checker by the words of its message, and the test that breaks the rule.
RULES = {
    "a_missing_sample": ("are not in the plan", EACH_BREACH),
    "a_repeated_sample": ("comes twice", EACH_BREACH),
    "a_misplaced_step": ("steps after slots", EACH_BREACH),
    "an_empty_microbatch": ("is not marked as a no-op", EACH_BREACH),
    "a_noop_that_steps": ("a no-op holds no samples", EACH_BREACH),
    "an_unknown_adapter": ("but the workload has", EACH_BREACH),
    "an_unknown_sample": ("whose stream has", EACH_BREACH),
    "wrong_tokens": ("declares", EACH_BREACH),
    "two_segments_of_an_adapter": ("two segments of one adapter", EACH_BREACH),
    "too_many_tokens": ("exceed the capacity", f"{PLAN}::test_capacity_is_a_rule"),
    "the_dependency_rule": ("stages need", f"{PLAN}::test_the_dependency_rule_needs_as_many_slots_as_stages"),
    "half_a_slot": ("do not fill slots", f"{PLAN}::test_replicas_share_slots_and_steps"),
    "foreign_statistics": ("its statistics", f"{PLAN}::test_statistics_that_are_not_the_plans_own_are_refused"),
    "another_workload": ("made for workload", f"{PLAN}::test_a_plan_belongs_to_its_workload"),
    "rows_that_are_too_short": ("its row", "tests/data/test_packing.py::test_the_checker_sees_rows_that_cannot_be"),
}


def _overlooks(name: str, words: str, test: str) -> None:
    def overlook(original):
        def violations(plan, workload):
            return [line for line in original(plan, workload) if not re.search(re.escape(words), line)]

        return violations

    overlook.__name__ = f"the_checker_overlooks_{name}"
    overlook.__doc__ = f'The plan checker keeps quiet where it should say "{words}".'
    planted("lorafusion.core.plan:violations", caught_by=test)(overlook)


for _name, (_words, _test) in RULES.items():
    _overlooks(_name, _words, _test)


@planted("lorafusion.core.plan:check", caught_by=f"{PLAN}::test_each_breach_is_seen")
def every_plan_passes(original):
    """No plan is checked."""
    return lambda *arguments, **options: None


@planted(
    "lorafusion.core.workload:Job.scaling",
    caught_by="tests/core/test_workload.py::test_scaling_is_alpha_over_rank_or_its_root",
)
def the_scale_ignores_rslora(original):
    """A rank-stabilised adapter is scaled by alpha/rank."""
    return property(lambda job: job.alpha / job.rank)


@planted(
    "lorafusion.core.workload:Job._batches_of",
    caught_by="tests/core/test_workload.py::test_batches_cover_the_stream_in_order_and_never_cross_an_epoch",
)
def an_epochs_tail_is_dropped(original):
    """The last samples of an epoch, fewer than a global batch, are not trained."""

    def batches_of(job, epochs):
        batches = list(original(job, epochs))
        return iter([batch for batch in batches if len(batch) == job.global_batch_size] or batches)

    return batches_of


@planted(
    "lorafusion.core.workload:Job.stream_offset",
    caught_by="tests/data/test_packing.py::test_places_in_the_stream_do_not_begin_again_with_an_epoch",
)
def masks_begin_again_with_an_epoch(original):
    """Every epoch has the dropout masks of the first."""
    return lambda job, position: original(job, position % len(job.samples))


@planted(
    "lorafusion.data.packing:BatchBuilder.build",
    caught_by="tests/data/test_packing.py::test_the_weights_of_what_is_learnt_in_a_global_batch_add_up_to_one",
)
def losses_are_weighed_by_the_microbatch(original):
    """A loss is the mean over its microbatch and not over its global batch."""

    def build(*arguments):
        batch = original(*arguments)
        total = batch.weights.sum()
        return replace(batch, weights=batch.weights / total if total else batch.weights)

    return build
