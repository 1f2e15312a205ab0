"""What docs/end-to-end.md quotes of the sweeps on three hosts, of the profiles and of the tunings."""

from __future__ import annotations

from functools import cache
from statistics import median

import pandas as pd

from lorafusion.core.config import read_systems
from lorafusion.lab.report.style import WORKLOADS
from tests.numbers.quoted import number, percent
from tests.numbers.sources import H200, Ratio, Sweep, drawn

OURS, BASE, OURS_UNFUSED = "lorafusion", "unfused-sequential", "unfused-ours"
TABLE = ("peft", "peft-bf16", "megatron-fsdp", "megatron-pp", "mlora", "mlora-packed", "mlora-paper-setting", OURS,
         BASE, "fused-sequential", "fused-mlora", OURS_UNFUSED)  # fmt: skip
FIRST_PART = BASE
PROFILED = (OURS, "fused-sequential", "fused-mlora", OURS_UNFUSED, BASE, "mlora-packed", "grouped-mm", "peft-bf16",
            "peft-transformers", "peft", "mlora")  # fmt: skip
HOSTS = {"this": "end_to_end", "second": "hosts/b8aa11e", "third": "hosts/5e8d6d4"}


@cache
def sweep(host: str = "this") -> Sweep:
    return Sweep(f"{H200}/{HOSTS[host]}")


@cache
def baselines() -> tuple[str, ...]:
    return tuple(name for name, system in read_systems().items() if not system.ablation and name != OURS)


def headline(host: str = "this", window: str = "whole", more: tuple[str, ...] = ()) -> Ratio:
    """LoRAFusion over the best baseline of each workload; more: arms that are counted among the baselines."""
    return sweep(host).ratio(OURS, sweep(host).best((*baselines(), *more), window), window=window)


def speeds(system: str, merged: bool = False) -> list[float]:
    return [sweep().speed(system, workload, merged) for workload in WORKLOADS]


def interval(ratio: Ratio, form: str = ".3f") -> str:
    return f"{number(ratio.value, form)} [{number(ratio.low, form)}, {number(ratio.high, form)}]"


def span(values, form: str = ".2f") -> str:
    return f"{number(min(values), form)} to {number(max(values), form)}"


def passages() -> list[str]:
    return [
        *runs(),
        *speed_table(),
        *the_headline(),
        *factors(),
        *orders(),
        *merged(),
        *profiles(),
        *memory(),
        *trust(),
    ]


def runs() -> list[str]:
    rows = sweep().rows
    single = rows[rows["statistic"] == "single"].drop_duplicates(["cell", "repeat"])
    made = single[single["status"] != "skipped"]
    cells, repeats = made["cell"].nunique(), made["repeat"].nunique()
    assert cells * repeats - len(made) == 1
    calls = made["command"].str.extract(r"--share (\d)/2 (--seconds \d+)").drop_duplicates().groupby(0)[1].count()
    words = [{3: "three", 4: "four"}[count] for count in sorted(calls, reverse=True)]
    told = f"in {words[0]} calls of one share and {words[1]} of the other"
    return [told, f"of each of {number(cells)} cells", f"One of the {number(cells * repeats)} runs is missing"]


def speed_table() -> list[str]:
    columns = {workload: max(sweep().speed(system, workload) for system in TABLE) for workload in WORKLOADS}
    lines = []
    for system in TABLE:
        fields = []
        for workload in WORKLOADS:
            value = sweep().speed(system, workload)
            shown = number(value, ",.0f")
            fields.append(f"**{shown}**" if value == columns[workload] else shown)
        part = "*parts:* " if system == FIRST_PART else ""
        lines.append(f"| {part}`{system}` | {' | '.join(fields)} |")
    alone = [f"`{name}` {number(sweep().speed(name, 'mixed'), ',.0f')}"
             for name in ("grouped-mm", "peft-liger", "peft-transformers")]  # fmt: skip
    return [*lines, f"On `mixed` alone: {', '.join(alone)}."]


def the_headline() -> list[str]:
    ratio, steady = headline(), headline(window="steady")
    count = sum(len(sweep().paired(OURS, "peft-bf16", name)) for name in WORKLOADS)
    grouped, unfused = headline(more=("grouped-mm",)), headline(more=(BASE,))
    padded = sweep().ratio(OURS, "mlora")
    by = sorted(ratio.by.values())
    return [
        f"of each workload: {number(ratio.value, '.3f')}**, the geometric mean of {number(count)} ratios",
        f"interval of [{number(ratio.low, '.4f')}, {number(ratio.high, '.4f')}] from the three repeats",
        f"by workload {', '.join(number(value, '.3f') for value in by)}.",
        f"on a second {interval(headline('second'))}, on a third, with older code and tunings, "
        f"{interval(headline('third'))}",
        f"steady window {interval(steady)} here, {interval(headline('second', 'steady'))} and "
        f"{interval(headline('third', 'steady'))} there",
        f"`mixed` would have {number(grouped.by['mixed'], '.3f')} and all {number(grouped.value, '.3f')}",
        f"looped LoRA in the sequential order, which is the best arm without our kernels, "
        f"{number(unfused.value, '.3f')}",
        f"Over `mlora` it is {interval(padded, '.2f')}, by workload {span(padded.by.values())}; on the other hosts "
        f"{number(sweep('second').ratio(OURS, 'mlora').value, '.2f')} and "
        f"{number(sweep('third').ratio(OURS, 'mlora').value, '.2f')}",
    ]


