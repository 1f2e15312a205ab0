"""How figures look: sizes, fonts, and one colour and hatch for each system wherever it appears."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

TEXT_WIDTH = 7.0  # inches, both columns of a conference paper; figures are drawn at their final size
FONT_SIZE = 8  # points
SMALL = 6.5
PNG_DPI = 200

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
    "figure.titlesize": FONT_SIZE + 1,
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


# Okabe and Ito's colours, which colour-blind readers can tell apart, from light to dark as the eye meets them.
SYSTEMS = {
    "peft": Look("#BBBBBB", ""),
    "single-gpu": Look("#999999", "---"),
    "megatron-fsdp": Look("#CC79A7", "...."),
    "megatron-pp": Look("#009E73", "\\\\\\\\"),
    "mlora": Look("#E69F00", "////"),
    "lorafusion": Look("#0072B2", ""),
}
OTHERS = (Look("#56B4E9", "xxxx"), Look("#D55E00", "||||"), Look("#F0E442", "++++"), Look("#444444", "oooo"))
# What was not measured has no fill, only the system's colour as a hatch.
KINDS = {"simulated": "//////", "published": "......", "derived": "xxxxxx"}
STATUS_LABELS = {"oom": "OOM", "nan": "NaN"}


def looks(names: Iterable[str]) -> dict[str, Look]:
    """The look of each system, in drawing order: baselines first, lorafusion last of the known, then the others.

    A system that is not known here takes the next spare look in alphabetical order, so give all names of a suite.
    """
    present = set(names)
    out = {name: look for name, look in SYSTEMS.items() if name in present}
    for index, name in enumerate(sorted(present - set(SYSTEMS))):
        out[name] = OTHERS[index % len(OTHERS)]
    return out


def status_label(status: str) -> str:
    """A status as figures and tables show it."""
    return STATUS_LABELS.get(status, status)
