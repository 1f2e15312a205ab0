"""Tables in files that anything may have happened to: what the libraries say that parse them becomes a `UserError`."""

import io
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pandas as pd
from pyarrow import ArrowException

from lorafusion.core.files import read_bytes
from lorafusion.core.schema import UserError, shown


def read_frame(path: str | Path, dtype: str | None = None) -> pd.DataFrame:
    """The table in a CSV, of which only an empty field is empty ("nan" is a status), or, by its suffix, in a Parquet
    file. dtype: of all columns of a CSV."""
    content = read_bytes(path, "table")
    form = "Parquet" if Path(path).suffix == ".parquet" else "CSV"
    try:
        if form == "Parquet":
            return pd.read_parquet(io.BytesIO(content), engine="pyarrow")
        if b"\0" in content:
            raise ValueError("a byte of it is zero")
        table = pd.read_csv(io.BytesIO(content), dtype=dtype, keep_default_na=False, na_values=[""])
    except (ArrowException, ValueError, TypeError, KeyError, OSError) as error:
        raise UserError(f"{path}: expected a whole table in {form} ({error})") from None
    twice = [name for name in table.columns if f"{name}.1" in table.columns]  # pandas' name for the second
    if twice:
        raise UserError(f"{path}: expected each column once, found {shown(twice[0])} twice")
    if not isinstance(table.index, pd.RangeIndex):
        raise UserError(f"{path}: expected as many fields in a row as names in the first line, found more")
    return table


def require_numbers(table: pd.DataFrame, names: Iterable[str], source: str | Path) -> None:
    """Raise `UserError` unless these columns have a finite number in each row."""
    for name in names:
        values = pd.to_numeric(table[name], errors="coerce").to_numpy(float, na_value=np.nan)
        if not np.isfinite(values).all():
            wrong = table[name][~np.isfinite(values)].iloc[0]
            raise UserError(f"{source}: {name}: expected a number in each row, found {shown(wrong)}")
