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
from torch import nn
from torch.autograd import grad

from fused_lora import LoRABatch, ops
from fused_lora.gpu.host import calls, replay
from fused_lora.linear import factors_of, operator_arguments, tables_and_settings
from fused_lora.modules import LoRAAdapter
from tests.gpu.linear_cost import DTYPE, GPU, Point, ways

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


def linears(point: Point) -> dict[str, Callable[[], object]]:
    """Forward and backward passes of whole modules; the last is the fused one's forward pass."""
    x = torch.randn(point.tokens, point.columns, device=GPU, dtype=DTYPE, requires_grad=True)
    dy = torch.randn(point.tokens, point.rows, device=GPU, dtype=DTYPE)
    passes: dict[str, Callable[[], object]] = {}
    for name, (module, function, _) in ways(point).items():
        leaves = [x, *(parameter for parameter in module.parameters() if parameter.requires_grad)]
        passes[name] = lambda function=function, leaves=leaves: grad(function(x), leaves, dy)
    return passes | {"fused, forward": lambda: function(x)}


def layers(point: Point) -> dict[str, Callable[[], object]]:
    """What is below a module: the operator with autograd, and the host code of both passes without it."""
    module: nn.Module = ways(point)["fused"][0]
    x = torch.randn(point.tokens, point.columns, device=GPU, dtype=DTYPE, requires_grad=True)
    dy = torch.randn(point.tokens, point.rows, device=GPU, dtype=DTYPE)
    batch = LoRABatch.single(point.tokens, torch.arange(point.tokens, device=GPU))
    row = [LoRAAdapter(module.lora_a[0], module.lora_b[0], 1.0, point.dropout)]
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
    point = Point(4096, 4096, tokens, rank)
    with calls.launching(remembers=True):
        functions = linears(point) | layers(point)
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
