"""How figures look: sizes, fonts, and one colour and hatch for each system wherever it appears."""

import zlib
from collections.abc import Iterable
from typing import Any, NamedTuple

import pandas as pd

from lorafusion.core.schema import one_of
from lorafusion.lab.table import vocabulary

TEXT_WIDTH = 7.0  # inches, both columns of a conference paper; figures are drawn at their final size
FONT_SIZE = 8  # points
SMALL = 6.5
PNG_DPI = 200
CPU_WARNING = "CPU, not a performance result"
FAILED = "#B00000"  # the colour of what failed
# Okabe and Ito's colours, which colour-blind readers can tell apart, without black.
PALETTE = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442")

# Type 42 embeds fonts as TrueType, which every publisher takes; matplotlib's default, Type 3, many refuse.
PARAMETERS: dict[str, Any] = {
    "pdf.fonttype": 42,
    "ps.fonttype": 42,
    "font.family": "DejaVu Sans",  # ships with matplotlib, so that a figure is the same on every machine
    "font.size": FONT_SIZE,
    "axes.titlesize": FONT_SIZE,
    "axes.labelsize": FONT_SIZE,
    "xtick.labelsize": FONT_SIZE - 1,
    "ytick.labelsize": FONT_SIZE - 1,
    "legend.fontsize": FONT_SIZE - 1,
    "legend.title_fontsize": FONT_SIZE + 1,
    "figure.dpi": 100,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.linewidth": 0.4,
    "grid.color": "0.88",
    "hatch.linewidth": 0.7,
    "xtick.major.size": 0,
    "ytick.major.size": 2,
    "ytick.major.width": 0.6,
    "legend.frameon": False,
    "legend.handlelength": 1.6,
    "legend.columnspacing": 1.4,
}


class Look(NamedTuple):
    """A system's colour, and its hatch, which tells it apart in greyscale."""

    colour: str
    hatch: str


# A hue of the palette for each family of systems, and within it another lightness and hatch. Ablations are a family of
# their own, as they are no baselines.
SYSTEMS = {
    "peft": Look("#C4C4C4", ""),
    "peft-bf16": Look("#7F7F7F", "||||"),
    "peft-liger": Look("#A6A6A6", "xxxx"),
    "peft-transformers": Look("#5A5A5A", "////"),
    "megatron-fsdp": Look("#6CCBAF", "...."),
    "megatron-pp": Look("#009E73", "\\\\\\\\"),
    "mlora": Look("#E69F00", "////"),
    "mlora-packed": Look("#BF7A00", "xxxx"),
    "mlora-paper-setting": Look("#7A4E00", ""),
    "unsloth": Look("#A3333D", "----"),
    "unfused-sequential": Look("#AD628C", "xxxx"),
    "fused-sequential": Look("#DDA6C4", "////"),
    "fused-mlora": Look("#CC79A7", "...."),
    "unfused-ours": Look("#8C4A70", ""),
    "grouped-mm": Look("#5C2E4A", "||||"),
    "lorafusion-eager": Look("#5FA8D3", "----"),
    "lorafusion": Look("#0072B2", ""),
}
OTHERS = (Look("#56B4E9", "xxxx"), Look("#D55E00", "||||"), Look("#F0E442", "++++"), Look("#444444", "oooo"))
# What was not measured has no fill, only the system's colour as a hatch.
KINDS = {"simulated": "//////", "published": "......", "derived": "xxxxxx"}
# Of LoRA linears, decoder layers and training steps, in drawing order.
IMPLEMENTATIONS = {
    "frozen": Look("#444444", ""),
    "peft": Look("#E69F00", "////"),
    "peft-bf16": Look("#D55E00", "\\\\\\\\"),
    "peft-compiled": Look("#CC79A7", "...."),
    "peft-multi": Look("#F0E442", "----"),
    "fused": Look("#0072B2", ""),
    "fused-multi": Look("#56B4E9", ""),
    "looped": Look("#009E73", "++++"),
}
# More adapters of an implementation have another hatch, from few to many.
ADAPTER_HATCHES = ("", "xxxx", "++++", "oooo")
# The classes of a GPU's kernels (`lorafusion.lab.profiler`), from the bottom of a bar to its top.
CLASSES = {
    "GEMM": Look("#0072B2", ""),
    "attention": Look("#56B4E9", "xxxx"),
    "elementwise": Look("#E69F00", "////"),
    "LoRA": Look("#009E73", ""),
    "loss": Look("#CC79A7", "...."),
    "optimizer": Look("#F0E442", "++++"),
    "copies": Look("#D55E00", "||||"),
    "other": Look("#444444", "oooo"),
    "idle": Look("#D0D0D0", ""),
}
CANARIES = ("canary-gemm", "canary-copy")
WORKLOADS = ("xsum", "cnn_dailymail", "wikisum", "mixed", "heterogeneous")  # in the paper's order, others follow
STATUS_LABELS = {"oom": "OOM", "nan": "NaN"}


