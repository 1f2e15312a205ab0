"""How long a stage takes as CUDA graphs, in wall time as a training sees it, over the graph of its frozen layers.

Usage: python tools/measure_graphs.py MODEL [--tokens 512 1024 2048 4096] [--adapters 4] [--layers 1] [--rank 16]

Prints a line of JSON for each number of tokens: milliseconds of forward and backward for each layer, `frozen` of the
frozen layers' graph, `graphs` of what the engine replays, with the copies into and out of it, `eager` without graphs;
the ratios to `frozen`; and what the capture took.
"""

import argparse
import json
import time
from collections.abc import Callable
from functools import partial

import torch

from lorafusion.core.config import read_model
from lorafusion.core.plan import Microbatch, Segment, bounds_of
from lorafusion.core.workload import Job, Sample, Workload
from lorafusion.data.packing import BatchBuilder, PackedBatch
from lorafusion.data.tokens import SyntheticTokens
from lorafusion.engine.graphs import CudaRecorder, StageGraphs
from lorafusion.lab.experiments.bench import equal_jobs
from lorafusion.model.liger import is_installed, use_liger
from lorafusion.model.lora import ActiveBatch, fused, inject_adapters
from lorafusion.model.stage import Stage, build_stage

GPU, DTYPE, REPEATS, SECONDS = torch.device("cuda", 0), torch.bfloat16, 5, 0.5


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("model")
    options.add_argument("--tokens", type=int, nargs="+", default=[512, 1024, 2048, 4096])
    for name, default in (("adapters", 4), ("layers", 1), ("rank", 16)):
        options.add_argument(f"--{name}", type=int, default=default)
    chosen = options.parse_args()
    config = read_model(chosen.model)
    count = config.num_hidden_layers // chosen.layers  # of stages: the second has neither embedding nor head
    stages = [build_stage(config, index=1, count=count, device=GPU, dtype=DTYPE, seed=1) for _ in range(2)]
    for stage in stages if is_installed() else ():
        use_liger(stage)
    batches = {tokens: batch_of(tokens, chosen.adapters, chosen.rank) for tokens in chosen.tokens}
    jobs = jobs_of(chosen.adapters, chosen.rank)
    active = inject_adapters(stages[1], jobs, DTYPE, fused)
    for stack in active.stacks:  # a GPU multiplies zeros faster
        torch.nn.init.normal_(stack.b.data, std=0.02)
    x = torch.randn(1, max(chosen.tokens), config.hidden_size, device=GPU, dtype=DTYPE)
    graphs = StageGraphs(partial(through, stages[1], active), active.stacks, list(batches.values()), (x, x), 1,
                         CudaRecorder(GPU))  # fmt: skip
    print(json.dumps(graphs.usage._asdict()), flush=True)
    for tokens, batch in batches.items():
        part, resident = x[:, :tokens].clone(), batch.on(GPU)
        passes = {
            "frozen": replay_of(partial(both, partial(through, stages[0], ActiveBatch()), resident, part)),
            "graphs": partial(both, graphs, batch, part),
            "eager": partial(both, partial(through, stages[1], active), resident, part),
        }
        times = {name: 1e3 * seconds(work) / chosen.layers for name, work in passes.items()}
        ratios = {f"{name} over frozen": times[name] / times["frozen"] for name in ("graphs", "eager")}
        print(json.dumps({"tokens": tokens} | {key: round(value, 4) for key, value in (times | ratios).items()}))


def jobs_of(adapters: int, rank: int, tokens: int = 2) -> tuple[Job, ...]:
    samples = tuple(Sample(i, min(1024, tokens - first)) for i, first in enumerate(range(0, tokens, 1024)))
    return equal_jobs(adapters, rank=rank, alpha=2.0 * rank, dropout=0.1, global_batch_size=len(samples),
                      samples=samples)  # fmt: skip


def batch_of(tokens: int, adapters: int, rank: int) -> PackedBatch:
    """A microbatch with a global batch of each adapter, of samples of at most 1024 tokens."""
    jobs = jobs_of(adapters, rank, tokens // adapters)
    segments = tuple(Segment(adapter=adapter, samples=tuple(range(len(jobs[0].samples))), tokens=tokens // adapters)
                     for adapter in range(adapters))  # fmt: skip
    microbatch = Microbatch(segments=segments, bucket=tokens)
    workload = Workload(name="graphs", jobs=jobs)
    return BatchBuilder(workload, SyntheticTokens(1000), GPU).build(microbatch, bounds_of(microbatch, workload))


def through(stage: Stage, active: ActiveBatch, batch: PackedBatch, x: torch.Tensor) -> torch.Tensor:
    active.batch = batch
    return stage(x, batch.position_ids, batch.borders)


def both(forward: Callable, batch: PackedBatch, x: torch.Tensor) -> None:
    leaf = x.detach().requires_grad_()
    out = forward(batch, leaf)
    out.backward(x)


def replay_of(work: Callable[[], None]) -> Callable[[], None]:
    recorder = CudaRecorder(GPU)
    recorder.rehearse(work)
    return recorder.capture(work, recorder.pool())


def seconds(work: Callable[[], None]) -> float:
    """Of the wall, the median of several turns of half a second, in which the host runs ahead as in a training."""
    times = []
    for _ in range(REPEATS + 1):  # the first warms up
        torch.cuda.synchronize()
        begin, count = time.perf_counter(), 0
        while time.perf_counter() - begin < SECONDS:
            for _ in range(8):
                work()
            torch.cuda.synchronize()
            count += 8
        times.append((time.perf_counter() - begin) / count)
    return sorted(times[1:])[REPEATS // 2]


if __name__ == "__main__":
    main()
