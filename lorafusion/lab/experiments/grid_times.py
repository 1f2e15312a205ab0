"""What calls of a model's linears take: fused, PEFT's, and frozen ones."""

import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from itertools import repeat

import torch

from lorafusion.core.clock import Meter, free_memory
from lorafusion.lab.experiments.experiment import Point
from lorafusion.lab.experiments.grid_suite import GridSuite
from lorafusion.lab.experiments.implementations import Builder, Setting
from lorafusion.lab.experiments.kernel_suite import KernelBench, KernelCase
from lorafusion.lab.experiments.kernel_times import call_rows, calls_of, out_of_memory
from lorafusion.lab.experiments.timing import canary_rows, own_stream, prepared

MOST_COMPILERS = 12  # processes that share the GPU's memory


def grid_rows(point: Point, turn: int) -> Iterator[list[dict]]:
    """The rows of a model, those of each linear, rank and dropout for themselves."""
    entry, device = point.settings, torch.device(point.settings.device)
    if device.type == "cuda":
        compile_ahead(point)
    yield canary_rows(device, f"grid~{point.name}")
    for bench in point.subject:
        with own_stream(device):
            builder = builder_of(entry, bench)
            rows = [row for tokens in bench.block.token_counts for row in measured(bench, tokens, builder, turn)]
        del builder
        free_memory()  # once for all tokens: it takes as long as to time two of them
        sizes = bench.features | {"rank": bench.rank, "dropout": bench.dropout}
        yield [row | {"cell": row["cell"] | sizes} for row in rows]
        print(f"{bench.name}: measured", flush=True)


def builder_of(entry: GridSuite, bench: KernelBench) -> Builder:
    return Builder(bench, Setting(torch.device(entry.device), getattr(torch, entry.dtype), entry.seed))


def compile_ahead(point: Point) -> None:
    """Fill Triton's cache in processes of their own: in this one, compiling would take as long as all that is timed."""
    workers = min(MOST_COMPILERS, len(os.sched_getaffinity(0)))
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        list(pool.map(run_fused, repeat(point.settings), point.subject))


def run_fused(entry: GridSuite, bench: KernelBench) -> None:
    """Run all that a bench compiles; what has no memory beside the others' is compiled when it is timed."""
    builder = builder_of(entry, bench)
    for tokens in bench.block.token_counts:
        for case in bench.cases(tokens):
            if case.implementation == "fused-multi":
                with suppress(torch.OutOfMemoryError):
                    builder.build(case).both()
        builder.forget(tokens)
    Meter(builder.setting.device).synchronize()


def measured(bench: KernelBench, tokens: int, builder: Builder, turn: int) -> list[dict]:
    """The rows of all cases at a number of tokens."""
    device, rows = builder.setting.device, []
    calls: dict[KernelCase, Callable] = {}
    graphs: dict[KernelCase, Callable] = {}
    for case in bench.cases(tokens):
        try:
            both = builder.build(case).both
            graphs[case] = prepared(both, device)
            calls[case] = both
        except torch.OutOfMemoryError as error:
            rows += out_of_memory(bench, case, [(metric, "both") for metric in calls_of(device)], error)
    rows += call_rows(bench, calls, graphs, device, turn)
    builder.forget(tokens)
    return rows
