"""Errors in what a run tells of itself, in its clock, and on the way from its times to what is drawn of them."""

from __future__ import annotations

from contextlib import contextmanager

import pandas as pd

from tests.planted.plant import planted

TIMED = "tests/engine/test_timed.py"
RESULT, TRIALS = (f"tests/lab/test_{name}.py" for name in ("result", "trials"))
KNOWN = "tests/test_known_times.py"
ORDER = f"{TIMED}::test_what_comes_before_and_after_the_clock_is_the_same_for_every_system[mlora]"
ITS_OWN_TOKENS = f"{TIMED}::test_the_clock_sees_the_runs_own_tokens_and_nothing_else[mlora]"
ALL_PROCESSES = f"{TIMED}::test_the_report_is_of_all_processes"
OURS = "lorafusion"


# --- The clock, and what comes before it


@planted("lorafusion.engine.timed:timed", caught_by=ITS_OWN_TOKENS)
def the_clock_of_others_starts_before_the_warm_up(original):
    """The clock of all systems but ours starts before the warm-up step and the warm-up."""

    def timed(run, *arguments):
        begin = run.record.meter.point()
        finished = original(run, *arguments)
        if run.plan.system != OURS:
            run.record.begin = begin
        return finished

    return timed


@planted("lorafusion.engine.training:TrainingRun.warm_up", caught_by=ORDER)
def only_ours_is_warmed_up(original):
    """All systems but ours start cold."""
    return lambda run: original(run) if run.plan.system == OURS else None


@planted("lorafusion.engine.warm_up:warm_up_executor", caught_by=ORDER)
def only_our_executor_is_warmed_up(original):
    """The executors of all systems but ours meet their first step while the clock runs."""
    return lambda run, execute: original(run, execute) if run.plan.system == OURS else None


@planted("lorafusion.engine.timed:ready", caught_by=ORDER)
def only_ours_waits_for_the_device(original):
    """The clock of all systems but ours starts while the device has work left."""

    @contextmanager
    def ready(run, execute):
        if run.plan.system != OURS:
            run.record.meter.synchronize = lambda: None
        with original(run, execute) as train:
            yield train

    return ready


@planted("lorafusion.engine.training:TrainingRun.wait_for_everyone", caught_by=ORDER)
def nobody_waits_for_the_others(original):
    """The processes of a run start their clocks apart."""

    def wait_for_everyone(run):
        run.record.meter.note("alone")

    return wait_for_everyone


@planted("lorafusion.core.clock:Meter.duration", caught_by=f"{TIMED}::test_on_a_cpu_both_clocks_are_one")
def the_devices_clock_is_slow(original):
    """The device's seconds are 2 % too few."""

    def duration(meter, begin, end):
        found = original(meter, begin, end)
        return found._replace(device=0.98 * found.device)

    return duration


@planted(
    "lorafusion.lab.table.result:require_clocks",
    caught_by=f"{RESULT}::test_both_clocks_of_every_process_agree_within_a_hundredth",
)
def clocks_may_disagree(original):
    """Nobody compares the device's clock with the host's."""
    return lambda clocks, processes: None


@planted(
    "lorafusion.lab.table.result:_require_marks",
    caught_by=f"{RESULT}::test_a_run_that_did_not_train_everything_has_no_numbers",
)
def marks_may_be_any(original):
    """The times of microbatches may be missing or out of order."""
    return lambda marks, plan, end: None


@planted(
    "lorafusion.lab.table.result:whole_seconds",
    caught_by=f"{RESULT}::test_the_time_is_that_of_the_slowest_process_and_the_host_is_in_the_result",
)
def the_time_is_that_of_the_first_process(original):
    """A run takes as long as its first process, whatever the others do."""
    return lambda report: report["clocks"][0][0]


# --- Memory


@planted("lorafusion.engine.timed:ready", caught_by=ITS_OWN_TOKENS)
def the_peak_of_memory_is_not_reset(original):
    """The peak of memory is that of the process, its start and warm-up included."""

    @contextmanager
    def ready(run, execute):
        run.record.meter.reset_peak_memory = lambda: None
        with original(run, execute) as train:
            yield train

    return ready


@planted("lorafusion.engine.timed:report_of", caught_by=ALL_PROCESSES)
def the_peak_of_memory_is_each_processs_own(original):
    """The peak of memory in the report is that of the first process."""
    return lambda run: original(run) | {"peak_memory": run.record.meter.peak_memory()}


