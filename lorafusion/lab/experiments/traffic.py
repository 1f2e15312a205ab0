"""Bytes that a LoRA linear's forward and backward pass move to and from the GPU's memory, by its hardware counters.

Nsight Compute (`ncu`) runs this module as a program of its own for each shape and reads the counters of every kernel
between two marks; a kernel of another kind begins each implementation's part. It empties the caches before each kernel,
as for the published numbers: what a kernel finds in the L2 cache from the one before it counts as traffic, so that the
figure is an upper bound of a training's.
"""

import csv
import io
import shutil
import subprocess
import sys

import torch

from lorafusion.core.schema import UserError
from lorafusion.lab.experiments.experiment import Point
from lorafusion.lab.experiments.implementations import Builder, Setting
from lorafusion.lab.experiments.kernel_suite import KernelBench
from lorafusion.lab.experiments.kernel_times import case_row

COUNTERS = ("dram__bytes_read.sum", "dram__bytes_write.sum")
UNITS = {"byte": 1, "Kbyte": 1e3, "Mbyte": 1e6, "Gbyte": 1e9}  # decimal, in ncu's words
SECONDS = 300  # for one program under ncu
SEPARATOR = "spin_kernel"  # of torch.cuda._sleep


def traffic_rows(point: Point) -> list[dict]:
    """The rows of the counters for all that a kernel suite's `traffic` names."""
    tool, rows = shutil.which("ncu"), []
    if tool is None:
        raise UserError("ncu: not found; it comes with Nsight Compute, part of the CUDA toolkit")
    for bench in point.subject:
        for row in counted(tool, point, bench):
            rows.append(row)
            print(f"{row['cell']['cell']}: {row['value'] or row['note']}", flush=True)
    return rows


def counted(tool: str, point: Point, bench: KernelBench) -> list[dict]:
    """A row for each of the bench's cases: bytes read and written in its forward and backward pass."""
    suite = point.settings
    command = [
        tool, "--clock-control", "none", "--csv", "--page", "raw", "--profile-from-start", "off",
        "--metrics", ",".join(COUNTERS),
        sys.executable, "-m", "lorafusion.lab.experiments.traffic", suite.device, suite.dtype, str(suite.seed),
        bench.model_dump_json(),
    ]  # fmt: skip
    cases = bench.cases(*bench.block.token_counts)
    sums, status, note = [None] * len(cases), "crash", "ncu, caches emptied before each kernel"
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
        if done.returncode:
            note = "ncu: " + " ".join((done.stderr or done.stdout).split())[-200:]
        else:
            sums, status = summed_bytes(done.stdout, len(cases)), "ok"
    except subprocess.TimeoutExpired:
        status, note = "timeout", f"ncu took more than {SECONDS} s"
    except UserError as error:
        note = str(error)
    rows = [case_row(bench, case, "dram_traffic", value, "both", status=status, note=note)
            for case, value in zip(cases, sums, strict=True)]  # fmt: skip
    for row in rows:
        row["cell"] |= bench.features
    return rows


def summed_bytes(text: str, parts: int) -> list[float]:
    """The sums over the kernels after each separator in ncu's table, whose second line has the units."""
    lines = [line for line in text.splitlines() if line.startswith('"')]
    units, *kernels = list(csv.DictReader(io.StringIO("\n".join(lines)))) or [{}]
    sums: list[float] = []
    for kernel in kernels:
        if SEPARATOR in kernel["Kernel Name"]:
            sums.append(0.0)
        elif sums:
            sums[-1] += sum(float(kernel[name].replace(",", "")) * UNITS[units[name]] for name in COUNTERS)
    count = sum(map(bool, sums))
    if count != parts:
        raise UserError(f"ncu: expected a table with the kernels of {parts} implementations, found {count}")
    return sums


def profiled(device: str, dtype: str, seed: str, bench_json: str) -> None:
    """What ncu runs: each case twice to warm up, and once between the marks."""
    bench = KernelBench.model_validate_json(bench_json)
    builder = Builder(bench, Setting(torch.device(device), getattr(torch, dtype), int(seed)))
    for case in bench.cases(*bench.block.token_counts):
        run = builder.build(case)
        for _ in range(2):
            run.both()
        torch.cuda.synchronize()
        torch.cuda.cudart().cudaProfilerStart()
        torch.cuda._sleep(1)
        run.both()
        torch.cuda.synchronize()
        torch.cuda.cudart().cudaProfilerStop()


if __name__ == "__main__":
    profiled(*sys.argv[1:])
