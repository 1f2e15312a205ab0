"""Compile every kernel ahead of time, without a GPU, and say what it takes: `python -m fused_lora.tools.build`.

What is compiled is what would be launched: the host code of `gpu.host` runs on tensors without storage, its launches
are caught, and each distinct one is compiled for the targets. Checked: nothing spills, shared memory and registers stay
within the GPU's limits, no arithmetic in float64 (a scalar that was promoted by mistake), and that what is written in
Gluon for sm_90 uses wgmma and the copy engine. A kernel that fails a check makes the command fail, after the table is
written.
"""

import argparse
import csv
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as GluonDescriptor
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from fused_lora.adapters import Operands, Settings
from fused_lora.gpu.host import choices, launch
from fused_lora.gpu.host.calls import launching
from fused_lora.gpu.portable import gating, masks, passes, products
from fused_lora.gpu.sm90 import gemms, projection

SHARED_LIMIT = {80: 166_912, 90: 232_448, 100: 232_448}  # bytes a block may have
REGISTER_FILE = 65_536  # registers of a multiprocessor
TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.int32: "i32", torch.int64: "i64"}
MODULES = (gating, gemms, projection, masks, passes, products)  # that kernels are in
GLUON_KERNELS = ("output_gemm_kernel", "input_gemm_kernel", "mask_and_project_kernel")


@dataclass(frozen=True)
class Case:
    """A call of the LoRA linear whose launches are compiled."""

    name: str
    linears: int = 1
    adapters: int = 1
    rank: int = 16
    masked: bool = True
    dtype: torch.dtype = torch.bfloat16
    gated: bool = False  # of h, computed from gate and up
    tokens: int = 8192
    gemm: dict[str, Any] = field(default_factory=lambda: {"gemm": choices.LIBRARY})


CASES = (
    Case("one adapter"),
    Case("one adapter, no dropout", masked=False),
    Case("few tokens", tokens=512),
    Case("gate and up, four adapters, rank 32", linears=2, adapters=4, rank=32),
    Case("four adapters", adapters=4),
    Case("sixteen adapters", adapters=16),
    Case("q, k and v", linears=3),
    Case("gate and up, four adapters", linears=2, adapters=4),
    Case("rank 64", rank=64),
    Case("rank 128", rank=128),
    Case("rank 256, q, k and v", rank=256, linears=3),
    Case("float16", dtype=torch.float16),
    Case("float32", dtype=torch.float32),
    Case("gated", gated=True),
    Case("gated, float16", gated=True, dtype=torch.float16),
    Case("gated, float32", gated=True, dtype=torch.float32),
    Case("own GEMM", gemm=choices.own_gemm()),
    Case("own GEMM, no dropout", gemm=choices.own_gemm(), masked=False),
    Case("own GEMM, no dropout, gate and up", gemm=choices.own_gemm(), masked=False, linears=2),
    Case("own GEMM, no dropout, four adapters", gemm=choices.own_gemm(), masked=False, adapters=4),
    Case("own GEMM, four slices", gemm=choices.own_gemm(slices=4, stores=2)),
    Case("own GEMM, rank 8, two adapters", gemm=choices.own_gemm(), rank=8, adapters=2),
    Case("own GEMM, four adapters", gemm=choices.own_gemm(), adapters=4),
    Case("own GEMM, gate and up", gemm=choices.own_gemm(), linears=2),
    Case("own GEMM, q, k and v, four adapters", gemm=choices.own_gemm(), linears=3, adapters=4),
    Case("own GEMM, rank 128", gemm=choices.own_gemm(), rank=128),
    Case("own GEMM, rank 128, gate and up", gemm=choices.own_gemm(slices=4, stores=2), rank=128, linears=2),
    Case("own GEMM, rank 128, q, k and v", gemm=choices.own_gemm(), rank=128, linears=3),
)


@dataclass(frozen=True)
class Launch:
    """A kernel as it would be launched: what decides about the machine code."""

    kernel: str
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    divisible: tuple[str, ...]
    options: tuple[tuple[str, int | bool], ...]


