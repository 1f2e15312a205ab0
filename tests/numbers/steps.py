"""What docs/results/steps.md quotes of nvidia-h200/steps.parquet and of the profile beside it."""

from __future__ import annotations

from tests.numbers.quoted import number, percent
from tests.numbers.sources import H200, drawn, table

WHOLE, STAGE, RECOMPUTED = "llama-3.1-8b", "llama-3.1-70b-stage", "qwen2.5-32b"
OURS, PEFT = "fused-multi", "peft-bf16"


def median(bench: str, implementation: str, metric: str) -> float:
    rows = table(f"{H200}/steps")
    rows = rows[(rows["statistic"] == "median") & (rows["bench"] == bench) & (rows["metric"] == metric)]
    (value,) = rows[rows["implementation"] == implementation]["value"]
    return float(value)


def row(text: str, bench: str, implementation: str, profiled: bool = True) -> str:
    """A line of the table of speeds: over the frozen base, over PEFT, memory over PEFT, and how busy the GPU is."""
    over_frozen = 1 / (1 + median(bench, implementation, "overhead"))
    memory = median(bench, implementation, "peak_memory") / median(bench, PEFT, "peak_memory")
    busy = percent(median(bench, implementation, "busy"), ".1f") if profiled else "not profiled"
    return (
        f"| {text} | {number(over_frozen, '.3f')} | "
        f"{number(median(bench, implementation, 'speedup'), '.2f')} | {number(memory, '.2f')} | {busy} |"
    )


def profile(name: str) -> float:
    """Milliseconds of a class of kernels in a microbatch of the 8B model with four adapters."""
    rows = drawn(f"{H200}/steps_profile")
    rows = rows[(rows["bench"] == WHOLE) & (rows["implementation"] == OURS) & (rows["class"] == name)]
    return float(rows["milliseconds"].iloc[0])


def passages() -> list[str]:
    idle = 1 - median(WHOLE, OURS, "busy")
    return [
        row("Llama-3.1-8B, all layers, four adapters", WHOLE, OURS),
        row("the same, one adapter", WHOLE, "fused"),
        row("a middle stage of four of Llama-3.1-70B", STAGE, OURS),
        row("Qwen2.5-32B, all layers, every layer computed again", RECOMPUTED, OURS, profiled=False),
        f"runs {number(median(WHOLE, OURS, 'speedup'), '.2f')} times as fast as PEFT in bf16, with "
        f"{number(median(WHOLE, OURS, 'peak_memory') / median(WHOLE, PEFT, 'peak_memory'), '.2f')} of its memory",
        f"GPU is idle {percent(idle, '.1f')} of the time",
        f"remain {number(profile('LoRA'), '.0f')} ms of LoRA passes and {number(profile('optimizer'), '.0f')} ms of "
        f"optimizer",
    ]
