"""How fast attention over packed samples is, by FlashAttention-2 and by cuDNN, on a GPU.

Usage: python tools/measure_attention.py [--model llama-3.1-8b] [--tokens 8192] [--microbatches 4] [--replays 20]

Prints a line of JSON for each row: samples of equal length, one sample, and microbatches of the plan of the workload
`mixed`. In it, for each backend: microseconds of the forward pass and of both, the latter with the same bits each time
too, and TFLOP/s of both passes; and how many times as fast as FlashAttention-2 cuDNN is.
"""

import argparse
import json
import statistics
from collections.abc import Callable, Sequence

import torch

from lorafusion.core.config import CONFIGS, read_model
from lorafusion.core.plan import Microbatch
from lorafusion.core.workload import Workload
from lorafusion.data.lengths import make_workload
from lorafusion.data.packing import SampleBorders
from lorafusion.lab.experiments.timing import median_ratio, own_stream, prepared, seconds
from lorafusion.model import attention
from lorafusion.planning import plan_system

GPU = torch.device("cuda", 0)
FORWARD, BOTH, EQUAL_BITS = "forward", "forward + backward", "forward + backward, equal bits"


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--model", default="llama-3.1-8b")
    for name, default in (("tokens", 8192), ("microbatches", 4), ("replays", 20)):
        options.add_argument(f"--{name}", type=int, default=default)
    chosen = options.parse_args()
    heads = attention.Heads.of(read_model(chosen.model))
    rows = {f"{chosen.tokens // length} x {length}": [length] * (chosen.tokens // length)
            for length in (512, 1024, chosen.tokens)}  # fmt: skip
    rows |= {f"mixed {index}": lengths for index, lengths in enumerate(mixed(chosen.tokens, chosen.microbatches))}
    with own_stream(GPU):
        for name, lengths in rows.items():
            print(json.dumps({"row": name} | measured(heads, lengths, chosen.replays)), flush=True)


def mixed(capacity: int, count: int) -> list[list[int]]:
    """The samples' tokens of the first microbatches of a plan, that of the padding included."""
    workload = make_workload(CONFIGS / "workloads" / "mixed.yaml", samples=64, global_batch=8, seed=1)
    plan = plan_system(workload, "lorafusion", stages=1, capacity=capacity, graphs=True)
    return [lengths_of(part, workload) for part in plan.microbatches if not part.noop][:count]


def lengths_of(microbatch: Microbatch, workload: Workload) -> list[int]:
    lengths = [workload.jobs[segment.adapter].sample_at(position).tokens
               for segment in microbatch.segments for position in segment.samples]  # fmt: skip
    return lengths + [microbatch.padding] * (microbatch.padding > 0)


def measured(heads: attention.Heads, lengths: Sequence[int], replays: int) -> dict[str, object]:
    passes = {(backend, name): work for backend in attention.BACKENDS
              for name, work in passes_of(backend, heads, lengths).items()}  # fmt: skip
    times = seconds(passes, GPU, replays)
    row: dict[str, object] = {"samples": len(lengths), "longest": max(lengths)}
    # Two products of a forward pass, five of a backward pass, over half a square.
    work = 7 * sum(length**2 for length in lengths) * heads.queries * heads.size
    for (backend, name), each in times.items():
        row[f"{backend}: {name}, us"] = round(1e6 * statistics.median(each), 1)
        if name == BOTH:
            row[f"{backend}: TFLOP/s"] = round(1e-12 * work / statistics.median(each), 1)
    for name in (FORWARD, BOTH, EQUAL_BITS):
        row[f"{name}, times as fast"] = round(median_ratio(times["flash", name], times["cudnn", name]), 3)
    return row


def passes_of(backend: str, heads: attention.Heads, lengths: Sequence[int]) -> dict[str, Callable[[], None]]:
    """By name, as graphs. Forward and backward are captured together."""
    generator, tokens = torch.Generator(GPU).manual_seed(1), sum(lengths)
    shapes = [(1, tokens, count, heads.size) for count in (heads.queries, heads.keys, heads.keys, heads.queries)]
    *packed, gradient = [torch.randn(shape, device=GPU, generator=generator).bfloat16() for shape in shapes]
    leaves = [tensor.transpose(1, 2).requires_grad_() for tensor in packed]
    borders = SampleBorders.of(lengths, GPU)

    def forward() -> torch.Tensor:
        ragged = attention.prepared(borders, backend, heads, leaves[0][0])
        return attention.packed_attention(
            torch.nn.Module(), *leaves, None, borders=ragged, scaling=heads.size**-0.5
        )[0]  # fmt: skip

    def both() -> None:
        torch.autograd.grad(forward(), leaves, gradient)

    captured = {FORWARD: prepared(forward, GPU), BOTH: prepared(both, GPU)}
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        return captured | {EQUAL_BITS: prepared(both, GPU)}
    finally:
        torch.use_deterministic_algorithms(False)


if __name__ == "__main__":
    main()
