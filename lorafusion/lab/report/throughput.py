"""The throughputs of a measurement table as figures group them: by workload, with q, k and v separate or merged."""

import pandas as pd

from lorafusion.core.config import read_systems
from lorafusion.lab.table.table import MeasurementError

SYSTEM = "lorafusion"  # the one that the others are compared with
WINDOW_TITLES = {"whole": "whole run", "steady": "steady state"}


def ablations() -> set[str]:
    """The systems that have a part of another and are no baselines; a name that is no entry here is a baseline."""
    return {name for name, system in read_systems().items() if system.ablation}


def merged_qkv(rows: pd.DataFrame) -> pd.Series:
    """Are the rows of cells with one adapter for q, k and v?"""
    return rows["merged_qkv"].fillna(False).astype(bool)


def group_names(rows: pd.DataFrame) -> pd.Series:
    """The names of groups of cells: workloads, with the batch size where `rows` has several for one."""
    several = rows.groupby("workload")["global_batch"].transform("nunique") > 1
    batches = rows["workload"] + ", batch " + rows["global_batch"].astype("string")
    return rows["workload"].where(~several, batches)


def require_one_cell_a_place(rows: pd.DataFrame, place: list[str]) -> None:
    """Raise `MeasurementError`, naming both cells, where two rows agree in all columns of `place`."""
    twice = rows[rows.duplicated(place, keep=False)]
    if not twice.empty:
        same = twice[(twice[place] == twice[place].iloc[0]).all(axis=1)]
        names = " and ".join(repr(cell) for cell in same["cell"][:2])
        raise MeasurementError(f"one bar for two numbers: throughput of {names}; draw them from separate tables")


def device_count(count: int, cpu: bool) -> str:
    name = ("process" if count == 1 else "processes") if cpu else ("GPU" if count == 1 else "GPUs")
    return f"{count} {name}"
