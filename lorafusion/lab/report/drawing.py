"""What the figures share: their files, bars with intervals and numbers, and legend, title and footer.

A figure is drawn from its CSV, not beside it: whoever edits or plots that file starts from the same numbers. Equal
tables give equal bytes.
"""

from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import Path
from typing import Any

import matplotlib
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from lorafusion.core.files import whole, write
from lorafusion.core.seals import require_seal, seal
from lorafusion.lab.report import style
from lorafusion.lab.table.reading import read_frame

FILL = 0.86  # of the distance between two groups, which their bars take


def written(data: pd.DataFrame, draw: Callable[[pd.DataFrame], Figure], stem: str | Path) -> list[Path]:
    """Write what a figure shows as CSV, draw it from there, and save it; returns the paths of PDF, PNG and CSV."""
    stem = Path(stem)
    csv = stem.with_name(stem.name + ".csv")
    write(csv, data.to_csv(index=False, lineterminator="\n"))
    seal(csv)
    return [*save(draw(read_data(csv)), stem), csv]


def read_data(path: str | Path) -> pd.DataFrame:
    """A sealed CSV, as a figure's drawing takes it; only an empty field is empty. Raises `UserError` if it is cut."""
    require_seal(Path(path))
    return read_frame(path)


def save(figure: Figure, stem: Path) -> list[Path]:
    """Write PDF and PNG without dates or versions of the tools, so that equal figures are equal files."""
    pdf, png = stem.with_name(stem.name + ".pdf"), stem.with_name(stem.name + ".png")
    with matplotlib.rc_context(style.PARAMETERS):
        with whole(pdf) as partial:
            figure.savefig(partial, format="pdf", metadata={"CreationDate": None})
        with whole(png) as partial:
            figure.savefig(partial, format="png", dpi=style.PNG_DPI, metadata={"Software": None})
    return [pdf, png]


def styled(draw: Callable[..., Figure]) -> Callable[..., Figure]:
    """Draw with the sizes and fonts of all figures."""

    @wraps(draw)
    def drawn(*arguments: Any) -> Figure:
        with matplotlib.rc_context(style.PARAMETERS):
            return draw(*arguments)

    return drawn


def finish(
    figure: Figure, handles: list, title: str, footer: str, columns: int = 0, cpu: bool = False, **legend: Any
) -> None:
    """Legend with the title above the figure, and a footer below it. columns: of the legend, by default one line of
    them. cpu: say that the numbers are no results. legend: of `Figure.legend`."""
    title += f" ({style.CPU_WARNING})" if cpu else ""
    figure.legend(handles=handles, loc="outside upper center", ncols=columns or len(handles), title=title, **legend)
    write_footer(figure, footer)


def write_footer(figure: Figure, text: str) -> None:
    figure.supxlabel(text, fontsize=style.SMALL, color="0.35")


def fill(look: style.Look, kind: str = "measured", linewidth: float = 0.3) -> dict[str, Any]:
    """How a bar is filled; what was not measured is only hatched."""
    if kind != "measured":
        return {"facecolor": "white", "edgecolor": look.colour, "hatch": style.KINDS[kind], "linewidth": 0.8}
    return {"facecolor": look.colour, "edgecolor": "white", "hatch": look.hatch, "linewidth": linewidth}


def patches(looks: dict[str, style.Look], linewidth: float = 0.3) -> list[Patch]:
    """A legend's entry for each name."""
    return [Patch(label=name, **fill(look, linewidth=linewidth)) for name, look in looks.items()]


def line(label: str, **look: Any) -> Line2D:
    """A legend's entry for a line or a marker."""
    return Line2D([], [], label=label, **look)


def slots(groups: Sequence, series: Sequence, share: float = FILL) -> tuple[dict[tuple, float], float]:
    """The middle of each bar by group and series, groups being 1 apart, and the width of a bar."""
    width = share / max(len(series), 1)
    middle = (len(series) - 1) / 2
    places = {
        (group, name): index + (place - middle) * width
        for index, group in enumerate(groups)
        for place, name in enumerate(series)
    }
    return places, width


def draw_bar(ax: Axes, x: float, row: Any, width: float, look: dict, numbers: bool, size: float = style.SMALL) -> None:
    """A row's bar with its interval, and its number above if there is room; or why there is none. size: of the text in
    place of a bar, in points."""
    if pd.isna(row.value):
        write_upright(ax, x, style.status_label(row.status), size=size)
        return
    ax.bar(x, row.value, width, **look)
    draw_interval(ax, x, row)
    if numbers:
        top = row.value if pd.isna(row.ci_high) else row.ci_high
        text = f"{row.value:.0f}" if row.value >= 100 else f"{row.value:#.3g}".rstrip(".")  # 1.10 beside 1.05
        ax.annotate(text, (x, top), (0, 2), textcoords="offset points", ha="center", va="bottom", fontsize=style.SMALL)


def draw_interval(ax: Axes, x: float, row: Any, **look: Any) -> None:
    if not pd.isna(row.ci_low):
        ends = [[row.value - row.ci_low], [row.ci_high - row.value]]
        ax.errorbar(x, row.value, yerr=ends, color="black", linewidth=0.6, capsize=1.5, capthick=0.6, **look)


def write_upright(ax: Axes, x: float, text: str, colour: str = style.FAILED, size: float = style.SMALL) -> None:
    """Text in the place of a bar."""
    look = {"rotation": 90, "ha": "center", "va": "bottom", "fontsize": size, "color": colour}
    ax.annotate(text, (x, 0), (0, 2), textcoords="offset points", **look)


def write_beside(ax: Axes, text: str, x: float = 1.01) -> None:
    """Text at the right end of a row of panels."""
    ax.text(x, 0.5, text, transform=ax.transAxes, rotation=270, va="center")
