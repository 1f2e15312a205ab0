"""Files are written whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path


def write(path: Path, text: str) -> None:
    """Write a text file in one step, making its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    with open(partial, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())  # else a power cut may leave an empty file of this name
    partial.replace(path)
