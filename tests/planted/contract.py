"""Errors by which one arm costs more than another, or is tuned, warmed up or placed otherwise."""

from __future__ import annotations

import threading
import time
from contextlib import contextmanager
from dataclasses import replace

from tests.planted.plant import planted

COST = "tests/lab/checks/test_contract.py::test_a_system_costs_what_is_recorded"
RENAMED = "tests/lab/checks/test_contract.py::test_a_system_costs_the_same_under_another_ones_name"
ORDER = "tests/engine/test_order.py::test_a_stage_computes_in_the_order_of_1f1b"
GPU = "tests/gpu/test_contract_gpu.py::test_a_system_costs_what_is_recorded"
NAMES = "tests/test_names.py"
OURS = "lorafusion"


@planted(
    "lorafusion.engine.training:TrainingRun.warm_up",
    caught_by=f"{RENAMED}[lorafusion]",
)
def ours_alone_is_warmed_up(original):
    """Only `lorafusion` is warmed up before the clock starts."""

    def warm_up(run):
        if run.plan.system == OURS:
            original(run)

    return warm_up


@planted("lorafusion.engine.timed:warm_up_executor", caught_by=f"{COST}[megatron-pp]")
def our_executor_alone_is_warmed_up(original):
    """Only the executor of `lorafusion` is warmed up before the clock starts."""

    def warm_up_executor(run, execute):
        if run.plan.system == OURS:
            original(run, execute)

    return warm_up_executor


@planted("lorafusion.engine.timed:ready", caught_by=f"{COST}[mlora]")
def the_others_are_warmed_up_while_the_clock_runs(original):
    """The clock starts before a second warm-up of all but `lorafusion`."""

    @contextmanager
    def ready(run, execute):
        def late(again, *arguments):
            if again.plan.system != OURS:
                again.warm_up()
            return execute(again, *arguments)

        if hasattr(execute, "preparation"):
            late.preparation = execute.preparation
        with original(run, late) as train:
            yield train

    return ready


@planted("lorafusion.engine.stream:_Stream._forward", caught_by=f"{COST}[mlora]")
def every_arm_but_ours_sleeps(original):
    """The stream executor sleeps for 5 ms a microbatch unless the plan is of `lorafusion`."""

    def forward(stream, slot):
        if stream.run.plan.system != OURS:
            time.sleep(0.005)
        original(stream, slot)

    return forward


@planted(
    "lorafusion.engine.stream:execute",
    caught_by="tests/engine/test_order.py::test_a_stage_computes_in_the_order_of_1f1b",
)
def the_pipeline_is_flushed_after_every_microbatch(original):
    """Systems that flush their pipeline at a step do so after every microbatch."""

    def execute(run, checkpoints=None):
        from lorafusion.engine.stream import _Stream

        if not run.plan.flush or run.plan.stages == 1:
            return original(run, checkpoints)
        for slot in range(run.begin, len(run.microbatches)):
            _Stream(run, slot, slot + 1, None).run_through()
        return True

    return execute


def around_each(kind, before):
    """A LoRA kind that does something to the input of each linear, or to the time."""

    def installed(linears, active):
        kind(linears, active)
        for linear in linears:
            forward = linear.layer.forward
            linear.layer.forward = lambda x, forward=forward: forward(before(x))

    return installed


def slept(x):
    time.sleep(0.0001)
    return x


@planted("baselines.mlora.lora:looped", caught_by=f"{COST}[mlora]")
def looped_linears_sleep(original):
    """Each looped LoRA linear sleeps."""
    return around_each(original, slept)


def waited(x):
    threading.Event().wait(0.0001)
    return x


@planted("lorafusion.model.lora:peft", caught_by=f"{RENAMED}[peft-bf16]")
def pefts_linears_wait(original):
    """Each of PEFT's linears waits for what does not come."""
    return around_each(original, waited)


@planted("baselines.mlora.lora:looped", caught_by=f"{COST}[mlora]")
def looped_linears_copy_their_input(original):
    """Each looped LoRA linear copies its input."""
    return around_each(original, lambda x: x.clone())


@planted("lorafusion.model.lora:peft", caught_by=f"{RENAMED}[peft-bf16]")
def pefts_linears_copy_their_input(original):
    """Each of PEFT's linears copies its input."""
    return around_each(original, lambda x: x.clone())


@planted("baselines.megatron.schedule:MegatronStage.forward", caught_by=f"{COST}[megatron-pp]")
def megatrons_stages_copy_what_they_compute(original):
    """A stage in Megatron's schedule copies its result."""
    return lambda stage, slot: original(stage, slot).clone()


def changed(read_system, **changes):
    """Settings of all systems but ours."""
    return lambda name: read_system(name).model_copy(update={} if name == OURS else changes)


@planted("lorafusion.engine.build:read_system", caught_by=(f"{COST}[mlora]", f"{RENAMED}[lorafusion]"))
def baselines_have_wide_adapters(original):
    """All but `lorafusion` have float32 adapters under autocast."""
    return changed(original, wide_adapters=True)


@planted("lorafusion.engine.build:read_system", caught_by=f"{COST}[mlora]")
def liger_is_ours_alone(original):
    """Liger's kernels are for `lorafusion` only."""
    return changed(original, liger=False)


def recomputing(original):
    """Runs of all systems but ours with all layers computed again."""

    def build_run(process, *arguments):
        share = process.spec.checkpointing if process.spec.system == OURS else 1.0
        spec = process.spec.model_copy(update={"checkpointing": share})
        return original(replace(process, spec=spec), *arguments)

    return build_run


@planted("lorafusion.engine.build:build_run", caught_by=f"{COST}[megatron-pp]")
def baselines_recompute_their_layers(original):
    """All but `lorafusion` compute each layer's activations again in the backward pass."""
    return recomputing(original)


