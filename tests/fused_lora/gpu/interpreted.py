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
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

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
    gated: bool = False  # `gated_linear`, of two inputs; has one linear
    splits: int = 1  # of the columns, in the pass for s


NO_NUMBERS = torch.tensor([float("nan"), float("inf"), -float("inf")])
ISOLATION = "isolation in "  # before a case's name: what its adapters have of each other, and nothing else
EMPTY = "empty segments in "  # before a case's name: what differs when there are more segments, without tokens
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
    "an adapter without factors": Case(((20, 1), (17, 0)), ((16, 0),), bias=True),
    "columns in splits": Case(SEVERAL, ((1, 0, 16, 4), (5, 3, 0, 40)), columns=100, rows=(40, 24), splits=3),
    "rank 256": Case(((9, 0),), ((256,),), columns=33, rows=(17,)),
    "gated": Case(((45, 0),), ((16,),), gated=True),
    "gated, odd sizes, bias": Case(((19, 0), (2, 1)), ((5, 3),), columns=37, rows=(21,), bias=True, gated=True),
    "gated, odd sizes, float16": Case(((19, 0), (2, 1)), ((5, 3),), columns=37, dtype=torch.float16, gated=True),
    "gated, mixed ranks and segments, float16": Case(SEVERAL, MIXED, dtype=torch.float16, gated=True),
    "gated, several programs, no dropout": Case(((45, 0),), ((4,),), columns=136, dropout=0.0, gated=True),
    "gated, one token": Case(((1, 0),), ((16,),), one_position=True, gated=True),
}  # fmt: skip


def drawn(seed: int) -> Case:
    """A case by chance."""
    draw = random.Random(seed)
    linears, adapters = draw.randint(1, 4), draw.randint(1, 4)
    segments = tuple(
        (draw.choice((0, 1, 2, 7, 16, 33)), draw.randrange(-1, adapters)) for _ in range(draw.randint(1, 5))
    )
    ranks = [[draw.choice((0, 1, 3, 16, 17, 40)) for _ in range(adapters)] for _ in range(linears)]
    ranks[0][0] = ranks[0][0] or 5
    return Case(
        segments=(*segments, (draw.randint(1, 9), 0)),
        ranks=tuple(map(tuple, ranks)),
        columns=draw.randint(1, 100),
        rows=tuple(draw.randint(1, 60) for _ in range(linears)),
        dtype=draw.choice((torch.float16, torch.float32)),
        dropout=draw.choice((0.0, 0.1, 0.75)),
        bias=draw.random() < 0.5,
        one_position=draw.random() < 0.5,
        splits=draw.randint(1, 3),
    )


def arguments(case: Case, dtype: torch.dtype) -> tuple:
    """What the kernels of the forward operator take, the same values in any dtype; and dy of each linear."""
    from fused_lora import AdapterTable, LoRAAdapter, LoRABatch, LoRASegment
    from fused_lora.linear import operator_arguments

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
    operands, settings = operator_arguments(adapters, batch, table, training=True)
    x = normal(tokens, case.columns)
    weights = [normal(rows, case.columns, size=case.columns**-0.5) for rows in case.rows]
    biases = [normal(rows) if case.bias and index != 1 else normal(0) for index, rows in enumerate(case.rows)]
    dys = [normal(tokens, rows) for rows in case.rows]
    if dtype != torch.float64:
        operands = operands._replace(scales=operands.scales.float())
    inputs = (x, normal(tokens, case.columns)) if case.gated else (x,)
    return operands, settings, inputs, weights, biases, dys


def run(
    forward, backward, case: Case, dtype: torch.dtype, keep_bits: bool = True, spoilt: Iterable[int] = ()
) -> dict[str, Any]:
    """All results of a forward and a backward pass. spoilt: owners of rows that are no numbers."""
    operands, settings, inputs, weights, biases, dys = arguments(case, dtype)
    for tensor in (*inputs, *dys):
        tensor[rows_of(case, spoilt)] = NO_NUMBERS.repeat(tensor.shape[1])[: tensor.shape[1]].to(dtype)
    ys, s, bits = forward(operands, settings, inputs, weights, biases, keep_bits)
    gradients, da, db = backward(operands, settings, dys, inputs, weights, s, bits, [True, True])
    return {"ys": ys, "s": s, "bits": bits, "inputs": gradients, "da": da, "db": db}


