"""What docs quote of nvidia-h200/kernels.parquet, of PEFT under torch.compile, and of the published traffic."""

from __future__ import annotations

from functools import cache

import pandas as pd

from lorafusion.lab.report.kernel_data import PUBLISHED_TRAFFIC
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


def line(text: str, subjects: list[str], last: str = "", **point) -> str:
    """A row of a table: each arm's time over the frozen one's, of several subjects with commas between."""
    exact = len(subjects) == 1 and not point
    forms = (".3f", ".3f", ".2f", ".2f", ".2f") if exact else (".2f",) * 5
    columns = [
        ", ".join(number(over(subject, *arm, **point), form) for subject in subjects)
        for arm, form in zip(ARMS, forms, strict=True)
    ]
    return f"| {text} | {' | '.join(columns)} |{last}"


def passages() -> list[str]:
    return [*_linears(), *_ranks(), *_layers(), *_traffic()]


def _linears() -> list[str]:
    lines = []
    for shape in WIDE:
        count = COUNT[int(median(linear(shape), "fused", 1)["n"])]
        lines.append(line(f"{shape[0]} → {shape[1]}", [linear(shape)], f" {count} |"))
    lines.append(line("4096, 5120, 8192 → 1024", list(map(linear, NARROW)), " one |"))
    square = linear((4096, 4096))
    each = [1 + value for value in singles(square, "fused", 1)]
    frozen = [1e6 * value for value in singles(square, "frozen", 0, "time")]
    more = {shape: over(linear(shape), "fused-multi", 4) / over(linear(shape), "fused", 1) - 1
            for shape in WIDE + NARROW}  # fmt: skip
    wide, narrow = ([more[shape] for shape in shapes] for shapes in (WIDE, NARROW))
    assert max(narrow) == more[8192, 1024]
    few = {"tokens": 2304}
    return [
        *lines,
        f"The three processes of 4096 → 4096 gave {', '.join(number(value, '.3f') for value in each)}; the frozen "
        f"linear "
        f"took {', '.join(number(value, '.0f') for value in frozen)} µs in them",
        f"Four adapters take {number(100 * min(wide), '.1f')} to {percent(max(wide), '.1f')} more than one where the "
        f"output "
        f"is wide, and up to {percent(max(narrow), '.1f')} (8192 → 1024) where it is narrow",
        f"with 2304 tokens the linear 4096 → 4096 takes {number(over(square, 'fused', 1, **few), '.2f')}, with 16 "
        f"adapters {number(over(square, 'fused-multi', 16, **few), '.2f')}, more than PEFT with one "
        f"({number(over(square, 'peft-bf16', 1, **few), '.2f')})",
    ]


def _ranks() -> list[str]:
    square, lines = linear((4096, 4096)), []
    settings = [(f"rank {rank}", {"rank": rank}) for rank in (8, 32, 64, 128)]
    for text, point in [*settings, ("rank 16, no dropout", {"dropout": 0.0})]:
        columns = [number(over(square, *arm, **point), ".2f") for arm in ARMS[:4]]
        lines.append(f"| {text} | {' | '.join(columns)} |")
    large = linear((8192, 8192))
    compiled = {shape: [1 + median(linear((shape, shape)), arm, 1, name="kernels_compiled")["value"]
                        for arm in ("peft-compiled", "peft-bf16")] for shape in (4096, 8192)}  # fmt: skip
    return [
        *lines,
        f"Without dropout 8192 → 8192 takes {number(over(large, 'fused', 1, dropout=0.0), '.2f')} where it takes "
        f"{number(over(large, 'fused', 1), '.2f')} with it",
        f"slower than without it: {number(compiled[4096][0], '.2f')} of the frozen linear's at 4096 → 4096 and "
        f"{number(compiled[8192][0], '.2f')} at 8192 → 8192, where PEFT bf16 took {number(compiled[4096][1], '.2f')} "
        f"and "
        f"{number(compiled[8192][1], '.2f')} in the same process",
    ]


def _layers() -> list[str]:
    subjects = [f"layer~{model}" for model in LAYERS.values()]
    few = [over(subject, "fused", 1, tokens=2048) for subject in subjects]
    kept = {arm: [median(subject, arm, 1, "saved_memory")["value"] for subject in subjects]
            for arm in ("fused", "peft-bf16")}  # fmt: skip
    saved = [ours / theirs for ours, theirs in zip(kept["fused"], kept["peft-bf16"], strict=True)]
    spread = [1 + value for value in singles("layer~qwen2.5-32b", "fused", 1)]
    return [
        *(line(name, [subject]) for name, subject in zip(LAYERS, subjects, strict=True)),
        f"Processes differ, the most in 32B, where one adapter took {number(min(spread), '.3f')} to "
        f"{number(max(spread), '.3f')}",
        f"With 2048 tokens one adapter takes {number(few[0], '.2f')}, {number(few[1], '.2f')} and "
        f"{number(few[2], '.2f')}",
        f"Saved for the backward pass: {', '.join(number(share, '.2f') for share in saved)} of PEFT's in the three "
        f"layers",
    ]


def _traffic() -> list[str]:
    published = pd.read_csv(PUBLISHED_TRAFFIC).set_index(["implementation", "in_features"])["gib_fwd_bwd"]
    sizes = (4096, 5120, 8192)

    def gib(*arm) -> str:
        values = [median(f"traffic~{size}x{size}", *arm, "dram_traffic")["value"] / 2**30 for size in sizes]
        return " | ".join(number(value, ".2f") for value in values)

    return [
        f"| frozen | {gib('frozen', 0)} |",
        f"| fused, one adapter | {gib('fused', 1)} |",
        f"| fused, 4 adapters | {gib('fused-multi', 4)} |",
        f"| published | {' | '.join(number(published['fused-lora', size], '.2f') for size in sizes)} |",
        f"| PEFT bf16 | {gib('peft-bf16', 1)} |",
    ]
