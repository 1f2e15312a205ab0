"""What calls of a model's linears take: fused, PEFT's, and frozen ones."""

from collections.abc import Callable, Iterator

import torch

from lorafusion.core.clock import free_memory
from lorafusion.lab.experiments.experiment import Point
from lorafusion.lab.experiments.implementations import Builder, Setting
from lorafusion.lab.experiments.kernel_suite import KernelBench, KernelCase
from lorafusion.lab.experiments.kernel_times import call_rows, calls_of, out_of_memory
from lorafusion.lab.experiments.timing import canary_rows, own_stream, prepared


def grid_rows(point: Point, repeat: int) -> Iterator[list[dict]]:
    """The rows of a model, those of each linear, rank and dropout for themselves."""
    entry, device = point.settings, torch.device(point.settings.device)
    yield canary_rows(device, f"grid~{point.name}")
    for bench in point.subject:
        with own_stream(device):
            builder = Builder(bench, Setting(device, getattr(torch, entry.dtype), entry.seed))
            rows = [row for tokens in bench.block.token_counts for row in measured(bench, tokens, builder, repeat)]
        del builder
        free_memory()  # once for all tokens: it takes as long as to time two of them
        sizes = bench.features | {"rank": bench.rank, "dropout": bench.dropout}
        yield [row | {"cell": row["cell"] | sizes} for row in rows]
        print(f"{bench.name}: measured", flush=True)


def measured(bench: KernelBench, tokens: int, builder: Builder, repeat: int) -> list[dict]:
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
    rows += call_rows(bench, calls, graphs, device, repeat)
    builder.forget(tokens)
    return rows
