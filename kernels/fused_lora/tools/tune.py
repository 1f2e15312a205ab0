"""Measure the launch choices of every kernel on this GPU: `python -m fused_lora.tools.tune`.

Writes `fused_lora/tuned/<gpu>.json`, which `gpu.host.choices` reads: for each kernel and shape the fastest of the
candidates below, with its time, the library GEMM's among the GEMMs, and a hash of the sources. A candidate that does
not compile or run, or keeps registers in memory, is counted and left out. Entries of other shapes stay as they are.
"""

import argparse
import hashlib
import itertools
import json
import multiprocessing
import os
import statistics
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

import torch
import triton
from triton.runtime.jit import JITFunction

from fused_lora.adapters import AdapterTable, LoRAAdapter, LoRABatch, LoRASegment, rank_width
from fused_lora.gpu.host import choices, gemms, launch, passes
from fused_lora.gpu.host.calls import Call, launching, target_of
from fused_lora.gpu.host.choices import Shape, own_gemm
from fused_lora.linear import operator_arguments
from fused_lora.tools.timing import ColdClock

Choice = dict[str, Any]
Choose = Callable[[str, Shape, choices.Target], Choice]
# Sizes of the linears that adapters are trained on, (in, out): Llama-3.1-8B, Qwen2.5-32B, Llama-3.1-70B.
LINEARS = (
    (4096, 4096), (4096, 1024), (4096, 14336), (14336, 4096),
    (5120, 5120), (5120, 1024), (5120, 27648), (27648, 5120),
    (8192, 8192), (8192, 1024), (8192, 28672), (28672, 8192),
)  # fmt: skip
# Those that share their input: q, k and v; gate and up.
SHARED = ((4096, (4096, 1024, 1024)), (5120, (5120, 1024, 1024)), (8192, (8192, 1024, 1024)),
          (4096, (14336, 14336)), (5120, (27648, 27648)), (8192, (28672, 28672)))  # fmt: skip
# Numbers of tokens. Whose GEMM is faster changes wherever our tiles need a turn more of the multiprocessors, as just
# above 1024 and 2048 tokens for 4096 columns on an H200: half of the last turn is idle there.
TOKENS = (128, 512, 1024, 2048, 4096, 8192, 16384)
GEMM_TOKENS = (*TOKENS, 64, 256, 384, 768, 1152, 1536, 2304, 2560, 3072, 3584, 4608, 5120, 6144, 12288)


def _grid(**values: tuple) -> list[Choice]:
    return [dict(zip(values, picked, strict=True)) for picked in itertools.product(*values.values())]


CANDIDATES: dict[str, list[Choice]] = {
    "masks": _grid(rows=(4, 8, 16, 32), columns=(32, 64, 128), warps=(4, 8)),
    "project": [
        *_grid(rows=(32, 64), columns=(64, 128), splits=(1, 2, 4, 8), warps=(4,), stages=(3, 4)),
        *_grid(rows=(16, 32, 64), columns=(256,), splits=(1, 2, 4), warps=(4,), stages=(2, 3, 4)),
        *_grid(rows=(64, 128), columns=(128,), splits=(1, 2, 4, 8), warps=(8,), stages=(3,)),
    ],
    "output_pass": [
        *_grid(chunk=(256, 512, 1024), rows=(32, 64), columns=(128, 256), warps=(4, 8), stages=(2, 3)),
        *_grid(chunk=(256, 512), rows=(128,), columns=(128, 512), warps=(8,), stages=(2,)),
        *_grid(chunk=(256, 512), rows=(64,), columns=(512,), warps=(8,), stages=(2,)),
    ],
    "expand_output": _grid(rows=(32, 64, 128), columns=(64, 128, 256), warps=(4, 8)),
    "expand_input": _grid(rows=(32, 64, 128), columns=(64, 128, 256), warps=(4, 8)),
}
GEMM_CANDIDATES = [
    {"gemm": choices.LIBRARY},
    *(own_gemm(group=group) for group in (4, 8, 16)),
    *(own_gemm(group=group, slices=4, stores=2) for group in (8, 16)),
]
INPUT_PASS = [
    *_grid(chunk=(128, 256, 512, 1024), rows=(32, 64), columns=(128, 256), warps=(4,), stages=(3,)),
    *_grid(chunk=(256, 512), rows=(64,), columns=(128,), warps=(4,), stages=(2, 4)),
    *_grid(chunk=(512, 1024, 2048), rows=(64,), columns=(128, 256), warps=(8,), stages=(2, 3)),
]
CANDIDATES |= {"output": GEMM_CANDIDATES, "input": GEMM_CANDIDATES, "input_pass": INPUT_PASS}
ORDER = tuple(CANDIDATES)  # in which a kernel's choice is known before others are measured with it


