"""A fused linear beside PEFT's and the frozen one, forward and backward: `python -m tests.gpu.linear_cost OUT.csv`.

A row for each shape, number of tokens and way, in microseconds: `host`, until the call returns; `wall`, a call of many
in a row; `device`, as a CUDA graph. PEFT has bfloat16 adapters and takes the adapters' tokens one after the other.
"""

from __future__ import annotations

import csv
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from fused_lora import LoRABatch, LoRALinear, LoRASegment, LoRASettings
from fused_lora.gpu.host.calls import launching

GPU, DTYPE = torch.device("cuda"), torch.bfloat16
TOKENS = [64 << power for power in range(10)]
MODELS = ((4096, 1024, 14336), (5120, 1024, 27648), (8192, 1024, 28672))  # hidden, keys, MLP
SPAN, MOST_CALLS = 0.03, 20  # seconds and calls of a measurement: as many as the driver's queue holds


class Point(NamedTuple):
    columns: int
    rows: int
    tokens: int
    rank: int = 16
    adapters: int = 1
    dropout: float = 0.1


def points() -> Iterator[Point]:
    for hidden, keys, inner in MODELS:
        for shape in ((hidden, hidden), (hidden, keys), (hidden, inner), (inner, hidden)):
            yield from (Point(*shape, tokens) for tokens in TOKENS)
    for shape in ((4096, 4096), (4096, 14336)):
        for other in ({"rank": 4}, {"rank": 128}, {"adapters": 4}, {"adapters": 16}, {"dropout": 0.0}):
            yield from (Point(*shape, tokens, **other) for tokens in TOKENS)


def ways(point: Point) -> dict[str, tuple[nn.Module, Callable[[Tensor], Tensor], bool]]:
    """What is trained, from x to y, and whether calls are remembered."""
    base = nn.Linear(point.columns, point.rows, bias=False, dtype=DTYPE, device=GPU).requires_grad_(False)
    settings = [LoRASettings(point.rank, 16, point.dropout, seed=seed) for seed in range(point.adapters)]
    fused = LoRALinear(base, settings)
    borders = [index * point.tokens // point.adapters for index in range(point.adapters + 1)]
    segments = [LoRASegment(*borders[index : index + 2], index) for index in range(point.adapters)]
    batch = LoRABatch.of(segments, torch.arange(point.tokens, device=GPU))
    model = nn.Sequential()
    model.add_module("q_proj", base)
    config = LoraConfig(r=point.rank, lora_dropout=point.dropout, target_modules=["q_proj"])
    theirs = get_peft_model(model, config, autocast_adapter_dtype=False).base_model.model.q_proj
    sizes = [segment.stop - segment.start for segment in segments]

    def in_turns(x: Tensor) -> Tensor:
        return torch.cat([theirs(part) for part in x.split(sizes)])

    return {
        "frozen": (base, base, False),
        "peft": (theirs, theirs if len(sizes) == 1 else in_turns, False),
        "fused": (fused, lambda x: fused(x, batch), False),
        "remembered": (fused, lambda x: fused(x, batch), True),
    }


def measured(function: Callable[[], Any]) -> dict[str, float]:
    """Seconds of a call."""
    for _ in range(3):
        function()
    torch.cuda.synchronize()
    calls, host, wall = 1, 0.0, 0.0
    for _ in range(2):  # the first tells how many
        start = time.perf_counter()
        for _ in range(calls):
            function()
        host = (time.perf_counter() - start) / calls
        torch.cuda.synchronize()
        wall = (time.perf_counter() - start) / calls
        calls = min(MOST_CALLS, max(3, int(SPAN / wall)))
    graph, (begin, end) = torch.cuda.CUDAGraph(), (torch.cuda.Event(enable_timing=True) for _ in range(2))
    with torch.cuda.graph(graph):
        function()
    graph.replay()
    begin.record()
    for _ in range(calls):
        graph.replay()
    end.record()
    torch.cuda.synchronize()
    return {"host": host, "wall": wall, "device": begin.elapsed_time(end) / 1e3 / calls}


def rows(point: Point) -> Iterator[dict[str, Any]]:
    x = torch.randn(point.tokens, point.columns, device=GPU, dtype=DTYPE, requires_grad=True)
    dy = torch.randn(point.tokens, point.rows, device=GPU, dtype=DTYPE)
    for way, (module, function, remembers) in ways(point).items():
        leaves = [x, *(parameter for parameter in module.parameters() if parameter.requires_grad)]

        def trained(function: Callable = function, leaves: list[Tensor] = leaves) -> object:
            return torch.autograd.grad(function(x), leaves, dy)

        with launching(remembers=remembers):
            times = measured(trained)
        yield point._asdict() | {"way": way} | {name: round(1e6 * value, 1) for name, value in times.items()}


def main() -> None:
    with open(sys.argv[1], "w", newline="") as file:
        writer = csv.DictWriter(file, [*Point._fields, "way", "host", "wall", "device"], lineterminator="\n")
        writer.writeheader()
        for point in points():
            writer.writerows(rows(point))
            file.flush()


if __name__ == "__main__":
    main()
