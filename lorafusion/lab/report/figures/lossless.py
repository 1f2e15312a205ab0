"""The figure of losses: curves that lie on each other, and how far they are apart."""

from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from lorafusion.core.schema import UserError
from lorafusion.lab.checks.verdicts import PLAIN
from lorafusion.lab.report import drawing, style
from lorafusion.lab.table.reading import require_numbers

COLUMNS = ("job", "trainer", "step", "loss")
ALONE = "alone"
COLOURS = style.PALETTE[:6]
MARKERS = "ovs^Dx"
ALLOWED = style.PALETTE[5]
LEAST = 1e-17  # what a difference of zero is drawn as


def lossless_data(files: Sequence[str | Path]) -> pd.DataFrame:
    """The losses, from the one file that the check lossless wrote: a column a job, and below each the relative
    difference from the job trained alone."""
    [curves] = files
    data = drawing.read_data(curves)
    lacking = [name for name in COLUMNS if name not in data]
    if lacking or data.empty:
        what = f"column {lacking[0]}" if lacking else "row"
        raise UserError(f"{curves}: no {what}; expected what the check lossless writes")
    require_numbers(data, ("step", "loss"), curves)
    places = list(zip(data["job"], data["step"], strict=True))
    alone = {place: loss for place, trainer, loss in zip(places, data["trainer"], data["loss"], strict=True)
             if trainer == ALONE}  # fmt: skip
    lacking = [place for place in places if place not in alone]
    if lacking:
        job, step = lacking[0]
        raise UserError(f"{curves}: job {job!r}, step {step}: expected a loss with the trainer {ALONE}, found none")
    expected = pd.Series([alone[place] for place in places], dtype=float)
    return data.assign(difference=(data["loss"] - expected).abs() / expected.abs())


@drawing.styled
def draw_lossless(data: pd.DataFrame) -> Figure:
    from lorafusion.lab.checks.comparison import LOSS_TOLERANCE

    jobs, looks = list(dict.fromkeys(data["job"])), _looks(data)
    figure = Figure(figsize=(style.TEXT_WIDTH, 4.0), layout="constrained")
    axes = figure.subplots(2, len(jobs), sharex="col", sharey="row", squeeze=False, height_ratios=(3, 2))
    for losses, differences, job in zip(*axes, jobs, strict=True):
        for name, look in looks.items():
            rows = data[(data["job"] == job) & (data["trainer"] == name)]
            losses.plot(rows["step"], rows["loss"], **look)
            if name != ALONE:
                differences.plot(rows["step"], rows["difference"].clip(lower=LEAST), **look)
        differences.axhline(LOSS_TOLERANCE, color=ALLOWED, linestyle="--", linewidth=0.8)
        differences.set(yscale="log", xlabel="step", ylim=(LEAST / 2, 1e-4))
        losses.set_title(job)
    axes[0][0].set_ylabel("loss of a token")
    axes[1][0].set_ylabel("relative difference\nfrom alone")
    text = {"textcoords": "offset points", "fontsize": style.SMALL, "color": ALLOWED}
    axes[1][0].annotate("allowed", (1, LOSS_TOLERANCE), (0, 2), **text)
    handles = [drawing.line(_label(name), **look) for name, look in looks.items()]
    figure.legend(handles=handles, loc="outside upper center", ncols=4)
    drawing.write_footer(figure, f"tiny model in float64; a difference of zero is drawn at {LEAST:g}")
    return figure


def _looks(data: pd.DataFrame) -> dict[str, dict]:
    """The line or markers of each trainer."""
    trainers = [name for name in dict.fromkeys(data["trainer"]) if name not in (ALONE, PLAIN)]
    looks = {
        ALONE: {"color": "0.75", "linewidth": 5, "solid_capstyle": "round"},
        PLAIN: {"color": "black", "linestyle": "none", "marker": "+", "markersize": 7},
    }
    for name, colour, marker in zip(trainers, COLOURS * 9, MARKERS * 9, strict=False):
        looks[name] = {"color": colour, "linewidth": 0.8, "marker": marker, "markersize": 2.6}
    return looks


def _label(trainer: str) -> str:
    return trainer if trainer in (ALONE, PLAIN) else f"together, {trainer.replace('x', ' x ')}"
