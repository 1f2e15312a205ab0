"""What docs/results/end-to-end.md quotes of the suite on three hosts, of the profiles and of the tunings."""

from __future__ import annotations

from functools import cache
from statistics import geometric_mean, median

import pandas as pd

from lorafusion.core.config import read_systems
from lorafusion.lab.report.style import WORKLOADS
from tests.numbers.quoted import number, percent
from tests.numbers.sources import H200, EndToEndTable, Ratio, drawn

OURS, BASE, OURS_UNFUSED = "lorafusion", "unfused-sequential", "unfused-ours"
TABLE = ("peft", "peft-bf16", "megatron-fsdp", "megatron-pp", "mlora", "mlora-packed", "mlora-paper-setting", OURS,
         BASE, "fused-sequential", "fused-mlora", OURS_UNFUSED)  # fmt: skip
FIRST_PART = BASE
PROFILED = (OURS, "fused-sequential", "fused-mlora", OURS_UNFUSED, BASE, "mlora-packed", "grouped-mm", "peft-bf16",
            "peft-transformers", "peft", "mlora")  # fmt: skip
HOSTS = {"this": "end_to_end", "second": "hosts/b8aa11e", "third": "hosts/5e8d6d4"}


@cache
def end_to_end_table(host: str = "this") -> EndToEndTable:
    return EndToEndTable(f"{H200}/{HOSTS[host]}")


@cache
def baselines() -> tuple[str, ...]:
    return tuple(name for name, system in read_systems().items() if not system.ablation and name != OURS)


def headline(host: str = "this", window: str = "whole", more: tuple[str, ...] = ()) -> Ratio:
    """LoRAFusion over the best baseline of each workload; more: arms that are counted among the baselines."""
    return end_to_end_table(host).ratio(OURS, end_to_end_table(host).best((*baselines(), *more), window), window=window)


def speeds(system: str, merged: bool = False) -> list[float]:
    return [end_to_end_table().speed(system, workload, merged) for workload in WORKLOADS]


def interval(ratio: Ratio, form: str = ".3f") -> str:
    return f"{number(ratio.value, form)} [{number(ratio.low, form)}, {number(ratio.high, form)}]"


def span(values, form: str = ".2f") -> str:
    return f"{number(min(values), form)} to {number(max(values), form)}"


def shown(ratio: Ratio, form: str = ".3f") -> str:
    """The last two fields of a table's row: a ratio and its interval."""
    return f"{number(ratio.value, form)} | {number(ratio.low, form)} to {number(ratio.high, form)} |"


def by_workload(text: str, ratio: Ratio, form: str = ".2f") -> str:
    return f"| {text} | {' | '.join(number(ratio.by[name], form) for name in WORKLOADS)} |"


def passages() -> list[str]:
    return [
        *repeated_runs(),
        *speed_table(),
        *speedups(),
        *speedups_by_workload(),
        *factors(),
        *kernels_and_order(),
        *orders(),
        *merged(),
        *profiles(),
        *profile_remarks(),
        *memory(),
        *predictions(),
        *spreads(),
        *trust(),
        *small_microbatches(),
        *captured_layers(),
    ]


def repeated_runs() -> list[str]:
    rows = end_to_end_table().rows
    single = rows[rows["statistic"] == "single"].drop_duplicates(["cell", "repeat"])
    made = single[single["status"] != "skipped"]
    cells, repeats = made["cell"].nunique(), made["repeat"].nunique()
    assert cells * repeats - len(made) == 1
    return [f"Each of {number(cells)} cells ran in three fresh processes", f"One of the {number(cells * repeats)} runs"]


def speed_table() -> list[str]:
    columns = {workload: max(end_to_end_table().speed(system, workload) for system in TABLE) for workload in WORKLOADS}
    lines = []
    for system in TABLE:
        fields = []
        for workload in WORKLOADS:
            value = end_to_end_table().speed(system, workload)
            shown = number(value, ",.0f")
            fields.append(f"**{shown}**" if value == columns[workload] else shown)
        part = "*parts:* " if system == FIRST_PART else ""
        lines.append(f"| {part}`{system}` | {' | '.join(fields)} |")
    alone = [f"`{name}` {number(end_to_end_table().speed(name, 'mixed'), ',.0f')}"
             for name in ("grouped-mm", "peft-liger", "peft-transformers")]  # fmt: skip
    return [*lines, f"On `mixed` alone: {', '.join(alone)}."]


