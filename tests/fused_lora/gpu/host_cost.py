"""What a fused linear costs the host beside PEFT's, without a GPU: `python -m tests.fused_lora.gpu.host_cost`.

Forward and backward passes of a linear of few elements, in microseconds of this thread. All of Triton runs; its
launches end in a driver that does nothing (`pretend_cuda`). PEFT's operators compute on the CPU, which for so few
elements is less than their dispatch, and none of their launches is counted: what is shown of PEFT is what its Python
and PyTorch's cost before a GPU is told anything.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import fused_lora
from fused_lora import (
    AdapterTable,
    LoRAAdapter,
    LoRABatch,
    LoRALinear,
    LoRASegment,
    LoRASettings,
    lora_linears,
    ops,
)  # fmt: skip
from fused_lora.gpu.host import choices, launch
from fused_lora.gpu.host.calls import launching
from fused_lora.linear import factors_of, operator_arguments, tables_and_settings
from tests.fused_lora.gpu.pretend_cuda import H200, pretended

TOKENS, COLUMNS, RANK = 64, 128, 16
CALLS, ROUNDS = 100, 15


def seconds(functions: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Of a call of each, the least of several rounds that they take in turns."""
    best = dict.fromkeys(functions, float("inf"))
    for _ in range(ROUNDS):
        for name, function in functions.items():
            function()
            start = time.thread_time()
            for _ in range(CALLS):
                function()
            best[name] = min(best[name], (time.thread_time() - start) / CALLS)
    return best


GROUP = ("q_proj", "k_proj", "v_proj")


class _Model(nn.Module):
    """Linears of one input."""

    def __init__(self, names: tuple[str, ...] = GROUP[:1]) -> None:
        super().__init__()
        for name in names:
            self.add_module(name, nn.Linear(COLUMNS, COLUMNS, bias=False, dtype=torch.bfloat16))

    def forward(self, x: Tensor) -> list[Tensor]:
        return [linear(x) for linear in self.children()]


def _peft(names: tuple[str, ...]) -> nn.Module:
    config = LoraConfig(r=RANK, lora_dropout=0.1, target_modules=list(names))
    return get_peft_model(_Model(names), config, autocast_adapter_dtype=False).base_model.model


def _linear(adapters: int) -> tuple[LoRALinear, LoRABatch]:
    settings = [LoRASettings(RANK, 16, 0.1, seed=index) for index in range(adapters)]
    part = TOKENS // adapters
    segments = [LoRASegment(index * part, index * part + part, index) for index in range(adapters)]
    return LoRALinear(_Model().q_proj, settings), LoRABatch.of(segments, torch.arange(TOKENS))


def _trained(model: _Model) -> Callable[[], object]:
    x = torch.randn(TOKENS, COLUMNS, dtype=torch.bfloat16, requires_grad=True)
    dys = [torch.randn_like(x) for _ in model.children()]
    return lambda: torch.autograd.backward(model(x), dys)


def _levels(adapters: int) -> dict[str, Callable[[], object]]:
    """The layers of a fused linear, each with all that is below it."""
    linear, batch = _linear(adapters)
    x = torch.randn(TOKENS, COLUMNS, dtype=torch.bfloat16, requires_grad=True)
    dy, weight = torch.randn_like(x), linear.base.weight
    factors = [list(linear.lora_a), list(linear.lora_b)]
    row = [LoRAAdapter(a, b, 1.0, 0.1, index) for index, (a, b) in enumerate(zip(*factors, strict=True))]
    table = AdapterTable.of([row], x.device)
    tables, settings = tables_and_settings(batch, table, True)
    operands, _ = operator_arguments([row], batch, table, True)
    arguments = ([x.detach()], [weight], [x.new_empty(0)])

    def operator() -> None:
        ops.run_linear(factors_of([row]), tables, settings, [x], *arguments[1:], True)[0].backward(dy)

    def host() -> None:
        with torch.no_grad():
            _, s, bits = launch.forward(operands, settings, *arguments, True)
            launch.backward(operands, settings, [dy], *arguments[:2], s, bits, [True, True])

    return {
        "module": lambda: linear(x, batch).backward(dy),
        "lora_linears": lambda: lora_linears(x, [weight], [None], [row], batch, True, table)[0].backward(dy),
        "operator": operator,
        "host code": host,
    }


def _own_gemm(kernel: str, shape: choices.Shape, gpu: choices.Target) -> dict:
    """The library's multiplies, on a CPU."""
    return choices.own_gemm() if kernel in choices.GEMMS else choices.choose(kernel, shape, gpu)


def main() -> None:
    functions = {}
    for names in (GROUP[:1], GROUP):
        patched = _peft(names)
        fused_lora.patch(patched)
        for name, model in (("frozen", _Model(names)), ("PEFT", _peft(names)), ("patched", patched)):
            functions[f"{name}, {len(names)} linears"] = _trained(model)
    functions |= {f"{name}, {adapters} adapters": f for adapters in (1, 4) for name, f in _levels(adapters).items()}
    shared = {"choose": _own_gemm, "target_of": lambda device: H200, "remembers": False}
    ways = {
        "through Triton": shared,
        "no launches": shared | {"run_of": lambda kernel: lambda *arguments, **settings: None},
        "remembered": shared | {"remembers": True},
    }
    columns = {}
    with pretended():
        for way, replacements in ways.items():
            with launching(**replacements):
                columns[way] = seconds(functions)
    print(f"{'microseconds, forward + backward':34}", *(f"{way:>14}" for way in columns))
    for name in functions:
        print(f"{name:34}", *(f"{1e6 * column[name]:14.0f}" for column in columns.values()))


if __name__ == "__main__":
    main()
