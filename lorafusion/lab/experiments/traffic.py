"""Bytes that a LoRA linear's forward and backward pass move to and from the GPU's memory, by its hardware counters.

Nsight Compute (`ncu`) runs this module as a program of its own for each shape and reads the counters of every kernel
between two marks; a kernel of another kind begins each implementation's part. It empties the caches before each kernel,
as for the published numbers: what a kernel finds in the L2 cache from the one before it counts as traffic, so that the
figure is an upper bound of a training's.
"""

from __future__ import annotations

import csv
import io
import shutil
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import torch

from lorafusion.core.machine import provenance
from lorafusion.core.schema import UserError
from lorafusion.lab.experiments.implementations import Builder, Setting
from lorafusion.lab.experiments.kernel_suite import (
    KERNELS,
    Bench,
    KernelSuite,
    LinearBlock,
    bench_hash,
    read_kernel_suite,
)
from lorafusion.lab.experiments.kernel_times import _row, require_device
from lorafusion.lab.experiments.rows import write_bench

COUNTERS = ("dram__bytes_read.sum", "dram__bytes_write.sum")
UNITS = {"byte": 1, "Kbyte": 1e3, "Mbyte": 1e6, "Gbyte": 1e9}  # decimal, in ncu's words
SECONDS = 300  # for one program under ncu
SEPARATOR = "spin_kernel"  # of torch.cuda._sleep


def run_traffic(suite_name: str, out: Path, log: Path | None) -> str:
    """Read the counters for all that a kernel suite's `traffic` names, and write one result file."""
    suite = read_kernel_suite(suite_name)
    if suite.traffic is None:
        raise UserError(f"{KERNELS}: {suite_name}: no `traffic`")
    require_device(suite)
    tool = shutil.which("ncu")
    if tool is None:
        raise UserError("ncu: not found; it comes with Nsight Compute, part of the CUDA toolkit")
    started, rows = datetime.now(UTC).isoformat(timespec="seconds"), []
    for shape in suite.traffic.shapes:
        bench = traffic_bench(suite, shape)
        for row in counted(tool, suite_name, bench, suite.traffic.tokens):
            rows.append(row)
            print(f"{row['cell']['cell']}: {row['value'] or row['note']}", flush=True)
    first = traffic_bench(suite, suite.traffic.shapes[0])
    cell = {"suite": suite_name, "kind": "measured", "cell": "traffic", "gpus": 1, "repeat": 1, "rank": first.rank,
            "dropout": first.dropout, "dtype": suite.dtype}  # fmt: skip
    write_bench(out, cell, rows, provenance(suite.device), config_hash=bench_hash(suite, first), seed=suite.seed,
                started=started, log=log,
                command=["kernels", "traffic", "--suite", suite_name, "--out", out])  # fmt: skip
    return f"{len(rows)} numbers, {sum(row['status'] != 'ok' for row in rows)} failed"


def traffic_bench(suite: KernelSuite, shape: tuple[int, int]) -> Bench:
    """A bench of its own, whose numbers are not mixed with the times'."""
    traffic = suite.traffic
    block = LinearBlock(shapes=[shape], tokens=[traffic.tokens], implementations=traffic.implementations,
                        adapters=[traffic.adapters])  # fmt: skip
    return Bench(subject=f"traffic~{shape[0]}x{shape[1]}", rank=16, dropout=0.1, block=block, shape=shape)


def counted(tool: str, suite_name: str, bench: Bench, tokens: int) -> list[dict]:
    """A row for each of the bench's points: bytes read and written in its forward and backward pass."""
    command = [
        tool, "--clock-control", "none", "--csv", "--page", "raw", "--profile-from-start", "off",
        "--metrics", ",".join(COUNTERS),
        sys.executable, "-m", "lorafusion.lab.experiments.traffic", suite_name, *map(str, bench.shape),
    ]  # fmt: skip
    rows = [_row(bench, point, "dram_traffic", 0.0, "both") for point in bench.points(tokens)]
    for row in rows:
        row["cell"] |= dict(zip(("in_features", "out_features"), bench.shape, strict=True))
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
    except subprocess.TimeoutExpired:
        lost = {"value": None, "status": "timeout", "note": f"ncu took more than {SECONDS} s"}
        return [row | lost for row in rows]
    if done.returncode:
        note = " ".join((done.stderr or done.stdout).split())[-200:]
        return [row | {"value": None, "status": "crash", "note": f"ncu: {note}"} for row in rows]
    try:
        sums = summed_bytes(done.stdout, len(rows))
    except UserError as error:
        return [row | {"value": None, "status": "crash", "note": str(error)} for row in rows]
    note = "ncu, caches emptied before each kernel"
    return [row | {"value": value, "note": note} for row, value in zip(rows, sums, strict=True)]


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
    found = sum(map(bool, sums))
    if found != parts:
        raise UserError(f"ncu: expected a table with the kernels of {parts} implementations, found {found}")
    return sums


def profiled(suite_name: str, inputs: str, outputs: str) -> None:
    """What ncu runs: each point twice to warm up, and once between the marks."""
    suite = read_kernel_suite(suite_name)
    bench = traffic_bench(suite, (int(inputs), int(outputs)))
    builder = Builder(bench, Setting(torch.device(suite.device), getattr(torch, suite.dtype), suite.seed))
    for point in bench.points(suite.traffic.tokens):
        subject = builder.build(point)
        for _ in range(2):
            subject.both()
        torch.cuda.synchronize()
        torch.cuda.cudart().cudaProfilerStart()
        torch.cuda._sleep(1)
        subject.both()
        torch.cuda.synchronize()
        torch.cuda.cudart().cudaProfilerStop()


if __name__ == "__main__":
    profiled(*sys.argv[1:])