def speedups() -> list[str]:
    """The rows of the table of speedups, over the baselines of each host."""
    ratio, names = headline(), {"this": "this host", "second": "second host", "third": "third host"}
    first = f"**{number(ratio.value, '.3f')}** | {number(ratio.low, '.4f')} to {number(ratio.high, '.4f')} |"
    others = [f"| the best baseline, {names[host]} | {shown(headline(host))}" for host in ("second", "third")]
    steady = [f"| the same, steady window, {name} | {shown(headline(host, 'steady'))}" for host, name in names.items()]
    mlora = [
        f"| `mlora`, {name} | {shown(end_to_end_table(host).ratio(OURS, 'mlora'), '.2f')}"
        for host, name in names.items()
    ]
    return [
        f"trains four adapters {number(ratio.value, '.2f')} times as fast as the best baseline",
        f"| the best baseline, this host | {first}",
        *others,
        *steady,
        f"| the best baseline or `unfused-sequential`, this host | {shown(headline(more=(BASE,)))}",
        f"| the best baseline or `grouped-mm`, this host | {shown(headline(more=('grouped-mm',)))}",
        *mlora,
    ]


def speedups_by_workload() -> list[str]:
    return [
        by_workload("the best baseline", headline(), ".3f"),
        by_workload("`mlora`", end_to_end_table().ratio(OURS, "mlora")),
    ]


def drawn_factor(name: str) -> float:
    """A factor over all workloads, whole run, from the figure's CSV."""
    rows = drawn(f"{H200}/end_to_end_contributions")
    rows = rows[(rows["window"] == "whole") & (rows["workload"] == "all") & (rows["qkv"] == "separate")]
    (value,) = rows[rows["factor"] == name]["value"]
    return float(value)


def factors() -> list[str]:
    names = ("baseline", "schedule", "packing", "kernels", "speedup")
    over_peft = end_to_end_table().ratio(BASE, "peft-bf16").value
    return [
        *(f"| {name} | {number(drawn_factor(name), '.3f')} |" for name in names),
        f"is {number(end_to_end_table().ratio(OURS, BASE).value, '.3f')} times as fast as `unfused-sequential`",
        f"`unfused-sequential` is {number(over_peft, '.2f')} times as fast as `peft-bf16`",
    ]


def kernels_and_order() -> list[str]:
    """The rows of the table of kernels first and order after them."""
    first, then = end_to_end_table().ratio("fused-sequential", BASE), end_to_end_table().ratio(OURS, "fused-sequential")
    there = (
        end_to_end_table("second").ratio("fused-sequential", BASE),
        end_to_end_table("second").ratio(OURS, "fused-sequential"),
    )
    lines = [f"| {name} | {number(first.by[name], '.3f')} | {number(then.by[name], '.3f')} |" for name in WORKLOADS]
    return [
        f"| all | {interval(first)} | {interval(then)} |",
        f"| all, second host | {interval(there[0])} | {interval(there[1])} |",
        *lines,
    ]


def orders() -> list[str]:
    kernels, order = (
        end_to_end_table().paired(*pair, "xsum") for pair in (("fused-sequential", BASE), (OURS, "fused-sequential"))
    )
    fused, looped = end_to_end_table().ratio(OURS, "fused-mlora"), end_to_end_table().ratio(OURS_UNFUSED, BASE)
    return [
        f"Added last, the kernels give {number(drawn_factor('kernels'), '.3f')}",
        f"On xsum the kernels gave {', '.join(number(kernels[n], '.2f') for n in (1, 2, 3))} in the three repeats, "
        f"and the order {', '.join(number(order[n], '.2f') for n in (1, 2, 3))}",
        by_workload("our order over mLoRA's, fused LoRA", fused, ".3f"),
        by_workload("our order over the sequential order, looped LoRA", looped),
    ]


def merged() -> list[str]:
    other = ("unfused-sequential", "fused-sequential", "mlora-packed", "fused-mlora")
    pairs = {
        "our order over the sequential order, fused LoRA": (OURS, "fused-sequential"),
        "our order over mLoRA's order, fused LoRA": (OURS, "fused-mlora"),
        "our order over the sequential order, looped LoRA": (OURS_UNFUSED, BASE),
        "our order over mLoRA's order, looped LoRA": (OURS_UNFUSED, "mlora-packed"),
        "fused LoRA over looped LoRA, our order": (OURS, OURS_UNFUSED),
        "fused LoRA over looped LoRA, sequential order": ("fused-sequential", BASE),
    }
    ratios = {text: end_to_end_table().ratio(*pair, merged=True) for text, pair in pairs.items()}
    fill = end_to_end_table().medians("fill", merged=True)
    filled = fill[fill["system"].isin(other)]["value"]
    assert list(fill["capacity"].unique()) == [8192]
    speed = speeds(OURS, merged=True)
    return [
        f"the other orders fill {number(100 * filled.min(), '.0f')} to {percent(filled.max())} of it",
        f"LoRAFusion then trains {number(min(speed), ',.0f')} to {number(max(speed), ',.0f')} tokens a second",
        *(f"| {text} | {number(ratio.value, '.2f')} | {span(ratio.by.values())} |" for text, ratio in ratios.items()),
        f"idle {percent(idle_share('fused-mlora', 'merged'))} of the time in mLoRA's order with fused LoRA, "
        f"{percent(idle_share('mlora-packed', 'merged'))} with looped LoRA, and "
        f"{percent(idle_share(OURS, 'merged'), '.1f')} in our order",
    ]