def main() -> None:
    parser = argparse.ArgumentParser(prog="fused_lora.tools.tune", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="file to write; the default is where the kernels look for it")
    parser.add_argument("--tokens", type=int, nargs="+", help="numbers of them; GEMMs have more by default than others")
    parser.add_argument("--kernels", nargs="+", choices=ORDER, default=ORDER)
    parser.add_argument("--ranks", type=int, nargs="+", default=[16, 32, 64, 128])
    parser.add_argument("--jobs", type=int, default=min(12, os.cpu_count() or 1), help="processes that compile")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("error: tuning needs a GPU, and torch finds none")
    target = target_of(torch.device("cuda", torch.cuda.current_device()))
    out = arguments.out or choices.TUNED / f"{target.slug}.json"
    kernels = [kernel for kernel in ORDER if kernel in arguments.kernels]
    tasks = [task for kernel in kernels for task in shapes(kernel, arguments)]
    compile_all(tasks, arguments.jobs)
    entries = measure_all(tasks, out, target)
    print(f"{out}: {len(entries)} entries")


def measure_all(tasks: list, out: Path, target: choices.Target) -> list[dict]:
    """The file's entries, with those of the tasks measured anew; it is written after each, so that what was measured
    stays whenever this is stopped."""
    out.parent.mkdir(parents=True, exist_ok=True)
    entries = json.loads(out.read_text())["entries"] if out.is_file() else []
    for kernel, shape, widths in tasks:
        entry = tuned(kernel, shape, widths, entries)
        if entry is None:
            print(f"{kernel} {shape}: every candidate that runs spills; no entry of its own", flush=True)
            continue
        entries = replaced(entries, entry)
        print(_line(entry), flush=True)
        out.write_text(_text(entries, target))
    return entries


def shapes(kernel: str, arguments: argparse.Namespace) -> Iterator[tuple[str, Shape, tuple[int, ...]]]:
    """Kernel, shape and the linears' output widths of everything that is tuned."""
    single = [(inputs, (outputs,)) for inputs, outputs in LINEARS]
    linears = [*single, *SHARED] if kernel in ("project", "input_pass", "expand_input", "input") else single
    ranks = arguments.ranks[: 1 if kernel in choices.OF_ANY_RANK else None]
    every = arguments.tokens or sorted(GEMM_TOKENS if kernel in choices.GEMMS else TOKENS)
    seen: set[Shape] = set()
    for rank, tokens, (inputs, widths) in itertools.product(ranks, every, linears):
        shape = Shape(tokens, *_sizes(kernel, inputs, widths), len(widths), rank_width(rank))
        if shape not in seen:  # a pass does not see the linear's other side
            seen.add(shape)
            yield kernel, shape, widths


def _sizes(kernel: str, inputs: int, widths: tuple[int, ...]) -> tuple[int, int]:
    """What a kernel's choice calls columns and inner dimension."""
    if kernel in ("masks", "project", "input_pass", "expand_input"):
        return inputs, 0
    if kernel in ("output_pass", "expand_output"):
        return widths[0], 0
    return (widths[0], inputs) if kernel == "output" else (inputs, sum(widths))