def with_empty_segments(case: Case) -> Iterator[str]:
    """What of a case is not the same, bit for bit, with as many segments as its bucket's graph has."""
    from fused_lora.gpu.host.launch import backward, forward

    more = replace(case, segments=case.segments + ((0, -1),) * 5)
    found, expected = (parts(case, run(forward, backward, one, case.dtype)) for one in (more, case))
    yield from (name for name, value in found.items() if not torch.equal(value, expected[name]))


def rows_of(case: Case, owners: Iterable[int]) -> torch.Tensor:
    """Which rows are of these adapters, -1 being none: bool [tokens]."""
    return torch.cat([torch.full((length,), owner in owners) for length, owner in case.segments])


def isolation(case: Case) -> Iterator[str]:
    """What of an adapter changes, if only by a bit, when its neighbours' rows are no numbers: zero times infinity is
    none either, so that other rows must not be multiplied away."""
    from fused_lora.gpu.host.launch import backward, forward

    clean = run(forward, backward, case, case.dtype)
    owners = list(dict.fromkeys(owner for length, owner in case.segments if length))
    for spoilt in (owners[::2], owners[1::2]):
        found = run(forward, backward, case, case.dtype, spoilt=spoilt)
        others = [one for one in owners if one not in spoilt and one >= 0]
        rows, expected = rows_of(case, others), parts(case, clean)
        for name, ours in parts(case, found).items():
            kind, _, adapter = name.partition(".")
            by_row = not kind.startswith(("da", "db"))
            if by_row and not torch.equal(ours[rows], expected[name][rows]):
                yield f"{name}: changed by rows of {spoilt}"
            if adapter and int(adapter) in others and not torch.equal(ours, expected[name]):
                yield f"{name}: changed by rows of {spoilt}"
        if not torch.equal(found["s"][:, rows], clean["s"][:, rows]):
            yield f"s: changed by rows of {spoilt}"


def named_inputs(case: Case, gradients: Iterable[torch.Tensor]) -> dict[str, torch.Tensor]:
    return dict(zip(("dgate", "dup") if case.gated else ("dx",), gradients, strict=True))


