"""Run the Triton kernels on the CPU, in Triton's interpreter, for `test_interpreter.py`: a process of its own, as the
interpreter is chosen before Triton is imported.

Reads names of cases, a line each, and answers each with a line of JSON: what is wrong. Errors are root mean squares
against the reference in float64, and must be at most twice those of the reference in the kernels' dtype. That alone
would let a wrong scaling through where the base linear is large, so the error's component along the LoRA term is
bounded, too. Memory that nobody wrote is NaN. bfloat16 cannot be asked for: the interpreter's products of it are wrong.
"""

from __future__ import annotations

import json
import os
import random
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "1"

import torch
import torch.nn.functional as F


@dataclass(frozen=True)
class Case:
    """Sizes and settings of one call; segments are pairs of length and adapter, ranks [P][G]."""

    segments: tuple[tuple[int, int], ...]
    ranks: tuple[tuple[int, ...], ...]
    columns: int = 72
    rows: tuple[int, ...] = (40,)
    dtype: torch.dtype = torch.float32
    dropout: float = 0.3
    bias: bool = False
    one_position: bool = False
    own: dict[str, Any] = field(default_factory=dict)  # settings of our own GEMM, the library's if there are none


OWN = {"rows": 32, "columns": 32, "depth": 16}
MIXED = ((1, 5, 16, 40),)
SEVERAL = ((7, 2), (0, 1), (1, 0), (5, -1), (33, 3), (3, 1))
CASES = {
    "one adapter": Case(((45, 0),), ((16,),)),
    "one adapter, float16": Case(((45, 0),), ((16,),), dtype=torch.float16),
    "one adapter, no dropout, bias": Case(((45, 0),), ((5,),), dropout=0.0, bias=True),
    "one token": Case(((1, 0),), ((16,),), one_position=True),
    "no token of any adapter": Case(((9, -1), (4, -1)), ((4,),), bias=True),
    "odd sizes": Case(((19, 0), (2, 1)), ((5, 3),), columns=37, rows=(21,), bias=True),
    "odd sizes, float16": Case(((19, 0), (2, 1)), ((5, 3),), columns=37, rows=(21,), dtype=torch.float16),
    "mixed ranks and segments": Case(SEVERAL, MIXED),
    "mixed ranks and segments, float16, one position": Case(SEVERAL, MIXED, dtype=torch.float16, one_position=True),
    "an adapter in two segments": Case(((20, 1), (17, 0), (30, 1)), ((16, 5),), dtype=torch.float16),
    "two linears": Case(SEVERAL, ((1, 0, 16, 4), (5, 3, 0, 40)), rows=(40, 24), bias=True),
    "three linears, float16": Case(
        ((23, 1), (40, 0)), ((16, 1), (5, 0), (0, 33)), rows=(40, 24, 8), dtype=torch.float16
    ),
    "three linears, no dropout": Case(((23, 0),), ((16,), (8,), (3,)), rows=(40, 9, 8), dropout=0.0),
    "four linears": Case(((30, 0),), ((4,), (2,), (7,), (1,)), rows=(16, 8, 24, 3), bias=True),
    "rank 256": Case(((9, 0),), ((256,),), columns=33, rows=(17,)),
    "our GEMM": Case(((45, 0),), ((16,),), dtype=torch.float16, own=OWN),
    "our GEMM, mixed ranks and segments, bias": Case(SEVERAL, MIXED, dtype=torch.float16, bias=True, own=OWN),
    "our GEMM, three linears": Case(
        ((23, 1), (40, 0)), ((16, 1), (5, 0), (0, 33)), rows=(40, 24, 8), dtype=torch.float16, own=OWN | {"parts": 2}
    ),
    "our GEMM, two linears, no dropout": Case(
        ((40, 0),), ((20,), (8,)), rows=(40, 24), dtype=torch.float16, dropout=0.0,
        own=OWN | {"parts": 4, "columns": 64, "group": 1},
    ),
    "our GEMM, four linears": Case(
        ((30, 0),), ((4,), (2,), (7,), (1,)), rows=(16, 8, 24, 8), dtype=torch.float16, own=OWN
    ),
}  # fmt: skip


