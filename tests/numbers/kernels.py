"""What docs/results/kernels.md quotes of nvidia-h200/kernels.parquet
and kernels_compiled.parquet, and of the published traffic."""

from __future__ import annotations

from functools import cache

import pandas as pd

from lorafusion.lab.report.figures.kernels import PUBLISHED_TRAFFIC
from tests.numbers.quoted import number, percent
from tests.numbers.sources import H200, table

ARMS = (("fused", 1), ("fused-multi", 4), ("fused-multi", 16), ("peft-bf16", 1), ("peft", 1))
WIDE = [(4096, 4096), (5120, 5120), (8192, 8192), (4096, 14336), (14336, 4096), (5120, 27648), (27648, 5120),
        (8192, 28672), (28672, 8192)]  # fmt: skip
NARROW = [(4096, 1024), (5120, 1024), (8192, 1024)]
LAYERS = {"Llama-3.1-8B": "llama-3.1-8b", "Qwen2.5-32B": "qwen2.5-32b", "Llama-3.1-70B": "llama-3.1-70b"}
COUNT = {1: "one", 3: "three"}


@cache
def rows(name: str = "kernels", statistic: str = "median", metric: str = "overhead") -> pd.DataFrame:
    """Numbers of the forward and backward pass together, or of what has no pass."""
    found = table(f"{H200}/{name}")
    found = found[(found["statistic"] == statistic) & (found["metric"] == metric)]
    found = found[found["pass"].isna() | (found["pass"] == "both")]
    return found.set_index(["cell", "repeat"]).sort_index()


def cell(subject: str, implementation: str, adapters: int, tokens=8192, rank=16, dropout=0.1) -> str:
    point = f"rank~{rank}/dropout~{dropout:g}/tokens~{tokens}"
    return f"{subject}/{point}/implementation~{implementation}/adapters~{adapters}"


def linear(shape: tuple[int, int]) -> str:
    return f"linear~{shape[0]}x{shape[1]}"


def median(subject: str, implementation: str, adapters: int, metric="overhead", name="kernels", **point) -> pd.Series:
    (found,) = rows(name, "median", metric).loc[cell(subject, implementation, adapters, **point)].to_dict("records")
    return pd.Series(found)


def over(subject: str, implementation: str, adapters: int, **point) -> float:
    """Time over that of the frozen linear or layer."""
    return 1 + median(subject, implementation, adapters, **point)["value"]


def singles(subject: str, implementation: str, adapters: int, metric="overhead") -> list[float]:
    return list(rows("kernels", "single", metric).loc[cell(subject, implementation, adapters)]["value"])


def line(text: str, subject: str, last: str = "", exact: bool = True) -> str:
    """A row of a table: each arm's time over the frozen one's. exact: with three decimals for the first two arms."""
    forms = (".3f", ".3f", ".2f", ".2f", ".2f") if exact else (".2f",) * 5
    columns = [number(over(subject, *arm), form) for arm, form in zip(ARMS, forms, strict=True)]
    return f"| {text} | {' | '.join(columns)} |{last}"


def passages() -> list[str]:
    return [*summary(), *linears(), *few_tokens(), *ranks(), *layers(), *saved(), *traffic()]


def summary() -> list[str]:
    more = {arm: [100 * (over(linear(shape), arm, 1) - 1) for shape in WIDE] for arm in ("fused", "peft-bf16")}
    ours, peft = (f"{number(min(values), '.0f')} to {percent(max(values) / 100)}" for values in more.values())
    return [
        f"A fused LoRA linear costs {ours} more time than the frozen linear alone where the output is wide. PEFT in "
        f"bf16 costs {peft} more",
    ]


def linears() -> list[str]:
    """The rows of the table of linears."""
    lines = []
    for shape in WIDE:
        count = COUNT[int(median(linear(shape), "fused", 1)["n"])]
        lines.append(line(f"{shape[0]} → {shape[1]}", linear(shape), f" {count} |"))
    return [*lines, *(line(f"{shape[0]} → {shape[1]}", linear(shape), " one |", exact=False) for shape in NARROW)]


