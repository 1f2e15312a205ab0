"""Times, memory and speed of all cases of a bench of the kernel suite."""

import statistics
from collections.abc import Callable, Iterable, Mapping

import torch

from lorafusion.core.clock import free_memory
from lorafusion.core.config import read_model
from lorafusion.lab.experiments.experiment import Point
from lorafusion.lab.experiments.implementations import Builder, Setting, Subject
from lorafusion.lab.experiments.kernel_suite import KernelBench, KernelCase, KernelSuite
from lorafusion.lab.experiments.timing import call_seconds, canary_rows, median_ratio, own_stream, prepared, seconds
from lorafusion.lab.operators import saved_bytes
from lorafusion.lab.table.result import row

PASSES = ("forward", "both")  # of a `Subject`; forward too as in training, recorded by autograd
CALLS = ("host", "wall", "device")  # metrics of a call of both


def bench_rows(point: Point, repeat: int) -> list[dict]:
    """The rows of a bench, at all its numbers of tokens. A case that fails is a row that says so."""
    suite, bench = point.settings, point.subject
    device = torch.device(suite.device)
    rows = canary_rows(device, bench.name)
    with own_stream(device):
        builder = Builder(bench, Setting(device, getattr(torch, suite.dtype), suite.seed))
        for tokens in bench.block.token_counts:
            rows += measured(bench, tokens, builder, suite, repeat)
            print(f"{bench.name}: {tokens} tokens measured", flush=True)
    return rows


def measured(bench: KernelBench, tokens: int, builder: Builder, suite: KernelSuite, repeat: int) -> list[dict]:
    """The rows of all cases at a number of tokens."""
    device, rows, functions, calls = builder.setting.device, [], {}, {}
    for case in bench.cases(tokens):
        try:
            subject = builder.build(case)
            rows.append(case_row(bench, case, "saved_memory", saved_bytes(subject.forward, existing(subject))))
            functions |= {(case, name): prepared(getattr(subject, name), device) for name in PASSES}
            calls[case] = subject.both
        except torch.OutOfMemoryError as error:
            missing = [("saved_memory", None), *((metric, name) for metric in ("time", "overhead") for name in PASSES),
                       ("tflops", "both"), *((metric, "both") for metric in calls_of(device))]  # fmt: skip
            rows += out_of_memory(bench, case, missing, error)
    times = seconds(functions, device, suite.replays, repeat)
    baseline = next((case for case, _ in times if case.implementation == "frozen"), None)
    for (case, name), samples in times.items():
        time = statistics.median(samples)
        rows.append(case_row(bench, case, "time", time, name))
        if case != baseline and baseline is not None:
            rows.append(case_row(bench, case, "overhead", median_ratio(samples, times[baseline, name]) - 1, name))
        if name == "both":
            rows.append(case_row(bench, case, "tflops", operations(bench, case) / time / 1e12, name))
    rows += call_rows(bench, calls, {case: functions[case, "both"] for case in calls}, device, repeat)
    functions.clear()
    calls.clear()
    builder.forget(tokens)
    free_memory()
    return rows


def calls_of(device: torch.device) -> tuple[str, ...]:
    """The metrics of a call: a CPU has no graphs, and no time of its own."""
    return CALLS if device.type == "cuda" else CALLS[:2]


def call_rows(
    bench: KernelBench,
    calls: Mapping[KernelCase, Callable],
    graphs: Mapping[KernelCase, Callable],
    device: torch.device,
    repeat: int,
) -> list[dict]:
    """What a forward and backward pass takes of a user. graphs: replays of the calls' graphs, on a GPU."""
    times = call_seconds(calls, graphs if device.type == "cuda" else {}, device, repeat)
    return [case_row(bench, case, metric, times[case][metric], "both") for case in calls for metric in calls_of(device)]


def out_of_memory(bench: KernelBench, case: KernelCase, missing: Iterable[tuple], error: Exception) -> list[dict]:
    """Rows that say why a case has no numbers. missing: metrics and their passes."""
    return [case_row(bench, case, metric, None, name, status="oom", note=str(error)[:200]) for metric, name in missing]


def operations(bench: KernelBench, case: KernelCase) -> float:
    """Floating-point operations of the forward and backward pass: products with base weights and with adapters,
    attention and norms left out."""
    shapes = [bench.shape] if bench.shape else read_model(bench.model).linears.values()
    base = sum(inputs * outputs for inputs, outputs in shapes)
    adapters = sum(bench.rank * (inputs + outputs) for inputs, outputs in shapes)
    return case.tokens * (4 * base + (6 * adapters if case.adapters else 0))


def existing(subject: Subject) -> set[int]:
    """Storages that are there without a backward pass."""
    return {tensor.untyped_storage().data_ptr() for tensor in (*subject.leaves, *subject.weights)}


def case_row(
    bench: KernelBench, case: KernelCase, metric: str, value: float | None, passes: str | None = None, **more: object
) -> dict:
    """A number of a case, or why there is none. passes: that the number is of."""
    cell = {"cell": case.cell(bench), "tokens": case.tokens, "adapters": case.adapters, "pass": passes}
    return row(metric, value, "steady", cell, implementation=case.implementation, **more)