def looks(names: Iterable[str]) -> dict[str, Look]:
    """The look of each system, in drawing order: baselines first, lorafusion last of the known, then the others.

    A system that is not known here has its spare look by its name, or the next free one where two meet.
    """
    present = set(names)
    out = {name: look for name, look in SYSTEMS.items() if name in present}
    for name in sorted(present - set(SYSTEMS)):
        first = zlib.crc32(name.encode())
        candidates = [OTHERS[(first + step) % len(OTHERS)] for step in range(len(OTHERS))]
        out[name] = next((look for look in candidates if look not in out.values()), candidates[0])
    return out


def status_label(status: str) -> str:
    """A status as figures and tables show it."""
    return STATUS_LABELS.get(status, status)


def devices(rows: pd.DataFrame) -> str:
    """The devices that rows were measured on, as a footer has them."""
    return ", ".join(sorted(rows["gpu_name"].astype(object).fillna("CPU").unique())) or "no device"


def origin(rows: pd.DataFrame, device: str = "") -> str:
    """The line of a footer that says where a figure's numbers come from: suite, commit and device."""
    return f"suite {', '.join(sorted(rows['suite'].unique()))} · {commit(rows)} · {device or devices(rows)}"


def commit(rows: pd.DataFrame) -> str:
    """The commits that rows were measured at, as a footer has them."""
    commits = ", ".join(sorted({str(sha)[:10] for sha in rows["git_sha"].dropna()})) or "unknown"
    dirty = " with local changes" if "git_dirty" in rows and rows["git_dirty"].eq(True).any() else ""
    return f"commit {commits}{dirty}"


def system_variants(rows: pd.DataFrame) -> pd.Series:
    """The systems by name, with what tells those that have q, k and v as one linear apart."""
    return rows["system"] + rows["qkv"].eq("merged").map({True: ", q k v merged", False: ""})


def implementation_variants(rows: pd.DataFrame) -> pd.Series:
    """The implementations by name, with the number of adapters where there are several."""
    counts = ", " + rows["adapters"].fillna(0).astype(int).astype(str) + " adapters"
    return rows["implementation"] + counts.where(rows["adapters"] > 1, "")


def implementation_looks(rows: pd.DataFrame) -> dict[str, tuple[str, int]]:
    """The variants of implementations in drawing order: the implementation of each, and how many of it have fewer
    adapters."""
    names = rows[["implementation", "adapters", "variant"]].drop_duplicates()
    names = names.sort_values(["implementation", "adapters"], key=rank).drop_duplicates("variant")
    levels = names.groupby("implementation").cumcount()
    return dict(zip(names["variant"], zip(names["implementation"], levels, strict=True), strict=True))


def bar_looks(rows: pd.DataFrame) -> dict[str, Look]:
    """How the bars of each variant look, in drawing order."""
    looks = {}
    for variant, (implementation, level) in implementation_looks(rows).items():
        look = IMPLEMENTATIONS[implementation]
        looks[variant] = look._replace(hatch=look.hatch or ADAPTER_HATCHES[level % len(ADAPTER_HATCHES)])
    return looks


ORDERS: dict[str, tuple[str, ...]] = {
    "window": vocabulary.WINDOWS,
    "kind": vocabulary.KINDS,
    "qkv": ("separate", "merged"),
    "implementation": (*IMPLEMENTATIONS, *CANARIES),
    "class": tuple(CLASSES),
}


def rank(column: pd.Series) -> pd.Series:
    """Sort keys for a column: what has a customary order comes in that order, the rest as it is."""
    if column.name in ("workload", "group"):
        # A group is a workload or "workload, batch 16"; the length keeps 8 before 16.
        names = [name.partition(",")[0] for name in column]
        places = [WORKLOADS.index(name) if name in WORKLOADS else len(WORKLOADS) for name in names]
        return pd.Series(list(zip(places, column.str.len(), column, strict=True)), index=column.index)
    if column.name == "system":
        return column.map(list(looks(column)).index)
    if column.name not in ORDERS:
        return column
    for name in column.unique():
        one_of(str(column.name), name, set(ORDERS[column.name]), "figure")
    return column.map(ORDERS[column.name].index)