@planted("baselines.mlora.planner:plan", caught_by=f"{COST}[mlora]")
def rows_are_padded_to_64(original):
    """mLoRA's rows are padded to a multiple of 64 where it has 8."""

    def plan(*arguments, row_multiple=None, **options):
        return original(*arguments, row_multiple=row_multiple and 64, **options)

    return plan


@planted("lorafusion.planning.common:largest_that_fits", caught_by=f"{COST}[megatron-pp]")
def fixed_microbatches_have_half_the_samples(original):
    """Systems that fix the samples of a microbatch take half of what fits."""
    return lambda most, fits: max(1, original(most, fits) // 2)


@planted("lorafusion.planning:plan_system", caught_by=f"{NAMES}::test_a_plan_does_not_depend_on_a_name")
def baselines_have_half_the_capacity(original):
    """All but `lorafusion` are planned with three quarters of the capacity."""

    def plan_system(workload, system, *, capacity, **options):
        return original(workload, system, capacity=capacity if system == OURS else capacity * 3 // 4, **options)

    return plan_system


@planted("lorafusion.lab.tuning:candidates", caught_by=(f"{COST}[mlora]", f"{RENAMED}[lorafusion]"))
def baselines_are_tuned_from_half(original):
    """The capacities that are tried of all but `lorafusion` begin at half of the suite's."""

    def candidates(workload, cell):
        if cell.system != OURS:
            half = cell.grid.capacity_of(cell.workload) // 2
            cell = cell.model_copy(update={"grid": cell.grid.model_copy(update={"capacity": half})})
        return original(workload, cell)

    return candidates


@planted(
    "lorafusion.lab.tuned:Tuned.capacity", caught_by=f"{NAMES}::test_the_fastest_capacity_is_chosen_for_every_system"
)
def baselines_get_the_slowest_capacity(original):
    """Of all but `lorafusion` the slowest capacity is taken."""

    def capacity(tuned):
        done = [one for one in tuned.trials if one.throughput is not None]
        if tuned.system == OURS or not done:
            return original.fget(tuned)
        return min(done, key=lambda one: one.throughput).capacity

    return property(capacity)


@planted("lorafusion.lab.runner:dealt", caught_by=f"{NAMES}::test_systems_of_a_workload_run_on_one_gpu")
def ours_runs_on_the_other_gpu(original):
    """Of two processes that share a suite the other one runs the repeats of `lorafusion`."""

    def ours(step):
        return "runs" in step.path.parts and f"system~{OURS}" in step.path.parts

    def dealt(steps, share):
        other = share._replace(index=(share.index + 1) % share.count)
        return [*(step for step in original(steps, share) if not ours(step)),
                *(step for step in original(steps, other) if ours(step))]  # fmt: skip

    return dealt


@planted(
    "lorafusion.lab.measured_steps:shuffled",
    caught_by=f"{NAMES}::test_cells_are_dealt_out_whatever_their_systems_names",
)
def ours_runs_first(original):
    """In each repeat `lorafusion` runs first, when the GPU is cool."""
    return lambda names, repeat: sorted(original(names, repeat), key=lambda name: not name.endswith(f"~{OURS}"))


@planted(
    "lorafusion.launch.judgement:with_its_report",
    caught_by="tests/lab/test_cost.py::test_what_ends_the_processes_while_they_look_at_the_cost_does_not_end_the_run",
)
def a_run_is_lost_with_its_cost(original):
    """A run whose processes end while they look at its cost has no time."""
    return lambda done, report: done


@planted(
    "lorafusion.lab.profiler:without_communication",
    caught_by="tests/lab/test_cost.py::test_a_gpu_is_profiled_while_the_clock_runs",
)
def waiting_is_being_busy(original):
    """Kernels that wait for another device count as busy."""
    return list


@planted(
    "lorafusion.lab.table.result:cost_metrics",
    caught_by=f"{NAMES}::test_equal_times_are_equal_metrics",
)
def costs_are_halved(original):
    """Operators and kernels for 1000 tokens are half of what they are."""

    def cost_metrics(cost, idle):
        return [row | {"value": row["value"] / 2} for row in original(cost, idle)]

    return cost_metrics


@planted("lorafusion.engine.build:read_system", caught_by=f"{GPU}[mlora]", gpu=True)
def liger_is_ours_alone_on_a_gpu(original):
    """On a GPU Liger's kernels are for `lorafusion` only."""
    return changed(original, liger=False)


@planted("baselines.mlora.lora:looped", caught_by=f"{GPU}[mlora]", gpu=True)
def looped_linears_copy_their_input_on_a_gpu(original):
    """On a GPU each looped LoRA linear copies its input."""
    return around_each(original, lambda x: x.clone())


@planted("lorafusion.model.lora:peft", caught_by=f"{GPU}[peft-bf16]", gpu=True)
def pefts_linears_wait_for_the_device(original):
    """On a GPU the host waits for the device in each of PEFT's linears."""

    def waited(x):
        x.flatten()[0].item()
        return x

    return around_each(original, waited)


@planted("lorafusion.engine.build:build_run", caught_by=f"{GPU}[megatron-pp]", gpu=True)
def baselines_recompute_their_layers_on_a_gpu(original):
    """On a GPU all but `lorafusion` compute each layer's activations again in the backward pass."""
    return recomputing(original)


@planted(
    "lorafusion.lab.cost:remove_adapters",
    caught_by="tests/lab/test_cost.py::test_a_stage_without_adapters_is_the_base_model",
)
def the_frozen_model_has_adapters(original):
    """The frozen model is timed with its adapters."""
    return lambda stage: None