def drawn_factor(name: str) -> float:
    """A factor over all workloads, whole run, from the figure's CSV."""
    rows = drawn(f"{H200}/end_to_end_contributions")
    rows = rows[(rows["window"] == "whole") & (rows["workload"] == "all") & (rows["qkv"] == "separate")]
    (value,) = rows[rows["factor"] == name]["value"]
    return float(value)


def factors() -> list[str]:
    parts = [drawn_factor(name) for name in ("speedup", "baseline", "schedule", "packing", "kernels")]
    shown = [number(value, ".3f") for value in parts]
    return [
        f"{shown[0]} = {shown[1]} (baseline) × {shown[2]} (schedule) × {shown[3]} (packing) × {shown[4]} (kernels)",
        f"over it LoRAFusion gains {number(sweep().ratio(OURS, BASE).value, '.3f')}",
        f"({number(sweep().ratio(BASE, 'peft-bf16').value, '.2f')} over `peft-bf16`)",
    ]


def orders() -> list[str]:
    first, then = sweep().ratio("fused-sequential", BASE), sweep().ratio(OURS, "fused-sequential")
    usual = ("cnn_dailymail", "wikisum", "mixed")
    there = sweep("second").ratio("fused-sequential", BASE), sweep("second").ratio(OURS, "fused-sequential")
    kernels, order = (
        sweep().paired(*pair, "xsum") for pair in (("fused-sequential", BASE), (OURS, "fused-sequential"))
    )
    fused, looped = sweep().ratio(OURS, "fused-mlora"), sweep().ratio(OURS_UNFUSED, BASE)
    others = [value for name, value in looped.by.items() if name != "xsum"]
    return [
        f"they gain {interval(first)}, and our order with fused LoRA the rest, {interval(then)}",
        f"kernels gain {span([first.by[name] for name in usual], '.3f')} and order "
        f"{span([then.by[name] for name in usual])}",
        f"On heterogeneous it is {number(first.by['heterogeneous'], '.2f')} and "
        f"{number(then.by['heterogeneous'], '.2f')}",
        f"fused LoRA has {', '.join(number(kernels[n], '.2f') for n in (1, 2, 3))} of looped in the three repeats, "
        f"and our "
        f"order then gains {', '.join(number(order[n], '.2f') for n in (1, 2, 3))}",
        f"On the second host kernels had {interval(there[0])} and order {number(there[1].value, '.2f')}",
        f"our order gains {number(fused.value, '.3f')} over mLoRA's ({span(fused.by.values(), '.3f')})",
        f"With looped LoRA it is {span(others)} of the sequential one, {number(looped.by['xsum'], '.2f')} on xsum",
    ]


