"""Dropout masks as a pure function, by the counter-based generator Philox4x32 (Salmon et al., SC'11).

A mask element depends on the adapter's seed, the layer, the module, the token's position in its adapter's own stream
and the column, and on nothing else: the same whatever the microbatch, the neighbours, the tile size, the recomputation
or the machine.

Layout, which every kernel must reproduce: one call of Philox4x32-7 serves 8 columns of a token. Its key is the 64-bit
mask key, its counter (column // 8, position low 32 bits, position high 32 bits, 0). The four 32-bit words of the result
make eight 16-bit lanes, lane 2k the low half of word k and lane 2k+1 its high half; column c takes lane c mod 8 and is
dropped where the lane is below round(p * 65536). Seven rounds pass BigCrush; p is met within 2^-17.
"""

from __future__ import annotations

import hashlib

import torch

ROUNDS = 7
COLUMNS_PER_CALL = 8
LANE_BITS = 16
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_MASK32 = 0xFFFFFFFF


def mask_key(seed: int, layer: int, module: str) -> int:
    """The 64-bit Philox key of one linear of one adapter, in [0, 2^64); the same on any platform."""
    digest = hashlib.blake2b(f"{seed}/{layer}/{module}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def drop_threshold(p: float) -> int:
    """The 16-bit lanes below which an element is dropped."""
    if not 0 <= p < 1:
        raise ValueError(f"dropout: expected a probability in [0, 1), found {p}")
    return round(p * (1 << LANE_BITS))


def check_key(key: int) -> None:
    """A wider or negative key would spill out of its two words, and no kernel could draw the same mask."""
    if not 0 <= key < 1 << 64:
        raise ValueError(f"key: expected an integer in [0, 2^64), found {key}")


def keep_mask(key: int, positions: torch.Tensor, columns: int, p: float) -> torch.Tensor:
    """Which elements dropout keeps: bool [M, columns].

    key: from `mask_key`. positions: int64 [M], each token's place in its adapter's stream; a negative one counts modulo
    2^64, as in a kernel's unsigned words. p in [0, 1). Raises ValueError for any other key, positions, columns or p.
    """
    check_key(key)
    if positions.dtype != torch.int64 or positions.dim() != 1:
        raise ValueError(f"positions: expected int64 [M], found {positions.dtype} {tuple(positions.shape)}")
    if columns < 0:
        raise ValueError(f"columns: expected a count of columns, found {columns}")
    threshold = drop_threshold(p)
    calls = -(-columns // COLUMNS_PER_CALL)
    group = torch.arange(calls, device=positions.device)[None, :]
    low, high = positions[:, None] & _MASK32, (positions[:, None] >> 32) & _MASK32
    words = philox4x32((group, low, high, torch.zeros_like(low)), (key & _MASK32, key >> 32))
    # Compared before they are stacked: a bool takes an eighth of the memory of a lane.
    lanes = [half >= threshold for word in words for half in (word & 0xFFFF, word >> 16)]
    return torch.stack(lanes, dim=-1).flatten(1)[:, :columns]


def philox4x32(
    counter: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor],
    key: tuple[int, int],
    rounds: int = ROUNDS,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Philox4x32. Words are int64 tensors with values in [0, 2^32), broadcast against each other."""
    c0, c1, c2, c3 = torch.broadcast_tensors(*counter)
    k0, k1 = key
    for _ in range(rounds):
        high0, low0 = _multiply(_MULTIPLIERS[0], c0)
        high1, low1 = _multiply(_MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _MASK32, (k1 + _WEYL[1]) & _MASK32
    return c0, c1, c2, c3


def _multiply(a: int, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """High and low words of a 32 x 32 bit product.

    The product may exceed int64's 63 bits; it then wraps modulo 2^64, which keeps every bit, and the arithmetic shift's
    copies of the sign are masked away.
    """
    product = b * a
    return (product >> 32) & _MASK32, product & _MASK32
