"""What a GPU does with each system, as PDF, PNG and the CSV that it is drawn from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from lorafusion.lab.report import style
from lorafusion.lab.report.training_figures import CLASSES, draw_stacks, read_profiles
from lorafusion.lab.tuning import PROFILE_COLUMNS

BAR = ["suite", "workload", "qkv", "system", "git_sha"]


def profile_data(profiles: Sequence[str | Path]) -> pd.DataFrame:
    """The rows of all files in drawing order; of a system that is in several their median."""
    medians = read_profiles(profiles, PROFILE_COLUMNS, BAR, "lorafusion profile")
    classes = list(CLASSES)
    medians = medians.sort_values(
        ["workload", "system", "qkv", "class"],
        key=lambda column: column.map(classes.index) if column.name == "class" else style.rank(column),
    )
    return medians.assign(variant=style.variants(medians)).reset_index(drop=True)


def draw(data: pd.DataFrame) -> Figure:
    return draw_stacks(data, "workload", "ms for 1000 tokens", "What the GPU does with each system")
