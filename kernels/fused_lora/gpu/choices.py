"""How each kernel is launched, as a pure function of shape, dtype and GPU: tile sizes, warps, stages, and whose GEMM.

A GPU that was tuned has a file of measured choices (`fused_lora/tuned/`); a lookup takes the entry of the same kernel,
width, linears, ranks and dtype whose sizes are nearest. Any other GPU has the defaults below, with the library's GEMM.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

TUNED = Path(__file__).parent.parent / "tuned"
KERNELS = ("masks", "project", "output_pass", "input_pass", "expand_output", "expand_input", "output", "input")
LIBRARY, OWN = "library", "own"


@dataclass(frozen=True)
class Shape:
    """What a choice may depend on.

    tokens: rows. inner: the dimension that a product sums over. columns: of the output, or of a pass's tensor.
    """

    tokens: int
    columns: int
    inner: int = 0
    linears: int = 1
    ranks: int = 16  # columns of s
    bits: int = 16  # of the dtype
    masked: bool = True


@dataclass(frozen=True)
class Target:
    """A GPU: name as torch says it, compute capability, multiprocessors."""

    name: str
    capability: tuple[int, int]
    processors: int

    @property
    def slug(self) -> str:
        """Its name as a file name: NVIDIA H200 -> nvidia-h200."""
        return "-".join("".join(c if c.isalnum() else " " for c in self.name.lower()).split())


def rank_block(max_rank: int, most: int) -> int:
    """Ranks that a kernel handles at a time: a power of two, at least 16 for the matrix units."""
    return min(most, max(16, 1 << (max_rank - 1).bit_length()))


def choose(kernel: str, shape: Shape, target: Target) -> dict[str, Any]:
    """The launch settings of a kernel: measured for the nearest shape on this GPU, else the defaults."""
    default = defaults(kernel, shape, target)
    entries = _entries(target.slug).get(_group(kernel, shape), ())
    if not entries:
        return default
    return default | min(entries, key=lambda entry: _distance(entry[0], shape))[1]


def defaults(kernel: str, shape: Shape, target: Target) -> dict[str, Any]:
    """Settings that run on any GPU: small enough in shared memory and registers for the largest rank block."""
    wide = rank_block(shape.ranks, 128)
    narrow = 1 if shape.bits == 16 else 2  # float32 takes twice the room
    if kernel == "masks":
        return {"rows": 16, "columns": 32, "warps": 4}
    if kernel == "project":
        columns = (128 if wide <= 32 else 64) // narrow
        # Four programs a multiprocessor, for as long as each has a few tiles of columns.
        splits = max(1, min(4 * target.processors * 32 // max(1, shape.tokens), shape.columns // (4 * columns)))
        return {"rows": 32, "columns": columns, "splits": splits, "warps": 4, "stages": 3}
    if kernel == "output_pass":
        columns = max(64, 4096 // wide) if wide > 16 else 256
        return {"chunk": 512, "rows": 64 // narrow, "columns": columns // narrow**2, "warps": 8, "stages": 2}
    if kernel == "input_pass":
        columns = 64 if wide > 32 or narrow > 1 else 128
        return {"chunk": 1024, "rows": 64 // narrow, "columns": columns, "warps": 4, "stages": 3}
    if kernel in ("expand_output", "expand_input"):
        return {"rows": 64, "columns": 128 // narrow, "warps": 4}
    return {"gemm": LIBRARY}


def own_gemm(**settings: Any) -> dict[str, Any]:
    """Settings of the GEMM of `products`, defaults filled in."""
    base = {"gemm": OWN, "rows": 128, "columns": 256, "depth": 64, "stages": 3, "warps": 8}
    return base | {"group": 8, "parts": 1, "specialize": False} | settings


def entry(kernel: str, shape: Shape, choice: dict[str, Any], **measured: Any) -> dict[str, Any]:
    """An entry of a tuned file."""
    return {"kernel": kernel, "shape": asdict(shape), "choice": choice, **measured}


def _group(kernel: str, shape: Shape) -> tuple:
    """Shapes that may stand for each other."""
    return kernel, shape.linears, rank_block(shape.ranks, 128), shape.bits, shape.masked


def _distance(first: Shape, second: Shape) -> float:
    """How unlike two shapes are, by the ratios of their sizes. The inner dimension and the columns decide first."""
    pairs = ((first.columns, second.columns, 4), (first.inner, second.inner, 4), (first.tokens, second.tokens, 1))
    return sum(weight * abs(math.log((a + 1) / (b + 1))) for a, b, weight in pairs)


@lru_cache(maxsize=8)
def _entries(slug: str) -> dict[tuple, list[tuple[Shape, dict[str, Any]]]]:
    """A GPU's tuned file by group; empty where there is none."""
    path = TUNED / f"{slug}.json"
    groups: dict[tuple, list[tuple[Shape, dict[str, Any]]]] = {}
    if path.is_file():
        for item in json.loads(path.read_text())["entries"]:
            shape = Shape(**item["shape"])
            groups.setdefault(_group(item["kernel"], shape), []).append((shape, item["choice"]))
    return groups