def runner(kernel: str, shape: Shape, widths: tuple[int, ...]) -> Callable[[], None]:
    """A function that runs one kernel, or what takes its place, on random data of a shape."""
    device = torch.device("cuda")
    inputs = shape.inner if kernel == "output" else shape.columns
    if kernel in ("output_pass", "expand_output"):
        inputs = 64  # of no matter
    x = torch.randn(shape.tokens, inputs, device=device, dtype=torch.bfloat16)
    weights = [torch.randn(width, inputs, device=device, dtype=torch.bfloat16) / inputs**0.5 for width in widths]
    adapters = random_adapters(shape.ranks, inputs, widths, device)
    table = AdapterTable.of(adapters, device)
    batch = LoRABatch.of([LoRASegment(0, shape.tokens, 0)], torch.arange(shape.tokens, device=device))
    call = Call(*operator_arguments(adapters, batch, table, training=True), x, weights)
    bits = passes.draw_masks(call)
    s = torch.randn(call.linears, call.tokens, call.width, device=device, dtype=torch.bfloat16)
    dys = [torch.randn(shape.tokens, width, device=device, dtype=torch.bfloat16) for width in widths]
    group = slice(0, len(widths))
    no_bias, (da, db), dx = x.new_empty(0), call.factor_gradients(True), torch.empty_like(x)

    return {
        "masks": lambda: passes.draw_masks(call),
        "project": lambda: passes.project_masked(call, group, bits, s),
        "output_pass": lambda: passes.output_pass(call, 0, dys[0], s, torch.empty_like(s), db),
        # As it runs: beside dx, whose time is in the entry's.
        "input_pass": lambda: launch.input_gradients(call, dys, s, bits, dx, da),
        "expand_output": lambda: gemms.expand_output(call, 0, s, no_bias, dys[0]),
        "output": lambda: gemms.output(call, 0, s, no_bias, dys[0]),
        "expand_input": lambda: gemms.expand_input(call, group, s, bits, dx),
        "input": lambda: gemms.input_product(call, group, dys, s, bits, dx),
    }[kernel]


def random_adapters(rank: int, inputs: int, widths: tuple[int, ...], device: torch.device) -> list[list[LoRAAdapter]]:
    """One adapter in bf16 on each linear."""

    def factor(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device, dtype=torch.bfloat16)

    return [
        [LoRAAdapter(factor(rank, inputs), factor(outputs, rank), 2.0, 0.1, key=5 + linear)]
        for linear, outputs in enumerate(widths)
    ]


def tuned(kernel: str, shape: Shape, widths: tuple[int, ...], entries: list[dict]) -> dict[str, Any] | None:
    """The entry of the fastest candidate, or None where all that run spill; earlier entries are the choices of the
    other kernels that it runs with. Raises what the last candidate did where none runs."""
    launches = runner(kernel, shape, widths)
    graphs, spilled, error = {}, 0, None
    for index, candidate in enumerate(CANDIDATES[kernel]):
        choose = chooser(kernel, candidate, entries)
        try:
            if spills(launches, choose):
                spilled += 1
            else:
                graphs[index] = captured(launches, choose)
        except Exception as caught:  # out of shared memory, or the compiler fails: data, not an error
            error = caught
    if not graphs:
        if not spilled:
            raise error
        return None
    times = microseconds(graphs)
    best = min(times, key=times.get)
    failed = len(CANDIDATES[kernel]) - len(times) - spilled
    measured = {"microseconds": round(times[best], 2), "candidates": len(times), "failed": failed, "spilled": spilled}
    if kernel in choices.GEMMS and 0 in times:
        measured["library_microseconds"] = round(times[0], 2)
    measured["sources"] = sources_hash()
    measured["measured_at"] = datetime.now(UTC).isoformat(timespec="seconds")
    return choices.entry(kernel, shape, CANDIDATES[kernel][best], **measured)


