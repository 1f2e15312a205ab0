"""How each kernel is launched, as a pure function of shape, dtype and GPU: tile sizes, warps, stages, and whose GEMM.

A GPU that was tuned has a file of measured choices (`fused_lora/tuned/`); a lookup takes the entry of the same kernel,
linears, ranks and dtype whose sizes are nearest, and of its numbers of tokens the next that is not below. Any other GPU
has the defaults below: on sm_90 our GEMM, else the library's.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from fused_lora.gpu.sm90.projection import PROJECT_COLUMNS, PROJECT_ROWS
from fused_lora.gpu.sm90.ring import TILE_COLUMNS, TILE_ROWS

TUNED = Path(__file__).parents[2] / "tuned"
MOST_RANKS = {1: 128, 2: 64, 3: 32}  # that a pass over x has accumulators for, by the number of linears
GEMMS = ("output", "input")  # the products with a base weight, by their results
OF_ANY_RANK = (*GEMMS, "masks")  # kernels whose choice is no matter of ranks
LIBRARY, OWN = "library", "own"
OWN_CAPABILITY = (9, 0)  # that the kernels in Gluon are written for
PROJECT_SHARED = 216 * 1024  # bytes of shared memory for its steps on their way


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
    by_sizes = _entries(target.slug).get(_group(kernel, shape))
    if not by_sizes:
        return default
    by_tokens = by_sizes[min(by_sizes, key=lambda sizes: _distance(sizes, shape))]
    return default | by_tokens[_tuned_tokens(by_tokens, shape.tokens)]


def defaults(kernel: str, shape: Shape, target: Target) -> dict[str, Any]:
    """Settings that run on any GPU: small enough in shared memory and registers for the largest rank block."""
    wide = rank_block(shape.ranks, 128)
    narrow = 1 if shape.bits == 16 else 2  # float32 takes twice the room
    # Before sm_90 there is no copy engine: tiles pass through registers, and larger ones spill.
    less = 2 if target.capability[0] == 8 else 1
    if kernel == "masks":
        return {"rows": 16, "columns": 32, "warps": 4}
    if kernel == "mask_and_project":  # about a program for each multiprocessor
        tiles = max(1, -(-shape.tokens // PROJECT_ROWS))
        return {"splits": max(1, min(target.processors // tiles, shape.columns // (4 * PROJECT_COLUMNS)))}
    if kernel == "project":
        columns = max(32, (128 if wide <= 32 else 64) // narrow // less)
        # Four programs a multiprocessor, for as long as each has a few tiles of columns.
        splits = max(1, min(4 * target.processors * 32 // max(1, shape.tokens), shape.columns // (4 * columns)))
        return {"rows": 32, "columns": columns, "splits": splits, "warps": 4, "stages": 3}
    if kernel == "output_pass":
        columns = max(64, 4096 // wide) if wide > 16 else 256
        warps = 4 if target.capability[0] == 10 and wide == 64 and narrow == 1 else 8  # there, eight spill
        rows = 64 // narrow // less
        return {"chunk": 512, "rows": rows, "columns": columns // narrow**2, "warps": warps, "stages": 2}
    if kernel == "input_pass":
        columns = 64 if wide > 32 or narrow > 1 else 128
        return {"chunk": 1024, "rows": 64 // narrow // less, "columns": columns, "warps": 4, "stages": 3}
    if kernel in ("expand_output", "expand_input"):
        return {"rows": 64 // less, "columns": 128 // narrow, "warps": 4}
    # Measured on the H200 alone, but to write the output once less helps any GPU of its kind.
    return own_gemm() if has_gluon_kernels(shape.bits, target) else {"gemm": LIBRARY}


def draws_while_projecting(linears: int, max_rank: int, bits: int, target: Target) -> bool:
    """Does one pass draw the masks of so many linears and project? Not where its programs hold only a part of the
    ranks: each would draw all masks again."""
    return has_gluon_kernels(bits, target) and max_rank <= MOST_RANKS[linears]


def has_gluon_kernels(bits: int, target: Target) -> bool:
    """May the kernels in Gluon be launched, for a dtype of so many bits?"""
    return target.capability == OWN_CAPABILITY and bits == 16


def own_gemm(**settings: Any) -> dict[str, Any]:
    """Settings of our GEMM, defaults filled in. group: rows of tiles that go through the columns together. slices: of
    a tile that is stored. slots, stores: for steps on their way in, and slices on their way out."""
    return {"gemm": OWN, "group": 8, "slices": 2, "slots": 4, "stores": 1} | settings


def project_registers(linears: int, ranks: int) -> tuple[int, int]:
    """Of a thread of mask_and_project, were all alike, and of one that draws.

    The eight warps that multiply and draw and the loader's, which counts as four, share them. With 80 two programs fit
    on a multiprocessor, but not the sums of three linears or of more than 64 ranks; those of two linears with 32 ranks
    only if the warps that draw have fewer."""
    if linears == 3 or linears * ranks > 64:
        return 112, 96
    return 80, 72 if linears * ranks == 64 and linears == 2 else 96


def project_slots(programs: int, linears: int, ranks: int, target: Target) -> int:
    """Steps of mask_and_project that are on their way. A program takes all shared memory, so that no second one begins
    on its multiprocessor while others are free; half of it where there are more programs than multiprocessors, and the
    registers of two."""
    two = programs > target.processors and project_registers(linears, ranks)[0] == 80
    return PROJECT_SHARED // (1 + two) // (2 * PROJECT_COLUMNS * (PROJECT_ROWS + linears * ranks))


def gemm_programs(tokens: int, columns: int, target: Target) -> int:
    """Programs of our GEMM: as few as finish its tiles in the same number of turns. The multiprocessors that are left
    have time for other kernels."""
    tiles = -(-tokens // TILE_ROWS) * -(-columns // TILE_COLUMNS)
    return -(-tiles // -(-tiles // target.processors))


def entry(kernel: str, shape: Shape, choice: dict[str, Any], **measured: Any) -> dict[str, Any]:
    """An entry of a tuned file."""
    return {"kernel": kernel, "shape": asdict(shape), "choice": choice, **measured}


def _group(kernel: str, shape: Shape) -> tuple:
    """Shapes that may stand for each other."""
    return kernel, shape.linears, 0 if kernel in OF_ANY_RANK else rank_block(shape.ranks, 128), shape.bits


def _distance(first: Shape, second: Shape) -> float:
    """How unlike two shapes are but for their tokens, by the ratios of inner dimension and columns. Shapes with and
    without dropout stand for each other where there are no closer ones."""
    pairs = ((first.columns, second.columns), (first.inner, second.inner))
    return sum(_ratio(*pair) for pair in pairs) + 100 * (first.masked != second.masked)


def _ratio(first: int, second: int) -> float:
    return abs(math.log((first + 1) / (second + 1)))


def _tuned_tokens(tuned: Iterable[int], tokens: int) -> int:
    """Of numbers of tokens that were tuned, the next that is not below: its tiles take as many turns. Where that is
    twice as many or more, the nearest."""
    above = [count for count in tuned if tokens <= count < 2 * tokens]
    return min(above) if above else min(tuned, key=lambda count: _ratio(count, tokens))


@lru_cache(maxsize=8)
def _entries(slug: str) -> dict[tuple, dict[Shape, dict[int, dict[str, Any]]]]:
    """A GPU's tuned file by group, shape without tokens, and tokens; empty where there is none."""
    path = TUNED / f"{slug}.json"
    groups: dict[tuple, dict[Shape, dict[int, dict[str, Any]]]] = {}
    if path.is_file():
        for item in json.loads(path.read_text())["entries"]:
            shape = Shape(**item["shape"])
            by_sizes = groups.setdefault(_group(item["kernel"], shape), {})
            by_sizes.setdefault(replace(shape, tokens=0), {})[shape.tokens] = item["choice"]
    return groups