@cache
def profile(system: str, qkv: str = "separate") -> pd.Series:
    """Milliseconds for 1000 tokens on `mixed` by class, and the number of kernels."""
    rows = drawn(f"{H200}/end_to_end_profile")
    rows = rows[(rows["workload"] == "mixed") & (rows["system"] == system) & (rows["qkv"] == qkv)]
    found = rows.set_index("class")["milliseconds"]
    found["busy"] = found.sum() - found["idle"]
    found["kernels"] = rows["kernels"].sum()
    return found


def idle_share(system: str, qkv: str = "separate") -> float:
    found = profile(system, qkv)
    return found["idle"] / (found["idle"] + found["busy"])


def profiles() -> list[str]:
    lines = []
    for system in PROFILED:
        found = profile(system)
        lora = number(found["LoRA"], ".1f") if "LoRA" in found else ""
        fields = [number(found["GEMM"], ".1f"), lora]
        fields += [number(found[name], ".1f") for name in ("attention", "elementwise", "busy", "idle")]
        lines.append(
            f"| `{system}` | {' | '.join(fields)} | {number(found['kernels'], '.0f')} |".replace("|  |", "| |")
        )
    return lines


def profile_remarks() -> list[str]:
    ours, peft, looped = profile(OURS), profile("peft-bf16"), profile(BASE)
    gemm = ours["GEMM"] + ours["LoRA"] - peft["GEMM"]
    alike = ("peft-bf16", "megatron-fsdp", "megatron-pp", "mlora-paper-setting")
    return [
        f"LoRAFusion spends {number(gemm, '.1f')} ms more than `peft-bf16` in GEMM and LoRA, and "
        f"{number(peft['elementwise'] - ours['elementwise'], '.1f')} ms less in elementwise kernels",
        f"With attention and copies the difference is {number(peft['busy'] - ours['busy'], '.1f')} ms",
        f"GPU idle at most {percent(max(map(idle_share, alike)), '.1f')} of the time",
        f"Looped LoRA saves {number(peft['elementwise'] - looped['elementwise'], '.1f')} ms of these passes, and its "
        f"GEMMs take {number(looped['GEMM'] - peft['GEMM'], '.1f')} ms more",
        f"launches {number(profile('mlora-packed')['kernels'] / ours['kernels'], '.0f')} times LoRAFusion's kernels",
        f"so the GPU is idle {percent(idle_share('mlora-packed'))} of the time",
        f"The GPU is idle {percent(idle_share('mlora'))} of the time",
        f"It also computes padding: {number(padded('mixed'), '.1f')} times the real tokens on `mixed`, "
        f"{number(padded('xsum'), '.1f')} times on xsum",
    ]


def padded(workload: str) -> float:
    """Tokens that mLoRA computes over the real ones."""
    both = [end_to_end_table().medians(metric, system="mlora", workload=workload, window="whole")["value"].iloc[0]
            for metric in ("throughput_padded", "throughput")]  # fmt: skip
    return float(both[0] / both[1])


def memory() -> list[str]:
    rows = end_to_end_table().medians("peak_memory", workload="mixed").set_index("system")["value"] / 2**30
    names = ("fused-sequential", "mlora", "peft-bf16", "megatron-pp", "peft-transformers", "mlora-packed",
             "grouped-mm", OURS)  # fmt: skip
    return [f"| `{name}` | {number(rows[name], '.0f')} |" for name in names]


def predictions() -> list[str]:
    """The rows of the table of predicted times' errors."""
    data = drawn(f"{H200}/validation")
    error = 100 * (data["ratio"] - 1).abs()
    kinds = {"fused": "fused", "looped": "looped", "PEFT": "peft"}
    groups = {"all": error} | {text: error[data["implementation"] == name] for text, name in kinds.items()}
    return [
        f"| {name} | {number(len(of))} | {number(of.mean(), '.1f')} % | {number(of.max(), '.1f')} % |"
        for name, of in groups.items()
    ]


