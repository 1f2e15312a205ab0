"""Where the host's time of a fused linear goes, on a GPU: `python -m tests.gpu.host_split`. It takes 20 seconds.

A line for each part, in microseconds, the least of several rounds: a frozen linear and PEFT's beside it, the fused
one's passes with all that is below them, and the steps of its plans. Rank and tokens can be given: 16 512.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from itertools import chain

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.autograd import grad

from fused_lora import LoRABatch, LoRALinear, LoRASettings, ops
from fused_lora.gpu.host import calls, replay
from fused_lora.linear import factors_of, operator_arguments, tables_and_settings
from fused_lora.modules import LoRAAdapter

GPU, DTYPE, COLUMNS = torch.device("cuda"), torch.bfloat16, 4096
CALLS, ROUNDS = 20, 15  # as many launches as the driver's queue holds


def microseconds(function: Callable[[], object]) -> float:
    best = float("inf")
    for _ in range(ROUNDS):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(CALLS):
            function()
        best = min(best, (time.perf_counter() - start) / CALLS)
    return 1e6 * best


class Linears:
    """One frozen linear, and the same with an adapter of PEFT's and of ours."""

    def __init__(self, rank: int, tokens: int) -> None:
        self.frozen = nn.Linear(COLUMNS, COLUMNS, bias=False, dtype=DTYPE, device=GPU).requires_grad_(False)
        self.fused = LoRALinear(self.frozen, [LoRASettings(rank, 16, 0.1)])
        model = nn.Sequential()
        model.add_module("q_proj", self.frozen)
        config = LoraConfig(r=rank, lora_dropout=0.1, target_modules=["q_proj"])
        self.peft = get_peft_model(model, config, autocast_adapter_dtype=False).base_model.model.q_proj
        self.batch = LoRABatch.single(tokens, torch.arange(tokens, device=GPU))
        self.x = torch.randn(tokens, COLUMNS, device=GPU, dtype=DTYPE, requires_grad=True)
        self.dy = torch.randn(tokens, COLUMNS, device=GPU, dtype=DTYPE)

    def trained(self, module: nn.Module, *arguments: LoRABatch) -> Callable[[], object]:
        leaves = [self.x, *(parameter for parameter in module.parameters() if parameter.requires_grad)]
        return lambda: grad(module(self.x, *arguments), leaves, self.dy)

    def whole(self) -> dict[str, Callable[[], object]]:
        return {
            "frozen": self.trained(self.frozen),
            "PEFT": self.trained(self.peft),
            "fused": self.trained(self.fused, self.batch),
            "fused, forward": lambda: self.fused(self.x, self.batch),
        }


def layers(linears: Linears) -> dict[str, Callable[[], object]]:
    """What is below a module: the operator with autograd, and the host code of both passes without it."""
    module, batch, x, dy = linears.fused, linears.batch, linears.x, linears.dy
    row = [LoRAAdapter(module.lora_a[0], module.lora_b[0], 1.0, 0.1)]
    table = module._tables.of([row], x)
    factors, (tables, settings) = factors_of([row]), tables_and_settings(batch, table, True)
    weights, biases, leaves = [module.base.weight], [x.new_empty(0)], [x, *chain(*factors)]
    with torch.no_grad():
        operands, _ = operator_arguments([row], batch, table, True)
    run_forward, run_backward = (ops.KERNELS[operator, "cuda"] for operator in (ops.linear, ops.linear_backward))
    inputs = [x.detach()]
    _, s, bits = run_forward(operands, settings, inputs, weights, biases, True)
    arguments = (factors, tables, settings, [x], weights, biases, True)
    return {
        "operator, forward": lambda: ops.run_linear(*arguments),
        "operator": lambda: grad(ops.run_linear(*arguments)[0], leaves, dy),
        "host code, forward": lambda: run_forward(operands, settings, inputs, weights, biases, True),
        "host code, backward": lambda: run_backward(operands, settings, [dy], inputs, weights, s, bits, [True, True]),
    }


def steps(plan: replay.Plan, run: Callable[[], object]) -> dict[str, float]:
    """Microseconds of each of a plan's steps, of calls that run it."""
    spent: dict[str, list[float]] = {}

    def timed(name: str, step: Callable) -> Callable:
        times = spent.setdefault(name, [])

        def run_step(*arguments) -> None:
            start = time.perf_counter()
            step(*arguments)
            times.append(time.perf_counter() - start)

        return run_step

    original = plan._steps
    plan._steps = [timed(f"{place} {_name(step)}", step) for place, step in enumerate(original)]
    microseconds(run)
    plan._steps = original
    return {name: 1e6 * sorted(times)[len(times) // 4] for name, times in spent.items()}


def _name(step: Callable) -> str:
    launch = getattr(step, "__self__", None)
    return launch._compiled.name if launch else getattr(step, "func", step).__name__


def main() -> None:
    rank, tokens = (int(word) for word in sys.argv[1:3]) if len(sys.argv) > 2 else (16, 512)
    linears = Linears(rank, tokens)
    with calls.launching(remembers=True):
        functions = linears.whole() | layers(linears)
        for name, function in functions.items():
            for _ in range(3):
                function()
            print(f"{name:40} {microseconds(function):8.1f}", flush=True)
        for plan in [plan for plan in calls.launcher().plans.values() if isinstance(plan, replay.Plan)]:
            print(f"a plan's steps, {len(plan._steps)}")
            for name, spent in steps(plan, functions["operator"]).items():
                print(f"  {name:38} {spent:8.1f}")


if __name__ == "__main__":
    main()
