"""Bytes that a LoRA linear's forward and backward pass move to and from the GPU's memory, by its hardware counters.

Nsight Compute (`ncu`) runs this module as a program of its own and reads the counters of every kernel between two
marks. It empties the caches before each kernel, as for the published numbers: what a kernel finds in the L2 cache from
the one before it counts as traffic, so that the figure is an upper bound of a training's.
"""

from __future__ import annotations

import csv
import io
import shlex
import shutil
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import torch

from lorafusion.benchmarks.implementations import Builder, Setting
from lorafusion.benchmarks.measure import _row, require_device
from lorafusion.benchmarks.suite import KERNELS, Bench, KernelSuite, LinearBlock, Point, bench_hash, read_kernel_suite
from lorafusion.errors import UserError
from lorafusion.measure.environment import provenance
from lorafusion.runtime.result import VERSION, write_result

COUNTERS = ("dram__bytes_read.sum", "dram__bytes_write.sum")
UNITS = {"byte": 1, "Kbyte": 1e3, "Mbyte": 1e6, "Gbyte": 1e9}  # decimal, in ncu's words
SECONDS = 180  # for one program under ncu


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
        for point in bench.points(suite.traffic.tokens):
            rows.append(counted(tool, suite_name, bench, point))
            print(f"{rows[-1]['cell']['cell']}: {rows[-1]['value'] or rows[-1]['note']}", flush=True)
    first = traffic_bench(suite, suite.traffic.shapes[0])
    write_result(out, {
        "version": VERSION, "status": "ok",
        "cell": {"suite": suite_name, "kind": "measured", "cell": "traffic", "gpus": 1, "repeat": 1,
                 "rank": first.rank, "dropout": first.dropout, "dtype": suite.dtype},
        "expected": [], "metrics": rows,
        "provenance": provenance(suite.device) | {
            "config_hash": bench_hash(suite, first), "seed": suite.seed, "started_at": started,
            "log": str(log) if log else None, "command": shlex.join(["lorafusion", *sys.argv[1:]]),
        },
    })  # fmt: skip
    return f"{len(rows)} numbers, {sum(row['status'] != 'ok' for row in rows)} failed"


def traffic_bench(suite: KernelSuite, shape: tuple[int, int]) -> Bench:
    """A bench of its own, whose numbers are not mixed with the times'."""
    traffic = suite.traffic
    block = LinearBlock(shapes=[shape], tokens=[traffic.tokens], implementations=traffic.implementations,
                        adapters=[traffic.adapters])  # fmt: skip
    return Bench(subject=f"traffic~{shape[0]}x{shape[1]}", rank=16, dropout=0.1, block=block, shape=shape)


def counted(tool: str, suite_name: str, bench: Bench, point: Point) -> dict:
    """The row of one point: bytes read and written in its forward and backward pass."""
    command = [
        tool, "--clock-control", "none", "--csv", "--page", "raw", "--profile-from-start", "off",
        "--metrics", ",".join(COUNTERS),
        sys.executable, "-m", "lorafusion.benchmarks.traffic", suite_name, *map(str, bench.shape), point.implementation,
    ]  # fmt: skip
    row = _row(bench, point, "dram_traffic", 0.0, "both")
    row["cell"] |= dict(zip(("in_features", "out_features"), bench.shape, strict=True))
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return row | {"value": None, "status": "timeout", "note": f"ncu took more than {SECONDS} s"}
    if done.returncode:
        note = " ".join((done.stderr or done.stdout).split())[-200:]
        return row | {"value": None, "status": "crash", "note": f"ncu: {note}"}
    return row | {"value": total_bytes(done.stdout), "note": "ncu, caches emptied before each kernel"}


def total_bytes(text: str) -> float:
    """The sum over all kernels of ncu's table, whose second line has the units."""
    lines = [line for line in text.splitlines() if line.startswith('"')]
    rows = list(csv.DictReader(io.StringIO("\n".join(lines))))
    if len(rows) < 2:
        raise UserError("ncu: expected a table with a line for each kernel, found none")
    units = rows[0]
    return sum(float(row[name].replace(",", "")) * UNITS[units[name]] for row in rows[1:] for name in COUNTERS)


def profiled(suite_name: str, inputs: str, outputs: str, implementation: str) -> None:
    """What ncu runs: the point once to warm up, and once between the marks."""
    suite = read_kernel_suite(suite_name)
    bench = traffic_bench(suite, (int(inputs), int(outputs)))
    [point] = [one for one in bench.points(suite.traffic.tokens) if one.implementation == implementation]
    setting = Setting(torch.device(suite.device), getattr(torch, suite.dtype), suite.seed)
    subject = Builder(bench, setting).build(point)
    for _ in range(2):
        subject.both()
    torch.cuda.synchronize()
    torch.cuda.cudart().cudaProfilerStart()
    subject.both()
    torch.cuda.synchronize()
    torch.cuda.cudart().cudaProfilerStop()


if __name__ == "__main__":
    profiled(*sys.argv[1:])
