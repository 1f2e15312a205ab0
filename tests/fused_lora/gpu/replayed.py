"""Cases of calls that are recorded and done again, and what is different then: `test_replay.py` runs them.

A process of its own, since Triton's driver is chosen once: `python -m tests.fused_lora.gpu.replayed` reads names of
cases, a line each, and answers each with a list of what is wrong.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fused_lora import AdapterTable, LoRAAdapter, LoRABatch, LoRASegment
from fused_lora.adapters import Operands, Settings
from fused_lora.gpu.host import choices, launch
from fused_lora.gpu.host.calls import launcher, launching
from fused_lora.linear import operator_arguments
from tests.fused_lora.gpu.pretend_cuda import H200, DriverLaunch, pretended


@dataclass(frozen=True)
class Case:
    """A call of linears; `columns` of x and `rows` of each weight."""

    ranks: tuple[int, ...] = (16,)
    rows: tuple[int, ...] = (128,)
    columns: int = 128
    tokens: int = 200
    dropout: float = 0.1
    dtype: torch.dtype = torch.bfloat16
    factors: torch.dtype | None = None  # the adapters', where it is another one
    gemm: str | None = None  # whose, in place of the chosen one
    gated: bool = False
    bias: bool = False
    keep_bits: bool = True
    wanted: tuple[bool, bool] = (True, True)
    follow: bool = False  # positions: the first one alone

    def operands(self, device: torch.device) -> tuple[Operands, Settings]:
        adapters = [
            [LoRAAdapter(self.random(device, rank, self.columns).to(self.factors or self.dtype),
                         self.random(device, rows, rank).to(self.factors or self.dtype), 0.5, self.dropout,
                         7 * linear + index) for index, rank in enumerate(self.ranks)]
            for linear, rows in enumerate(self.rows)
        ]  # fmt: skip
        borders = [index * self.tokens // len(self.ranks) for index in range(len(self.ranks) + 1)]
        segments = [LoRASegment(*borders[index : index + 2], index) for index in range(len(self.ranks))]
        batch = LoRABatch.of(segments, torch.arange(1 if self.follow else self.tokens, device=device))
        return operator_arguments(adapters, batch, AdapterTable.of(adapters, device), True)

    def random(self, device: torch.device, *shape: int) -> Tensor:
        return torch.randn(shape, device=device).to(self.dtype) / 8

    def calls(self, device: torch.device) -> list[Callable[[], Any]]:
        """The forward and the backward pass of the host code."""
        torch.manual_seed(0)
        operands, settings = self.operands(device)
        inputs = [self.random(device, self.tokens, self.columns) for _ in range(1 + self.gated)]
        weights = [self.random(device, rows, self.columns) for rows in self.rows]
        biases = [self.random(device, rows if self.bias else 0) for rows in self.rows]
        dys = [self.random(device, self.tokens, rows) for rows in self.rows]
        _, s, bits = launch.forward(operands, settings, inputs, weights, biases, self.keep_bits)
        return [
            lambda: launch.forward(operands, settings, inputs, weights, biases, self.keep_bits),
            lambda: launch.backward(operands, settings, dys, inputs, weights, s, bits, list(self.wanted)),
        ]

    def choose(self, kernel: str, shape: choices.Shape, gpu: choices.Target) -> dict[str, Any]:
        if kernel in choices.GEMMS and self.gemm:
            return choices.own_gemm() if self.gemm == choices.OWN else {"gemm": choices.LIBRARY}
        return choices.choose(kernel, shape, gpu)


CASES = {
    "four adapters, mixed ranks, q, k and v": Case(ranks=(4, 16, 8, 64), rows=(128, 64, 64)),
    "our GEMM": Case(gemm="own"),
}
MORE_CASES = {
    "an adapter": Case(),
    "our GEMM, four adapters, gate and up": Case(gemm="own", ranks=(16,) * 4, rows=(128, 128)),
    "gated": Case(gated=True, gemm="own"),
    "sixteen adapters": Case(ranks=(16,) * 16, tokens=500),
    "no dropout": Case(dropout=0.0, gemm="own"),
    "bias": Case(bias=True, gemm="own"),
    "bits drawn again": Case(keep_bits=False, gemm="own"),
    "no gradient of the input": Case(wanted=(False, True), gemm="own"),
    "no gradient of the factors": Case(wanted=(True, False), gemm="own"),
    "positions that follow": Case(follow=True),
    "float16": Case(dtype=torch.float16, gemm="own"),
    "float32": Case(dtype=torch.float32),
    "float32 adapters": Case(factors=torch.float32, gemm="own"),
    "float32 adapters, mixed ranks": Case(factors=torch.float32, ranks=(8, 16), rows=(64, 64)),
    "odd sizes": Case(columns=100, rows=(52,), tokens=77),
    "four linears": Case(rows=(64,) * 4),
    "rank 128": Case(ranks=(128,), gemm="own"),
    "rank 128, q, k and v": Case(ranks=(128,), rows=(64,) * 3),
    "library's GEMM, gated": Case(gated=True, gemm="library"),
    "library's GEMM, gate and up, bias": Case(rows=(64, 64), bias=True, gemm="library"),
    "few tokens": Case(tokens=3, columns=256),
    "no tokens": Case(tokens=0),
    "many tokens": Case(tokens=8192, gemm="own"),
}


class Kept(TorchDispatchMode):
    """Keeps all memory that a call allocates, so that an address belongs to a tensor, and tells which."""

    def __enter__(self):
        self.tensors: list[Tensor] = []
        return super().__enter__()

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **(keywords or {}))
        aliases = any(returned.alias_info for returned in function._schema.returns)
        if isinstance(result, Tensor) and result.device.type == "cpu" and not aliases:
            self.tensors.append(result)
        return result

    def named(self, launches: list[DriverLaunch]) -> list[DriverLaunch]:
        """The launches with names in place of the addresses of the tensors that were kept: in the order of use."""
        memory = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in self.tensors}
        order: dict[int, str] = {}

        def name(word: int) -> Any:
            base = next((base for base, size in memory.items() if base <= word < base + size), None)
            return word if base is None else (order.setdefault(base, f"tensor {len(order)}"), word - base)

        return [
            launch._replace(parameters=tuple(tuple(map(name, words)) for words in launch.parameters))
            for launch in launches
        ]


def problems(case: Case, recorded: Callable) -> list[str]:
    """What is different where a call is done again. The two must tell the driver the same."""
    wrong = []
    with launching(choose=case.choose, target_of=lambda device: H200, remembers=False):
        calls = case.calls(torch.device("cpu"))
        expected = [launched(call, recorded) for call in calls]
    with launching(choose=case.choose, target_of=lambda device: H200):
        for index, call in enumerate(calls):
            call()
            for again in range(2):
                actual = launched(call, recorded)
                wrong += [f"pass {index}, time {again}: {text}" for text in differences(expected[index], actual)]
            with ThreadPoolExecutor() as pool:  # autograd's threads are others than the first pass's
                actual = pool.submit(launched, call, recorded).result()
            wrong += [f"pass {index}, in a thread: {text}" for text in differences(expected[index], actual)]
        if any(isinstance(plan, str) for plan in launcher().plans.values()):
            wrong.append(f"not recorded: {list(launcher().plans.values())}")
    return wrong


def launched(call: Callable, recorded: Callable) -> tuple[list[DriverLaunch], list[tuple]]:
    """What a call tells the driver, and the form of its results."""
    results: list = []
    with Kept() as kept:
        launches = kept.named(recorded(lambda: results.extend(call())))
    tensors = chain(results[0], results[1:])
    return launches, [(tensor.shape, tensor.stride(), tensor.dtype) for tensor in tensors]


def differences(expected: tuple, actual: tuple) -> list[str]:
    wrong = [] if expected[1] == actual[1] else [f"results {expected[1]}, {actual[1]}"]
    names = [[launch.kernel for launch in launches] for launches in (expected[0], actual[0])]
    if names[0] != names[1]:
        return [*wrong, f"kernels {names[0]}, {names[1]}"]
    for first, second in zip(expected[0], actual[0], strict=True):
        if first.settings != second.settings:
            wrong.append(f"{first.kernel}: settings {first.settings}, {second.settings}")
        pairs = enumerate(zip(first.parameters, second.parameters, strict=True))
        wrong += [f"{first.kernel}: parameter {place}: {a}, {b}" for place, (a, b) in pairs if a != b]
    return wrong


if __name__ == "__main__":
    with pretended() as recorded:
        for line in sys.stdin:
            print(json.dumps(problems((CASES | MORE_CASES)[line.strip()], recorded)), flush=True)