@cache
def sources_hash() -> str:
    """Sixteen hexadecimal digits that change with any of this package's modules."""
    digest, folder = hashlib.sha256(), Path(__file__).parents[1]
    for path in sorted(folder.rglob("*.py")):
        digest.update(f"{path.relative_to(folder)}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def spills(launches: Callable[[], None], choose: Choose) -> bool:
    """Does one of the kernels that a function launches keep registers in memory? How much that costs is the next
    compiler's to say, and `fused_lora.tools.build` lets none pass."""
    launched = []

    def note(kernel: JITFunction) -> Callable[..., None]:
        return lambda *arguments, **keywords: launched.append(kernel.run(*arguments, **keywords))

    with launching(choose=choose, run_of=note):
        launches()
    return any(kernel.n_spills for kernel in launched)


def captured(launches: Callable[[], None], choose: Choose) -> torch.cuda.CUDAGraph:
    """A graph of a function's kernels: the host's own time does not count when it is replayed."""
    graph = torch.cuda.CUDAGraph()
    with launching(choose=choose):
        launches()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            launches()
    return graph


def microseconds(graphs: dict[int, torch.cuda.CUDAGraph], repeats: int = 15) -> dict[int, float]:
    """The median time of each graph. They take turns without a pause, so that the GPU is as warm, and its clock as low,
    as in a training, and for all alike."""
    clock = ColdClock(torch.device("cuda"))
    events = {index: [] for index in graphs}
    for _ in range(repeats):
        for index, graph in graphs.items():
            events[index].append(clock.around(graph.replay))
    torch.cuda.synchronize()
    warm = repeats // 3
    return {
        index: statistics.median(begin.elapsed_time(end) for begin, end in pairs[warm:]) * 1e3
        for index, pairs in events.items()
    }


def chooser(kernel: str, candidate: Choice, entries: list[dict]) -> Choose:
    """Chooses the candidate for its kernel, what was tuned before for the others, else the defaults."""
    tuned_before = {_key_of(entry): entry["choice"] for entry in entries}

    def choose(name: str, shape: Shape, target: choices.Target) -> Choice:
        default = choices.defaults(name, shape, target)
        return default | (candidate if name == kernel else tuned_before.get(_key(name, shape), {}))

    return choose


def _key(kernel: str, shape: Shape) -> tuple[str, Shape]:
    """A kernel and what of the shape its choice depends on."""
    return kernel, replace(
        shape,
        inner=shape.inner if kernel in choices.GEMMS else 0,
        ranks=0 if kernel in choices.OF_ANY_RANK else shape.ranks,
    )


def _key_of(entry: dict) -> tuple[str, Shape]:
    return _key(entry["kernel"], Shape(**entry["shape"]))


def compile_all(tasks: list, jobs: int) -> None:
    """Compile all candidates in processes of their own, which fills Triton's cache: twelve times as fast."""
    work = {(kernel, shape.linears, shape.ranks, index): (kernel, shape, widths, index)
            for kernel, shape, widths in tasks for index in range(len(CANDIDATES[kernel]))}  # fmt: skip
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        list(pool.map(_compile, work.values(), chunksize=4))


def _compile(task: tuple) -> None:
    kernel, shape, widths, index = task
    try:
        with launching(choose=chooser(kernel, CANDIDATES[kernel][index], [])):
            runner(kernel, shape, widths)()
            torch.cuda.synchronize()
    except Exception:  # `tuned` counts it
        pass


def replaced(entries: list[dict], new: dict) -> list[dict]:
    """The entries with a new one, in the place of those that it stands for."""
    key = _key_of(new)
    index = next((i for i, item in enumerate(entries) if _key_of(item) == key), len(entries))
    rest = [item for item in entries if _key_of(item) != key]
    return [*rest[:index], new, *rest[index:]]


def _text(entries: list[dict], target: choices.Target) -> str:
    provenance = {
        "gpu": target.name,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda,
    }
    lines = ",\n".join("    " + json.dumps(item) for item in entries)
    return f'{{\n  "provenance": {json.dumps(provenance)},\n  "entries": [\n{lines}\n  ]\n}}\n'


def _line(item: dict) -> str:
    shape = item["shape"]
    sizes = f"{shape['tokens']}x{shape['columns']}x{shape['inner']} P{shape['linears']} r{shape['ranks']}"
    library = f" (library {item['library_microseconds']})" if "library_microseconds" in item else ""
    settings = " ".join(f"{name}={value}" for name, value in item["choice"].items())
    return f"{item['kernel']:14} {sizes:28} {item['microseconds']:9.1f} us{library}  {settings}"


if __name__ == "__main__":
    main()