def spread(system: str, workload: str, merged: bool = False) -> float:
    """Largest less smallest of the repeats, over their median."""
    values = list(end_to_end_table().runs(system, workload, merged).values())
    return (max(values) - min(values)) / median(values)


def canary(host: str) -> list[float]:
    rows = end_to_end_table(host).rows
    return list(rows[(rows["statistic"] == "single") & (rows["implementation"] == "canary-gemm")]["value"])


def spreads() -> list[str]:
    """The rows of the table of spreads."""
    every = [spread(system, workload, merged) for system, workload, merged, window in end_to_end_table().speeds
             if window == "whole"]  # fmt: skip
    mlora = [100 * spread("mlora", workload) for workload in WORKLOADS]
    products = pd.Series(canary("this"))
    return [
        f"| the median cell | {percent(median(every), '.1f')} |",
        f"| nine cells of ten, at most | {percent(pd.Series(every).quantile(0.9))} |",
        f"| `mlora`, by workload | {number(min(mlora), '.0f')} to {number(max(mlora), '.0f')} % |",
        f"| `fused-sequential` on xsum | {percent(spread('fused-sequential', 'xsum'))} |",
        f"| the fixed matrix product beside each run (5th to 95th percentile) | "
        f"{percent(products.quantile(0.95) / products.quantile(0.05) - 1, '.1f')} |",
    ]


def trust() -> list[str]:
    faster = median(canary("second")) / median(canary("this")) - 1
    same = [end_to_end_table().speed(*key) / end_to_end_table("second").speed(*key) for key in shared_plans()]
    xsum = [end_to_end_table(host).runs("fused-sequential", "xsum") for host in HOSTS]
    return [
        f"{number(len(same))} cells have the same plan on the second host",
        f"the median cell is {number(median(same), '.3f')} times as fast, and the fixed matrix product is "
        f"{percent(faster, '.1f')} faster",
        f"The slowest cell has {number(min(same), '.2f')}",
        f"| this host | {', '.join(number(value, ',.0f') for value in sorted(xsum[0].values()))} |",
        f"| second host | {span(xsum[1].values(), ',.0f')} |",
        f"| third host | {span(xsum[2].values(), ',.0f')} |",
    ]


def shared_plans() -> list[tuple]:
    """The cells that finished on both hosts with the same plan: system, workload, merged."""
    plans = []
    for host in ("this", "second"):
        rows = end_to_end_table(host).medians("throughput", merged=None, window="whole", status="ok")
        plans.append({(row.system, row.workload, row.merged_qkv): row.plan_hash for row in rows.itertuples()})
    return [key for key, plan in plans[0].items() if plans[1].get(key) == plan]


def small_microbatches() -> list[str]:
    rows = drawn(f"{H200}/small_microbatches")
    table = rows.pivot(index="workload", columns=["capacity", "graphs"], values="throughput").loc[list(WORKLOADS)]
    small, large = sorted(set(rows["capacity"]))
    best = table[large, "off"]
    lines = [f"over {number(large, ',d')} tokens", f"| {number(large, ',d')} tokens, eager | {_speeds(best)} | |"]
    for name, graphs in (("eager", "off"), ("graphs", "on")):
        mean = number(geometric_mean(table[small, graphs] / best), ".3f")
        lines.append(f"| {number(small, ',d')} tokens, {name} | {_speeds(table[small, graphs])} | {mean} |")
    captured = rows[rows["graphs"] == "on"]
    seconds = captured["capture_seconds"].sort_values()
    return [
        *lines,
        f"graphs take {number(captured['capture_bytes'].max() / 2**30, '.1f')} GiB",
        f"{span(seconds[:-1], '.1f')} s to capture, and {number(seconds.iloc[-1], '.0f')} s in the first run",
    ]


def _speeds(values: pd.Series) -> str:
    return " | ".join(number(value, ",.0f") for value in values)


def captured_layers() -> list[str]:
    titles = {"llama-3.1-8b": "Llama-3.1-8B", "qwen2.5-32b": "Qwen2.5-32B"}
    return [
        f"| {titles[row.model]} | {number(row.tokens, ',d')} | {number(row.frozen_ms, '.2f')} | "
        f"{number(row.graphs_ms / row.frozen_ms, '.2f')} | {number(row.eager_ms / row.frozen_ms, '.2f')} |"
        for row in drawn(f"{H200}/captured_layers").itertuples()
    ]