def drawn(seed: int) -> Case:
    """A case by chance."""
    draw = random.Random(seed)
    linears, adapters, own = draw.randint(1, 4), draw.randint(1, 4), draw.random() < 0.4
    segments = tuple(
        (draw.choice((0, 1, 2, 7, 16, 33)), draw.randrange(-1, adapters)) for _ in range(draw.randint(1, 5))
    )
    unit = 8 if own else 1  # what the copy engine takes
    ranks = [[draw.choice((0, 1, 3, 16, 17, 40)) for _ in range(adapters)] for _ in range(linears)]
    ranks[0][0] = ranks[0][0] or 5
    return Case(
        segments=(*segments, (draw.randint(1, 9), 0)),
        ranks=tuple(map(tuple, ranks)),
        columns=unit * draw.randint(1, 100 // unit),
        rows=tuple(unit * draw.randint(1, 60 // unit) for _ in range(linears)),
        dtype=torch.float16 if own else draw.choice((torch.float16, torch.float32)),
        dropout=draw.choice((0.0, 0.1, 0.75)),
        bias=draw.random() < 0.5,
        one_position=draw.random() < 0.5,
        own=OWN | {"parts": draw.choice((1, 2, 4)), "group": draw.choice((1, 8))} if own else {},
    )


def arguments(case: Case, dtype: torch.dtype) -> tuple:
    """What the operators take, the same values in any dtype; and dy of each linear."""
    from fused_lora import AdapterTable, LoRAAdapter, LoRABatch, LoRASegment

    generator = torch.Generator().manual_seed(7)

    def normal(*shape: int, size: float = 1.0) -> torch.Tensor:
        return (torch.randn(*shape, generator=generator) * size).to(case.dtype).to(dtype)

    tokens = sum(length for length, _ in case.segments)
    first, segments = 0, []
    for length, adapter in case.segments:
        segments.append(LoRASegment(first, first + length, adapter))
        first += length
    adapters, start = [], 0.5
    for linear, (ranks, rows) in enumerate(zip(case.ranks, case.rows, strict=True)):
        adapters.append([])
        for place, rank in enumerate(ranks):
            a, b = normal(rank, case.columns, size=case.columns**-0.5), normal(rows, rank)
            made = LoRAAdapter(a, b, start + place, case.dropout, 3 + 5 * linear + (place << 40)) if rank else None
            adapters[-1].append(made)
    table = AdapterTable.of(adapters, torch.device("cpu"))
    positions = torch.tensor([2**32 - 9]) if case.one_position else torch.arange(tokens) * 3 + 2**32 - 9
    batch = LoRABatch.of(segments, positions)
    masked = case.dropout > 0
    present = [one for row in adapters for one in row if one is not None]
    scales = table.factors if masked else table.scalings
    x = normal(tokens, case.columns)
    weights = [normal(rows, case.columns, size=case.columns**-0.5) for rows in case.rows]
    biases = [normal(rows) if case.bias and index != 1 else normal(0) for index, rows in enumerate(case.rows)]
    dys = [normal(tokens, rows) for rows in case.rows]
    common = (
        torch.cat([one.a for one in present]),
        torch.cat([one.b.flatten() for one in present]),
        scales if dtype == torch.float64 else scales.float(),
        table.thresholds,
        table.keys,
        table.rank_offsets,
        batch.offsets,
        batch.adapters,
        batch.positions,
    )
    return x, weights, biases, common, (table.total_ranks, table.max_rank, masked), dys


def run(forward, backward, case: Case, dtype: torch.dtype, keep_bits: bool = True) -> dict[str, Any]:
    """All results of a forward and a backward pass."""
    x, weights, biases, common, settings, dys = arguments(case, dtype)
    ys, s, bits = forward(x, weights, biases, *common, *settings, keep_bits)
    dx, da, db = backward(dys, x, weights, *common, s, bits, *settings, True, True)
    return {"ys": ys, "bits": bits, "dx": dx, "da": da, "db": db}


def parts(case: Case, found: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Every result by name, the factors' gradients by linear, `da0`, and also by adapter, `da0.2`."""
    named = {f"y{linear}": y for linear, y in enumerate(found["ys"])} | {"dx": found["dx"]}
    row = flat = 0
    for linear, (ranks, rows) in enumerate(zip(case.ranks, case.rows, strict=True)):
        named[f"da{linear}"] = found["da"][row : row + sum(ranks)]
        named[f"db{linear}"] = found["db"][flat : flat + sum(ranks) * rows]
        for adapter, rank in enumerate(ranks):
            named[f"da{linear}.{adapter}"] = found["da"][row : row + rank]
            named[f"db{linear}.{adapter}"] = found["db"][flat : flat + rank * rows]
            row, flat = row + rank, flat + rank * rows
    return {name: part.double() for name, part in named.items() if part.numel()}


def base(case: Case) -> dict[str, torch.Tensor]:
    """What the base linears give, exactly; nothing for the factors' gradients."""
    x, weights, biases, _, _, dys = arguments(case, torch.float64)
    pairs = zip(weights, biases, strict=True)
    ys = {f"y{i}": F.linear(x, w, b if b.numel() else None) for i, (w, b) in enumerate(pairs)}
    return ys | {"dx": sum(dy @ weight for dy, weight in zip(dys, weights, strict=True))}


def root_mean_square(tensor: torch.Tensor) -> float:
    return tensor.square().mean().sqrt().item()


def problems(case: Case) -> list[str]:
    """What the kernels compute wrong, as the head of this file says."""
    from fused_lora import ops
    from fused_lora.gpu import choices, launch

    def choose(kernel: str, shape: choices.Shape, target: choices.Target) -> dict[str, Any]:
        own = case.own and kernel in ("output", "input")
        return choices.own_gemm(**case.own) if own else choices.defaults(kernel, shape, target)

    with patch.object(launch, "choose", choose), spied() as launched:
        kernels = run(launch.forward, launch.backward, case, case.dtype)
        again = run(launch.forward, launch.backward, case, case.dtype, keep_bits=False)
    exact, eager = (run(ops.linear, ops.linear_backward, case, dtype) for dtype in (torch.float64, case.dtype))
    wrong = []
    if not torch.equal(kernels["bits"], exact["bits"]):
        wrong.append(f"mask bits: {(kernels['bits'] != exact['bits']).float().mean():.1%} of the words differ")
    if any("gemm" in name for name in launched) != bool(case.own):
        wrong.append(f"launched {sorted(launched)}")
    ours, theirs, again = (parts(case, found) for found in (kernels, eager, again))
    bare, most = base(case), 1e-2 if case.dtype == torch.float16 else 1e-5
    for name, expected in parts(case, exact).items():
        error, allowed = (root_mean_square(one[name] - expected) for one in (ours, theirs))
        # Not by adapter: one token and one rank have too few roundings to compare.
        if "." not in name and not error <= 2 * allowed + 1e-8 * root_mean_square(expected):
            wrong.append(f"{name}: error {error:.3g}, {allowed:.3g} in eager")
        term = expected - bare.get(name, 0.0)
        component = ((ours[name] - expected) * term).sum() / term.square().sum()
        if term.any() and not abs(component) <= most:
            wrong.append(f"{name}: {component:.3g} of the LoRA term too much")
        if not torch.equal(ours[name], again[name]):
            wrong.append(f"{name}: another result with masks drawn again")
    return wrong


@contextmanager
def spied() -> Iterator[set[str]]:
    """The names of the kernels that are launched meanwhile."""
    from triton.runtime.interpreter import InterpretedFunction

    names: set[str] = set()
    original = InterpretedFunction.run

    def run(self, *arguments, **keywords):
        names.add(self.fn.__name__)
        return original(self, *arguments, **keywords)

    with patch.object(InterpretedFunction, "run", run):
        yield names


def main() -> None:
    torch.use_deterministic_algorithms(True)  # fills memory that nobody wrote with NaN
    for line in sys.stdin:
        name = line.strip()
        try:
            found = problems(drawn(int(name)) if name.isdigit() else CASES[name])
        except Exception:
            found = [traceback.format_exc()]
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