def few_tokens() -> list[str]:
    square, few = linear((4096, 4096)), {"tokens": 2304}
    each = [1 + value for value in singles(square, "fused", 1)]
    frozen = [1e6 * value for value in singles(square, "frozen", 0, "time")]
    more = {shape: over(linear(shape), "fused-multi", 4) / over(linear(shape), "fused", 1) - 1
            for shape in WIDE + NARROW}  # fmt: skip
    wide, narrow = ([more[shape] for shape in shapes] for shapes in (WIDE, NARROW))
    assert max(narrow) == more[8192, 1024]
    return [
        f"gave {', '.join(number(value, '.3f') for value in each)}. The frozen linear took "
        f"{', '.join(number(value, '.0f') for value in frozen)} µs",
        f"Four adapters take {number(100 * min(wide), '.1f')} to {percent(max(wide), '.1f')} more time than one where "
        f"the output is wide, and up to {percent(max(narrow), '.1f')} more (8192 → 1024) where it is narrow",
        f"| fused, one adapter | {number(over(square, 'fused', 1, **few), '.2f')} |",
        f"| fused, 16 adapters | {number(over(square, 'fused-multi', 16, **few), '.2f')} |",
        f"| PEFT bf16, one adapter | {number(over(square, 'peft-bf16', 1, **few), '.2f')} |",
    ]


def ranks() -> list[str]:
    square, lines = linear((4096, 4096)), []
    settings = [(f"rank {rank}", {"rank": rank}) for rank in (8, 32, 64, 128)]
    for text, point in [*settings, ("rank 16, no dropout", {"dropout": 0.0})]:
        columns = [number(over(square, *arm, **point), ".2f") for arm in ARMS[:4]]
        lines.append(f"| {text} | {' | '.join(columns)} |")
    large = linear((8192, 8192))
    compiled = {shape: [1 + median(linear((shape, shape)), arm, 1, name="kernels_compiled")["value"]
                        for arm in ("peft-bf16", "peft-compiled")] for shape in (4096, 8192)}  # fmt: skip
    return [
        *lines,
        f"8192 → 8192 takes {number(over(large, 'fused', 1, dropout=0.0), '.2f')} without dropout and "
        f"{number(over(large, 'fused', 1), '.2f')} with it",
        *(f"| {shape} → {shape} | {number(times[0], '.2f')} | {number(times[1], '.2f')} |"
          for shape, times in compiled.items()),
    ]  # fmt: skip


def layers() -> list[str]:
    """The rows of the table of decoder layers."""
    return [line(name, f"layer~{model}") for name, model in LAYERS.items()]


def saved() -> list[str]:
    subjects = [f"layer~{model}" for model in LAYERS.values()]
    few = [over(subject, "fused", 1, tokens=2048) for subject in subjects]
    kept = {arm: [median(subject, arm, 1, "saved_memory")["value"] for subject in subjects]
            for arm in ("fused", "peft-bf16")}  # fmt: skip
    shares = {f"{ours / theirs:.2f}" for ours, theirs in zip(kept["fused"], kept["peft-bf16"], strict=True)}
    (share,) = shares  # the same in all three
    spread = [1 + value for value in singles("layer~qwen2.5-32b", "fused", 1)]
    return [
        f"Processes differ most in Qwen2.5-32B: one adapter took {number(min(spread), '.3f')} to "
        f"{number(max(spread), '.3f')}",
        f"With 2048 tokens one adapter takes {number(few[0], '.2f')}, {number(few[1], '.2f')} and "
        f"{number(few[2], '.2f')}",
        f"A fused layer saves {number(float(share), '.2f')} of PEFT's bytes for the backward pass",
    ]


def traffic() -> list[str]:
    published = pd.read_csv(PUBLISHED_TRAFFIC).set_index(["implementation", "in_features"])["gib_fwd_bwd"]
    sizes = (4096, 5120, 8192)

    def gib(*arm) -> str:
        values = [median(f"traffic~{size}x{size}", *arm, "dram_traffic")["value"] / 2**30 for size in sizes]
        return " | ".join(number(value, ".2f") for value in values)

    return [
        f"| frozen | {gib('frozen', 0)} |",
        f"| fused, one adapter | {gib('fused', 1)} |",
        f"| fused, four adapters | {gib('fused-multi', 4)} |",
        f"| published | {' | '.join(number(published['fused-lora', size], '.2f') for size in sizes)} |",
        f"| PEFT bf16 | {gib('peft-bf16', 1)} |",
    ]