def main() -> None:
    parser = argparse.ArgumentParser(prog="fused_lora.tools.build", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="CSV file to write")
    parser.add_argument("--targets", type=int, nargs="+", default=sorted(SHARED_LIMIT), help="80, 90, 100")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    arguments = parser.parse_args()
    unknown = set(arguments.targets) - set(SHARED_LIMIT)
    if unknown:
        sys.exit(f"error: --targets: expected some of {sorted(SHARED_LIMIT)}, found {min(unknown)}")
    rows = build(arguments.targets, arguments.jobs)
    failed = [row for row in rows if row["problem"]]
    for row in failed:
        print(f"error: {row['kernel']} for sm_{row['target']} ({row['case']}): {row['problem']}", file=sys.stderr)
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        with arguments.out.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0], lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    print(f"{len(rows)} builds of {len({row['kernel'] for row in rows})} kernels, {len(failed)} with a problem")
    sys.exit(bool(failed))


def build(targets: list[int], jobs: int | None = None, cases: tuple[Case, ...] = CASES) -> list[dict[str, Any]]:
    """A row for each distinct launch and target: resources, instructions and what is wrong, if anything."""
    tasks = [
        (target, case, launched)
        for target in targets
        for case, fresh in distinct(tuple(case for case in cases if case.gemm["gemm"] in gemms_of(target)), target)
        for launched in fresh
    ]
    with ProcessPoolExecutor(jobs) as pool:
        return list(pool.map(_compile, *zip(*tasks, strict=True)))


def gemms_of(target: int) -> set[str]:
    """Whose GEMMs are launched on a target."""
    ours = divmod(target, 10) == choices.OWN_CAPABILITY
    return {choices.LIBRARY, choices.OWN} if ours else {choices.LIBRARY}


def distinct(cases: tuple[Case, ...], target: int) -> Iterator[tuple[str, list[Launch]]]:
    """Each case's launches, without those of the cases before it."""
    seen: set[Launch] = set()
    for case in cases:
        fresh = [launched for launched in dict.fromkeys(launches(case, target)) if launched not in seen]
        seen.update(fresh)
        yield case.name, fresh


def launches(case: Case, target: int) -> list[Launch]:
    """What the host code launches for a case, caught before it reaches a GPU."""
    caught: list[Launch] = []

    def catch(kernel: JITFunction) -> Callable[..., None]:
        return lambda *arguments, **keywords: caught.append(_describe(kernel, arguments, keywords))

    def choose(kernel: str, shape: choices.Shape, gpu: choices.Target) -> dict[str, Any]:
        return case.gemm if kernel in choices.GEMMS else choices.defaults(kernel, shape, gpu)

    gpu = choices.Target("none", divmod(target, 10), 132)
    with launching(run_of=catch, choose=choose, target_of=lambda device: gpu):
        _call(case)
    return caught


def _call(case: Case, columns: int = 4096, rows: int = 4096) -> None:
    """Forward and backward on tensors that have no storage; backward as if no mask bits had been kept."""
    total = case.linears * case.adapters * case.rank

    def empty(*shape: int, dtype: torch.dtype = case.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    operands = Operands(
        a=empty(total, columns),
        b=empty(total * rows),
        scales=empty(case.linears, case.adapters, dtype=torch.float32),
        thresholds=empty(case.linears, case.adapters, dtype=torch.int32),
        keys=empty(case.linears, case.adapters, dtype=torch.int64),
        rank_offsets=empty(case.linears, case.adapters + 1, dtype=torch.int32),
        offsets=empty(case.adapters + 1, dtype=torch.int32),
        adapters=empty(case.adapters, dtype=torch.int32),
        positions=empty(case.tokens, dtype=torch.int64),
    )
    settings = Settings([case.adapters * case.rank] * case.linears, case.rank, case.masked)
    inputs = [empty(case.tokens, columns)] * (2 if case.gated else 1)
    weights, biases = [empty(rows, columns)] * case.linears, [empty(rows)] + [empty(0)] * (case.linears - 1)
    ys, s, bits = launch.forward(operands, settings, inputs, weights, biases, True)
    launch.backward(operands, settings, ys, inputs, weights, s, bits[:0], [True, True])


def _describe(kernel: JITFunction, arguments: tuple, keywords: dict[str, Any]) -> Launch:
    """Types, constants and divisibility as Triton's own launcher would find them."""
    named = dict(zip(kernel.arg_names, arguments, strict=False)) | keywords
    signature, constants, divisible = {}, {}, []
    for parameter in kernel.params:
        name, value = parameter.name, named[parameter.name]
        if parameter.is_constexpr or (isinstance(value, int) and value == 1 and not parameter.do_not_specialize):
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, TensorDescriptor):
            signature[name] = f"tensordesc<{TYPES[value.base.dtype]}{list(value.block_shape)}>"
        elif isinstance(value, GluonDescriptor):
            signature[name] = f"tensordesc<{TYPES[value.base.dtype]}{list(value.block_shape)},{value.layout!r}>"
        elif isinstance(value, torch.Tensor):
            signature[name] = f"*{TYPES[value.dtype]}"
            divisible.append(name)
        else:
            signature[name] = "i32"
            if value % 16 == 0 and not parameter.do_not_specialize:
                divisible.append(name)
    options = {
        name: keywords[name] for name in ("num_warps", "num_stages", "maxnreg", "launch_pdl") if name in keywords
    }
    return Launch(
        kernel.fn.__name__, *(tuple(part.items()) for part in (signature, constants)), tuple(divisible),
        tuple(options.items()),
    )  # fmt: skip


