"""Errors in what a run tells of where its time went."""

from __future__ import annotations

from contextlib import contextmanager, nullcontext

from tests.planted.plant import planted

OURS = "lorafusion"


@planted(
    "lorafusion.engine.training:TrainingRun.waiting",
    caught_by="tests/engine/test_record.py::test_what_is_slow_is_the_cause[mlora-packed-slow_host-0-causes3]",
)
def waits_are_not_noted(original):
    """A stage's waits for others are not told from what its host does."""

    @contextmanager
    def waiting(run, what):
        yield

    return waiting


@planted(
    "lorafusion.engine.training:TrainingRun._begin_backward",
    caught_by="tests/engine/test_record.py::test_all_time_is_where_it_was_spent[mlora]",
)
def others_backwards_are_their_hosts(original):
    """The backward passes of all systems but ours are not noted, so that their host seems slow."""

    def begin(run, slot):
        if run.plan.system == OURS:
            return original(run, slot)
        run.active.batch = run._batches.pop(slot)

    return begin


@planted("lorafusion.lab.table.idle:measured_costs", caught_by="tests/lab/table/test_idle.py::"
         "test_a_late_host_is_its_stages_own_and_the_others_neighbour")  # fmt: skip
def lateness_is_the_schedules(original):
    """The time in which a stage waits for a neighbour that is late counts as the schedule's bubble."""

    def measured_costs(plan, seconds):
        costs = original(plan, seconds)
        costs.transfer[:] = 1.0
        return costs

    return measured_costs


# --- What is predicted


@planted(
    "lorafusion.lab.validation:_by_others",
    caught_by="tests/lab/test_validation.py::test_a_run_is_not_predicted_by_itself",
)
def runs_are_predicted_by_themselves(original):
    """The costs that predict a run fit that run too."""

    def by_others(cells):
        from lorafusion.lab.validation import _fitted

        for cell in cells:
            alike = [other for other in cells if other.kind == cell.kind]
            yield cell, cell.predicted(_fitted(cell.files.system.implementation, alike))

    return by_others


@planted(
    "lorafusion.lab.validation:with_reduction",
    caught_by="tests/lab/test_validation.py::test_a_profile_counts_the_sums_of_replicas",
)
def replicas_sum_their_gradients_for_nothing(original):
    """Predictions by a profile leave out what replicas take to sum gradients."""
    return lambda costs, question: costs


@planted("lorafusion.lab.cost_profile:_Run.latency", caught_by="tests/lab/experiments/test_costs.py::"
         "test_messages_take_as_long_as_pipelines_show_whatever_the_speed_of_the_machine")  # fmt: skip
def a_slow_minute_makes_messages_slow(original):
    """What a message takes holds the slowness of all passes in the minute in which the pipeline ran."""

    def latency(run, fit):
        from lorafusion.lab.experiments.costs_suite import workload_and_plan
        from lorafusion.planning.simulator.costs import contents_of
        from lorafusion.planning.simulator.profile import stage_costs

        workload, plan = workload_and_plan(run.bench)
        costs = stage_costs(fit, run.model, plan.stages, checkpointing=False)
        without = costs.model_copy(update={"latency": 0.0, "transfer": 0.0})
        forward = without.costs(*contents_of(plan, workload)).forward
        return original(run._replace(seconds=run.seconds | {"forward": forward[forward > 0].mean()}), fit)

    return latency


@planted(
    "lorafusion.lab.cell_result:predicted_row",
    caught_by="tests/lab/test_validation.py::test_the_predicted_row_stands_beside_the_measured_one",
)
def a_prediction_is_taken_for_a_measurement(original):
    """The row of a predicted time does not say that it is simulated."""
    return lambda *arguments: original(*arguments) | {"cell": {}}


@planted(
    "baselines.megatron.pipeline:waits_noted",
    caught_by="tests/engine/test_record.py::test_what_is_slow_is_the_cause[megatron-pp-slow_host-0-causes7]",
)
def megatron_says_nothing_of_its_waits(original):
    """What Megatron waits for within its library counts as the neighbour's, and nothing as its host's."""
    return lambda run: nullcontext()