@planted("lorafusion.engine.timed:report_of", caught_by=ALL_PROCESSES)
def the_peak_of_memory_is_the_smallest(original):
    """The peak of memory is the smallest over the processes."""

    def report_of(run):
        import torch.distributed as dist

        peaks = [None] * dist.get_world_size()
        dist.all_gather_object(peaks, run.record.meter.peak_memory())
        return original(run) | {"peak_memory": min(peaks)}

    return report_of


# --- What was trained


@planted(
    "lorafusion.lab.table.result:require_steps",
    caught_by=(
        f"{TIMED}::test_a_run_whose_gradients_are_not_finite_is_not_ok",
        f"{TIMED}::test_a_trial_whose_gradients_are_not_finite_has_no_throughput",
    ),
)
def a_run_in_which_no_adapter_steps_is_ok(original):
    """Nobody asks how many optimizer steps were made."""
    return lambda report, expected: None


@planted(
    "lorafusion.engine.adapters:AdapterTraining.steps_made",
    caught_by=f"{TIMED}::test_a_run_whose_gradients_are_not_finite_is_not_ok",
)
def steps_are_counted_and_not_made(original):
    """Steps that were asked for are reported as made."""
    return lambda adapter: adapter.steps


@planted("lorafusion.engine.timed:report_of", caught_by=f"{TIMED}::test_what_one_stage_did_not_do_is_told")
def steps_are_those_of_the_first_stage(original):
    """Steps and stops of an adapter are reported as they are on the first stage."""

    def report_of(run):
        report, rank = original(run), run.pipeline.index
        if rank == 0:
            report["steps"] = {one.job.name: one.steps_made() for one in run.adapters}
            report["stopped"] = [one.job.name for one in run.adapters if bool(one.stopped)]
        return report

    return report_of


@planted("lorafusion.engine.timed:losses_by_job", caught_by=f"{TIMED}::test_what_was_not_done_is_told")
def a_missing_loss_is_zero(original):
    """A global batch whose loss was not noted has the loss of what was."""

    def losses_by_job(workload, plan, shares):
        found = original(workload, plan, shares)
        return {name: [0.0 if value is None else value for value in values] for name, values in found.items()}

    return losses_by_job


@planted(
    "lorafusion.lab.trials:require_whole",
    caught_by=f"{TIMED}::test_a_trial_whose_gradients_are_not_finite_has_no_throughput",
)
def a_trial_need_not_train(original):
    """A trial of a capacity in which nothing is trained counts."""
    return lambda report, workload, plan: None


@planted(
    "lorafusion.lab.experiments.trainers:Trainer.require_sound",
    caught_by="tests/lab/experiments/test_steps.py::test_an_arm_that_does_not_train_is_rows_without_values",
)
def a_benchmark_need_not_train(original):
    """An arm of the training steps counts though its gradients are not finite."""
    return lambda trainer: None


# --- From times to numbers


def _changed(original, change):
    """`metrics`, of which `change` makes the value of each."""

    def metrics(report, workload, plan):
        found = original(report, workload, plan)
        return [row | {"value": change(row, workload, plan)} for row in found]

    return metrics


@planted(
    "lorafusion.lab.table.result:metrics",
    caught_by=f"{KNOWN}::test_single_throughputs_are_tokens_over_the_clock[whole]",
)
def our_throughput_is_two_percent_up(original):
    """The throughput of `lorafusion` alone is multiplied by 1.02."""

    def change(row, workload, plan):
        return row["value"] * (1.02 if plan.system == OURS and row["metric"] == "throughput" else 1)

    return _changed(original, change)


@planted(
    "lorafusion.lab.table.result:metrics",
    caught_by=(
        f"{RESULT}::test_padding_is_counted_in_the_padded_throughput_alone",
        f"{KNOWN}::test_single_throughputs_are_tokens_over_the_clock[whole]",
    ),
)
def padding_counts_as_tokens(original):
    """Tokens of padding are counted in the throughput."""

    def change(row, workload, plan):
        if (row["metric"], row["window"]) != ("throughput", "whole"):
            return row["value"]
        return row["value"] / workload.tokens * sum(microbatch.length for microbatch in plan.microbatches)

    return _changed(original, change)


@planted(
    "lorafusion.lab.table.result:metrics",
    caught_by=f"{RESULT}::test_tokens_are_the_workloads_whatever_the_plan_says_of_itself",
)
def tokens_are_what_the_plan_says_of_itself(original):
    """The throughput takes its tokens from the plan's own statistics."""

    def change(row, workload, plan):
        if (row["metric"], row["window"]) != ("throughput", "whole"):
            return row["value"]
        return row["value"] / workload.tokens * plan.statistics.tokens

    return _changed(original, change)