def parts(case: Case, found: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Every result by name, the factors' gradients by linear, `da0`, and also by adapter, `da0.2`."""
    named = {f"y{linear}": y for linear, y in enumerate(found["ys"])} | named_inputs(case, found["inputs"])
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
    from fused_lora.reference import gated, gated_backward

    _, _, inputs, weights, biases, dys = arguments(case, torch.float64)
    x = gated(*inputs) if case.gated else inputs[0]
    pairs = zip(weights, biases, strict=True)
    ys = {f"y{i}": F.linear(x, w, b if b.numel() else None) for i, (w, b) in enumerate(pairs)}
    dx = sum(dy @ weight for dy, weight in zip(dys, weights, strict=True))
    return ys | named_inputs(case, gated_backward(*inputs, dx) if case.gated else (dx,))


def root_mean_square(tensor: torch.Tensor) -> float:
    return tensor.square().mean().sqrt().item()


def problems(case: Case) -> list[str]:
    """What the kernels compute wrong, as the head of this file says."""
    from fused_lora import cpu
    from fused_lora.gpu.host import choices, launch
    from fused_lora.gpu.host.calls import launching

    ours, theirs = (launch.forward, launch.backward), (cpu.linear, cpu.linear_backward)

    def choose(kernel: str, shape: choices.Shape, target: choices.Target) -> dict[str, Any]:
        split = {"splits": case.splits, "columns": 32} if kernel == "project" and case.splits > 1 else {}
        return choices.defaults(kernel, shape, target) | split

    with launching(choose=choose):
        kernels = run(*ours, case, case.dtype)
        again = run(*ours, case, case.dtype, keep_bits=False)
    exact, eager = (run(*theirs, case, dtype) for dtype in (torch.float64, case.dtype))
    wrong = []
    if not torch.equal(kernels["bits"], exact["bits"]):
        wrong.append(f"mask bits: {(kernels['bits'] != exact['bits']).float().mean():.1%} of the words differ")
    wrong += [*unused_ranks(case, kernels["s"]), *padding(case)]
    ours, theirs, again = (parts(case, found) for found in (kernels, eager, again))
    # A library adds in pieces what the kernels add one after the other: of few elements it may be much closer.
    rounding = torch.finfo(torch.float32).eps / 2 * max(case.columns, *case.rows) ** 0.5
    bare, most = base(case), 1e-2 if case.dtype == torch.float16 else 1e-5
    for name, expected in parts(case, exact).items():
        error, allowed = (root_mean_square(one[name] - expected) for one in (ours, theirs))
        # Not by adapter: one token and one rank have too few roundings to compare.
        if "." not in name and not error <= 2 * max(allowed, rounding * root_mean_square(expected)):
            wrong.append(f"{name}: error {error:.3g}, {allowed:.3g} in eager")
        term = expected - bare.get(name, 0.0)
        component = ((ours[name] - expected) * term).sum() / term.square().sum()
        if term.any() and not abs(component) <= most:
            wrong.append(f"{name}: {component:.3g} of the LoRA term too much")
        if not torch.equal(ours[name], again[name]):
            wrong.append(f"{name}: another result with masks drawn again")
    return wrong


def unused_ranks(case: Case, s: torch.Tensor) -> Iterator[str]:
    """Where s is not zero beyond an adapter's rank, as the GEMM of `sm90.gemms` needs it."""
    for linear, ranks in enumerate(case.ranks):
        first = 0
        for length, adapter in case.segments:
            if adapter >= 0 and s[linear, first : first + length, ranks[adapter] :].any():  # NaN is not zero
                yield f"s of linear {linear}, adapter {adapter}: not zero beyond rank {ranks[adapter]}"
            first += length


def padding(case: Case) -> Iterator[str]:
    """What is wrong with the factors as the GEMM of `sm90.gemms` takes them."""
    from fused_lora.gpu.host.calls import Call

    operands, settings, inputs, weights, _, _ = arguments(case, case.dtype)
    call, a, flat = Call(operands, settings, inputs[0], weights), operands.a, operands.b
    found_a = [call.padded_a(group) for group in call.groups()]
    wanted_a = []
    for linear, (ranks, rows) in enumerate(zip(case.ranks, case.rows, strict=True)):
        wanted_b = []
        for rank in ranks:
            own, a = a.split([rank, len(a) - rank])
            wanted_a.append(F.pad(own, (0, 0, 0, call.width - rank)))
            own, flat = flat.split([rank * rows, len(flat) - rank * rows])
            wanted_b.append(F.pad(own.view(rows, rank), (0, call.width - rank)))
        b = call.padded_b(linear)
        if not torch.equal(b, torch.cat(wanted_b)) or b.data_ptr() % 16:
            yield f"padded b of linear {linear}"
    if not torch.equal(torch.cat(found_a), torch.cat(wanted_a)):
        yield "padded a"


ASKED = {ISOLATION: isolation, EMPTY: with_empty_segments}


def main() -> None:
    torch.use_deterministic_algorithms(True)  # fills memory that nobody wrote with NaN
    for line in sys.stdin:
        name = line.strip()
        try:
            asked = next((ask for words, ask in ASKED.items() if name.startswith(words)), problems)
            case = drawn(int(name)) if name.isdigit() else CASES[name.removeprefix(ISOLATION).removeprefix(EMPTY)]
            found = list(asked(case))
        except Exception:
            found = [traceback.format_exc()]
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