def _compile(target: int, case: str, launched: Launch) -> dict[str, Any]:
    """Compile a launch, and look at what came out."""
    kernel = next(getattr(module, launched.kernel) for module in MODULES if hasattr(module, launched.kernel))
    row = {"kernel": launched.kernel, "case": case, "target": target, "triton": triton.__version__}
    row |= {"constants": " ".join(f"{name}={value}" for name, value in launched.constants)}
    row |= {"num_warps": 4, "num_stages": None, "maxnreg": None, "launch_pdl": False} | dict(launched.options)
    attributes = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in launched.divisible}
    language = GluonASTSource if kernel.is_gluon() else ASTSource
    source = language(kernel, dict(launched.signature), dict(launched.constants), attributes)
    measured = dict.fromkeys(
        ("registers", "spill_bytes", "shared_bytes", "instructions", "wgmma", "bulk_loads", "float64")
    )
    try:
        compiled = triton.compile(source, target=GPUTarget("cuda", target, 32), options=dict(launched.options))
    except Exception as error:  # a compiler may fail in any way, and the table says so
        return row | measured | {"problem": f"does not compile: {type(error).__name__}: {error}"[:300]}
    measured |= _look(compiled.asm["cubin"]) | {"shared_bytes": compiled.metadata.shared}
    return row | measured | {"problem": _problem(launched.kernel, target, measured, compiled.metadata.num_warps)}


def _look(cubin: bytes) -> dict[str, int]:
    """Resources and instructions of machine code, by the tools that come with Triton."""
    folder = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _run(folder / "cuobjdump", "--dump-resource-usage", file.name)
        sass = _run(folder / "nvdisasm", "--print-code", file.name)
    codes = re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", sass, re.MULTILINE)
    return {
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "spill_bytes": int(re.search(r"STACK:(\d+)", usage)[1]) + int(re.search(r"LOCAL:(\d+)", usage)[1]),
        "instructions": len(codes),
        "wgmma": sum(code.startswith("HGMMA") for code in codes),
        "bulk_loads": sum(code.startswith("UTMALDG") for code in codes),
        "float64": sum(code.split(".")[0] in ("DADD", "DMUL", "DFMA", "DSETP") for code in codes),
    }


def _run(*command: str | Path) -> str:
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, check=True).stdout


def _problem(kernel: str, target: int, measured: dict[str, Any], warps: int) -> str:
    """What is wrong with a build, or nothing."""
    problems = []
    if measured["spill_bytes"]:
        problems.append(f"spills {measured['spill_bytes']} bytes")
    if measured["shared_bytes"] > SHARED_LIMIT[target]:
        problems.append(f"{measured['shared_bytes']} bytes of shared memory, at most {SHARED_LIMIT[target]}")
    if measured["registers"] * warps * 32 > REGISTER_FILE:
        problems.append(f"{measured['registers']} registers in each of {warps * 32} threads")
    if measured["float64"]:
        problems.append(f"{measured['float64']} instructions in float64")
    if kernel in GLUON_KERNELS and not (measured["wgmma"] and measured["bulk_loads"]):
        problems.append(f"{measured['wgmma']} wgmma and {measured['bulk_loads']} bulk loads")
    return "; ".join(problems)


if __name__ == "__main__":
    main()