def merged() -> list[str]:
    def ratio(above: str, below: str) -> Ratio:
        return sweep().ratio(above, below, merged=True)

    other = ("unfused-sequential", "fused-sequential", "mlora-packed", "fused-mlora")
    fill = sweep().medians("fill", merged=True)
    filled = fill[fill["system"].isin(other)]["value"]
    rows = sweep().medians("fill", merged=True)["capacity"].unique()
    assert list(rows) == [8192]
    speed = speeds(OURS, merged=True)
    return [
        f"which the other orders fill by {number(100 * filled.min(), '.0f')} to {percent(filled.max())}",
        f"LoRAFusion has {number(min(speed), ',.0f')} to {number(max(speed), ',.0f')} tokens a second then, "
        f"{number(ratio(OURS, OURS_UNFUSED).value, '.2f')} over looped LoRA in our order",
        f"Fused LoRA gains {number(ratio(OURS, 'fused-sequential').value, '.2f')} in our order over the sequential "
        f"one (by "
        f"workload {span(ratio(OURS, 'fused-sequential').by.values())}) and "
        f"{number(ratio(OURS, 'fused-mlora').value, '.2f')} over mLoRA's "
        f"({span(ratio(OURS, 'fused-mlora').by.values())}), "
        f"looped LoRA {number(ratio(OURS_UNFUSED, BASE).value, '.2f')} and "
        f"{number(ratio(OURS_UNFUSED, 'mlora-packed').value, '.2f')}",
        f"In the sequential order fused LoRA has {number(ratio('fused-sequential', BASE).value, '.2f')} of looped "
        f"({span(ratio('fused-sequential', BASE).by.values())})",
        f"idle {percent(idle_share('fused-mlora', 'merged'))} of the time in mLoRA's order with fused LoRA and "
        f"{percent(idle_share('mlora-packed', 'merged'))} with looped, in ours "
        f"{percent(idle_share(OURS, 'merged'), '.1f')}",
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
    ours, peft, looped = profile(OURS), profile("peft-bf16"), profile(BASE)
    gemm = ours["GEMM"] + ours["LoRA"] - peft["GEMM"]
    alike = ("peft-bf16", "megatron-fsdp", "megatron-pp", "mlora-paper-setting")
    return [
        *lines,
        f"Ours has {number(gemm, '.1f')} ms more of them than `peft-bf16`, GEMM and LoRA together, and "
        f"{number(peft['elementwise'] - ours['elementwise'], '.1f')} ms less of elementwise work: net "
        f"{number(peft['busy'] - ours['busy'], '.1f')} ms",
        f"idle {percent(max(map(idle_share, alike)), '.1f')} of the time at most",
        f"Looped LoRA saves {number(peft['elementwise'] - looped['elementwise'], '.1f')} ms of that, as its products "
        f"add and "
        f"scale, which takes them {number(looped['GEMM'] - peft['GEMM'], '.1f')} ms more",
        f"which for 1000 tokens are {number(profile('mlora-packed')['kernels'] / ours['kernels'], '.0f')} times "
        f"LoRAFusion's",
        f"kernels. The GPU is idle {percent(idle_share('mlora-packed'))} of the time",
        f"for which the host launches many kernels, and the GPU is idle {percent(idle_share('mlora'))} of the time",
        f"computes padding: {number(padded('mixed'), '.1f')} times the real tokens on `mixed`, "
        f"{number(padded('xsum'), '.1f')} "
        "on xsum",
    ]


def padded(workload: str) -> float:
    """Tokens that mLoRA computes over the real ones."""
    both = [sweep().medians(metric, system="mlora", workload=workload, window="whole")["value"].iloc[0]
            for metric in ("throughput_padded", "throughput")]  # fmt: skip
    return float(both[0] / both[1])


def memory() -> list[str]:
    rows = sweep().medians("peak_memory", workload="mixed").set_index("system")["value"] / 2**30
    alike = [rows[name] for name in ("peft-bf16", "megatron-fsdp", "megatron-pp", "mlora-paper-setting", "peft")]
    return [
        f"takes from {number(rows['fused-sequential'], '.0f')} GiB (`fused-sequential`) over "
        f"{number(rows['mlora'], '.0f')} "
        f"(`mlora`), {span(alike, '.0f')} (PEFT and Megatron; {number(rows['peft-transformers'], '.0f')} without "
        f"Liger's "
        f"norms, rotation and gate) and {number(rows['mlora-packed'], '.0f')} (`mlora-packed`) to "
        f"{number(rows['grouped-mm'], '.0f')} (looped and grouped LoRA in our order) and {number(rows[OURS], '.0f')} "
        "(`lorafusion`)",
    ]


def spread(system: str, workload: str, merged: bool = False) -> float:
    """Largest less smallest of the repeats, over their median."""
    values = list(sweep().runs(system, workload, merged).values())
    return (max(values) - min(values)) / median(values)


def canary(host: str) -> list[float]:
    rows = sweep(host).rows
    return list(rows[(rows["statistic"] == "single") & (rows["implementation"] == "canary-gemm")]["value"])


def trust() -> list[str]:
    spreads = [spread(system, workload, merged) for system, workload, merged, window in sweep().speeds
               if window == "whole"]  # fmt: skip
    mlora = [100 * spread("mlora", workload) for workload in WORKLOADS]
    products = pd.Series(canary("this"))
    faster = median(canary("second")) / median(canary("this")) - 1
    same = [sweep().speed(*key) / sweep("second").speed(*key) for key in shared_plans()]
    xsum = [sweep(host).runs("fused-sequential", "xsum") for host in HOSTS]
    return [
        f"lie within {percent(median(spreads), '.1f')} (largest less smallest, over the median; median of the cells; "
        f"{percent(pd.Series(spreads).quantile(0.9))} in nine of ten)",
        f"`mlora`, {number(min(mlora), '.0f')} to {number(max(mlora), '.0f')} %, `fused-sequential` on xsum, "
        f"{percent(spread('fused-sequential', 'xsum'))}",
        f"varied by {percent(products.quantile(0.95) / products.quantile(0.05) - 1, '.1f')} (5th to 95th percentile",
        f"Of {number(len(same))} cells with the same plan on the second host",
        f"the median has {number(median(same), '.3f')} of what it has there, as the fixed matrix product is "
        f"{percent(faster, '.1f')} faster here; the least has {number(min(same), '.2f')}",
        f"here {', '.join(number(value, ',.0f') for value in sorted(xsum[0].values()))} tokens a second in the three "
        f"repeats, "
        f"on the second host {span(xsum[1].values(), ',.0f')}, on the third {span(xsum[2].values(), ',.0f')}",
    ]


def shared_plans() -> list[tuple]:
    """The cells that finished on both hosts with the same plan: system, workload, merged."""
    plans = []
    for host in ("this", "second"):
        rows = sweep(host).medians("throughput", merged=None, window="whole", status="ok")
        plans.append({(row.system, row.workload, row.merged_qkv): row.plan_hash for row in rows.itertuples()})
    return [key for key, plan in plans[0].items() if plans[1].get(key) == plan]
