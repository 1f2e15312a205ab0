"""Times, memory and speed of all cases of a bench of the kernel suite."""

from __future__ import annotations

import gc
import statistics

import torch

from lorafusion.core.clock import canary
from lorafusion.core.config import read_model
from lorafusion.lab.experiments.experiment import Point
from lorafusion.lab.experiments.implementations import Builder, Setting, Subject
from lorafusion.lab.experiments.kernel_suite import KernelBench, KernelCase, KernelSuite
from lorafusion.lab.experiments.timing import median_ratio, own_stream, prepared, saved_bytes, seconds
from lorafusion.lab.table.result import row

PASSES = ("forward", "both")  # of a `Subject`; forward too as in training, recorded by autograd


def bench_rows(point: Point, repeat: int) -> list[dict]:
    """The rows of a bench, at all its numbers of tokens. A case that fails is a row that says so."""
    suite, bench = point.settings, point.subject
    device = torch.device(suite.device)
    rows = [
        row("time", time, "steady", {"cell": f"{bench.name}/{name}"}, implementation=name)
        for name, time in canary(device).items()
    ]
    with own_stream(device):
        builder = Builder(bench, Setting(device, getattr(torch, suite.dtype), suite.seed))
        for tokens in bench.block.token_counts:
            rows += measured(bench, tokens, builder, suite, repeat)
            print(f"{bench.name}: {tokens} tokens measured", flush=True)
    return rows


def measured(bench: KernelBench, tokens: int, builder: Builder, suite: KernelSuite, repeat: int) -> list[dict]:
    """The rows of all cases at a number of tokens."""
    device, rows, functions, works = builder.setting.device, [], {}, {}
    for case in bench.cases(tokens):
        try:
            subject = builder.build(case)
            rows.append(case_row(bench, case, "saved_memory", saved_bytes(subject.forward, existing(subject))))
            works[case] = operations(bench, case)
            for name in PASSES:
                functions[case, name] = prepared(getattr(subject, name), device)
        except torch.OutOfMemoryError as error:
            rows += _failed(bench, case, "oom", str(error))
            for name in PASSES:
                functions.pop((case, name), None)
    times = seconds(functions, device, suite.replays, repeat)
    baseline = next((key[0] for key in times if key[0].implementation == "frozen"), None)
    for (case, name), samples in times.items():
        time = statistics.median(samples)
        rows.append(case_row(bench, case, "time", time, name))
        if case != baseline and baseline is not None:
            rows.append(case_row(bench, case, "overhead", median_ratio(samples, times[baseline, name]) - 1, name))
        if name == "both":
            rows.append(case_row(bench, case, "tflops", works[case] / time / 1e12, name))
    functions.clear()
    builder.forget(tokens)
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return rows


def operations(bench: KernelBench, case: KernelCase) -> float:
    """Floating-point operations of the forward and backward pass: products with base weights and with adapters,
    attention and norms left out."""
    base = adapters = 0
    for weight, rank in _products(bench):
        base += weight[0] * weight[1]
        adapters += rank * (weight[0] + weight[1])
    return case.tokens * (4 * base + (6 * adapters if case.adapters else 0))


def _products(bench: KernelBench) -> list[tuple[tuple[int, int], int]]:
    """(in, out) and rank of the bench's linears."""
    if bench.shape:
        return [(bench.shape, bench.rank)]
    return [(shape, bench.rank) for shape in read_model(bench.model).linears.values()]


def existing(subject: Subject) -> set[int]:
    """Storages that are there without a backward pass."""
    return {tensor.untyped_storage().data_ptr() for tensor in (*subject.leaves, *subject.weights)}


def case_row(
    bench: KernelBench, case: KernelCase, metric: str, value: float | None, passes: str | None = None, **more: object
) -> dict:
    """A number of a case, or why there is none. passes: that the number is of."""
    cell = {"cell": case.cell(bench), "tokens": case.tokens, "adapters": case.adapters, "pass": passes}
    return row(metric, value, "steady", cell, implementation=case.implementation, **more)


def _failed(bench: KernelBench, case: KernelCase, status: str, note: str) -> list[dict]:
    """The rows that the case should have had, without values."""
    missing = [("saved_memory", None), *((metric, name) for metric in ("time", "overhead") for name in PASSES),
               ("tflops", "both")]  # fmt: skip
    return [case_row(bench, case, metric, None, name, status=status, note=note[:200]) for metric, name in missing]
