"""Run one bench of the kernel suite, once: all its points, and their result file."""

from __future__ import annotations

import gc
import statistics
from datetime import UTC, datetime
from pathlib import Path

import torch

from lorafusion.core.clock import canary
from lorafusion.core.config import read_model
from lorafusion.core.machine import has_gpu, provenance
from lorafusion.core.schema import UserError, one_of
from lorafusion.lab.experiments.implementations import Builder, Setting, Subject
from lorafusion.lab.experiments.kernel_suite import (
    KERNELS,
    Bench,
    KernelSuite,
    Point,
    bench_hash,
    benches,
    read_kernel_suite,
)
from lorafusion.lab.experiments.rows import row, write_bench
from lorafusion.lab.experiments.timing import median_ratio, own_stream, prepared, saved_bytes, seconds

PASSES = ("forward", "both")  # of a `Subject`; forward too as in training, recorded by autograd


def run_bench(
    suite_name: str, name: str, repeat: int, out: Path, log: Path | None, only: list[int] | None = None
) -> str:
    """Measure a bench and write its result file; returns a line about it. A point that fails is a row that says so.

    only: of the bench's numbers of tokens, those to measure.
    """
    suite = read_kernel_suite(suite_name)
    known = benches(suite)
    one_of("bench", name, set(known), f"{KERNELS}: {suite_name}")
    for tokens in only or []:
        if tokens not in known[name].block.token_counts:
            raise UserError(f"--tokens: {tokens} is none of the bench's: {known[name].block.token_counts}")
    require_device(suite)
    started = datetime.now(UTC).isoformat(timespec="seconds")
    origin = provenance(suite.device)
    device = torch.device(suite.device)
    bench, setting = known[name], Setting(device, getattr(torch, suite.dtype), suite.seed)
    metrics = [_canary_row(bench, *one) for one in canary(device).items()]
    with own_stream(device):
        builder = Builder(bench, setting)
        for tokens in only or bench.block.token_counts:
            metrics += measured(bench, tokens, builder, suite, repeat)
            print(f"{name}: {tokens} tokens measured", flush=True)
    failed = [row for row in metrics if row["status"] != "ok"]
    cell = {
        "suite": suite_name, "kind": "measured", "cell": f"{bench.name}/canary", "model": bench.model, "gpus": 1,
        "repeat": repeat, "rank": bench.rank, "dropout": bench.dropout, "dtype": suite.dtype,
        **(dict(zip(("in_features", "out_features"), bench.shape, strict=True)) if bench.shape else {}),
    }  # fmt: skip
    command = ["kernels", "measure", "--suite", suite_name, "--bench", name, "--out", out, "--repeat", repeat,
               *(word for tokens in only or [] for word in ("--tokens", tokens))]  # fmt: skip
    write_bench(out, cell, metrics, origin, config_hash=bench_hash(suite, bench), seed=suite.seed, started=started,
                log=log, command=command, bench=None if only else ("suite", suite_name, name))  # fmt: skip
    return f"{len(metrics)} numbers, {len(failed)} failed"


def require_device(suite: KernelSuite) -> None:
    if suite.device == "cuda" and not has_gpu():
        raise UserError(f"{KERNELS}: a suite for GPUs, but nvidia-smi finds none; try the suite smoke")


def measured(bench: Bench, tokens: int, builder: Builder, suite: KernelSuite, repeat: int) -> list[dict]:
    """The rows of all points at a number of tokens."""
    device, rows, functions, works = builder.setting.device, [], {}, {}
    for point in bench.points(tokens):
        try:
            subject = builder.build(point)
            rows.append(_row(bench, point, "saved_memory", saved_bytes(subject.forward, _existing(subject))))
            works[point] = operations(bench, point)
            for name in PASSES:
                functions[point, name] = prepared(getattr(subject, name), device)
        except torch.OutOfMemoryError as error:
            rows += _failed(bench, point, "oom", str(error))
            for name in PASSES:
                functions.pop((point, name), None)
    times = seconds(functions, device, suite.replays, repeat)
    baseline = next((key[0] for key in times if key[0].implementation == "frozen"), None)
    for (point, name), samples in times.items():
        time = statistics.median(samples)
        rows.append(_row(bench, point, "time", time, name))
        if point != baseline and baseline is not None:
            rows.append(_row(bench, point, "overhead", median_ratio(samples, times[baseline, name]) - 1, name))
        if name == "both":
            rows.append(_row(bench, point, "tflops", works[point] / time / 1e12, name))
    functions.clear()
    builder.forget(tokens)
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return rows


def operations(bench: Bench, point: Point) -> float:
    """Floating-point operations of the forward and backward pass: products with base weights and with adapters,
    attention and norms left out."""
    base = adapters = 0
    for weight, rank in _products(bench):
        base += weight[0] * weight[1]
        adapters += rank * (weight[0] + weight[1])
    return point.tokens * (4 * base + (6 * adapters if point.adapters else 0))


def _products(bench: Bench) -> list[tuple[tuple[int, int], int]]:
    """(in, out) and rank of the bench's linears."""
    if bench.shape:
        return [(bench.shape, bench.rank)]
    return [(shape, bench.rank) for shape in read_model(bench.model).linears.values()]


def _existing(subject: Subject) -> set[int]:
    """Storages that are there without a backward pass."""
    return {tensor.untyped_storage().data_ptr() for tensor in (*subject.leaves, *subject.weights)}


def _row(bench: Bench, point: Point, metric: str, value: float, passes: str | None = None) -> dict:
    cell = {"cell": point.cell(bench), "tokens": point.tokens, "adapters": point.adapters, "pass": passes}
    return row(metric, value, "steady", cell, implementation=point.implementation)


def _failed(bench: Bench, point: Point, status: str, note: str) -> list[dict]:
    """The rows that the point should have had, without values."""
    missing = [("saved_memory", None), *((metric, name) for metric in ("time", "overhead") for name in PASSES),
               ("tflops", "both")]  # fmt: skip
    return [
        _row(bench, point, metric, 0.0, name) | {"value": None, "status": status, "note": note[:200]}
        for metric, name in missing
    ]


def _canary_row(bench: Bench, name: str, time: float) -> dict:
    return row("time", time, "steady", {"cell": f"{bench.name}/{name}"}, implementation=name)