@planted(
    "lorafusion.lab.table.result:steady_throughput",
    caught_by=f"{KNOWN}::test_single_throughputs_are_tokens_over_the_clock[steady]",
)
def the_steady_window_is_the_whole_run(original):
    """The steady window has the first microbatches in it."""

    def steady_throughput(seconds, plan):
        last = max(seconds)
        tokens = sum(microbatch.tokens for microbatch in plan.microbatches)
        return tokens / seconds[last], original(seconds, plan)[1]

    return steady_throughput


@planted("lorafusion.lab.table.table:_summary", caught_by=f"{KNOWN}::test_medians_are_of_all_repeats_or_none[whole]")
def a_median_is_of_the_repeats_that_survived(original):
    """A cell of which a repeat failed has the median of the others."""

    def summary(group, distinct, values, failure):
        finished = [value for value in values if not pd.isna(value)]
        return original(group, distinct, finished or values, None if finished else failure)

    return summary


@planted(
    "lorafusion.lab.report.ratios:_ratios",
    caught_by=f"{KNOWN}::test_the_csv_of_contributions_is_paired_ratios_and_their_interval[whole]",
)
def ratios_are_of_unlike_repeats(original):
    """The ratio of two systems is that of one's repeat over another repeat of the other."""

    def ratios(arms, above, below, *more, **options):
        arm = arms.get(below)
        if arm and len(arm.values) > 1:
            repeats = sorted(arm.values)
            turned = {one: arm.values[other] for one, other in zip(repeats, [*repeats[1:], repeats[0]], strict=True)}
            arms = arms | {below: arm._replace(values=turned)}
        return original(arms, above, below, *more, **options)

    return ratios


@planted(
    "lorafusion.lab.table.validation:_require_tokens_over_time",
    caught_by="tests/lab/table/test_tokens_over_time.py::test_one_that_is_a_little_faster_is_refused",
)
def a_throughput_need_not_be_tokens_over_the_time(original):
    """A table may have throughputs that are not its workload's tokens over the run's time."""
    return lambda table, checked: None


# --- What is drawn


@planted(
    "lorafusion.lab.report.figures.end_to_end:_draw_panel",
    caught_by=f"{KNOWN}::test_each_error_bar_is_its_bars_interval[whole]",
)
def error_bars_are_a_tenth(original):
    """The error bars that are drawn are a tenth as long as the intervals."""

    def draw_panel(ax, panel, *more):
        ends = {end: panel["value"] + (panel[end] - panel["value"]) / 10 for end in ("ci_low", "ci_high")}
        original(ax, panel.assign(**ends), *more)

    return draw_panel


@planted(
    "lorafusion.lab.report.figures.end_to_end:_draw_panel",
    caught_by=f"{KNOWN}::test_each_bar_is_as_high_as_its_systems_median[whole]",
)
def bars_of_two_systems_are_swapped(original):
    """Two systems have each other's bars."""

    def draw_panel(ax, panel, *more):
        swapped = panel["system"].replace({OURS: "peft-bf16", "peft-bf16": OURS})
        original(ax, panel.assign(system=swapped), *more)

    return draw_panel


@planted(
    "lorafusion.lab.report.figures.end_to_end:draw_end_to_end",
    caught_by=f"{KNOWN}::test_the_axis_is_in_tokens_a_second[whole]",
)
def the_axis_is_in_thousands(original):
    """The axis of throughputs says thousands of tokens where they are tokens."""

    def draw_end_to_end(*arguments):
        figure = original(*arguments)
        for ax in figure.axes:
            ax.set_ylabel(ax.get_ylabel() and "ktokens/s")
        return figure

    return draw_end_to_end


@planted(
    "lorafusion.lab.report.figures.contributions:_places",
    caught_by=f"{KNOWN}::test_each_part_begins_where_the_one_before_ends[whole]",
)
def every_part_begins_at_one(original):
    """The bars of the parts begin at one and not where the part before ends."""
    return lambda values: dict.fromkeys(original(values), 1.0)


@planted(
    "lorafusion.lab.report.figures.contributions:_draw_bar",
    caught_by=f"{KNOWN}::test_each_part_begins_where_the_one_before_ends[whole]",
)
def whiskers_of_parts_are_a_tenth(original):
    """The whiskers of the parts are a tenth as long as their bounds."""

    def draw_bar(ax, y, start, row, *more, **options):
        shorter = row.copy()
        for end in ("low", "high"):
            shorter[end] = row["value"] + (row[end] - row["value"]) / 10
        original(ax, y, start, shorter, *more, **options)

    return draw_bar
