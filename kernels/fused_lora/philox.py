"""Dropout masks as a pure function, by the counter-based generator Philox4x32 (Salmon et al., SC'11).

A mask element depends on the adapter's seed, the layer, the module, the token's position in its adapter's own stream
and the column, and on nothing else: the same whatever the microbatch, the neighbours, the tile size, the recomputation
or the machine.

Layout, which every kernel must reproduce. 32 columns of a token share one word of mask bits: column c has bit c mod 32
of word c // 32, set where the element is kept. A column is kept where a uniform 16-bit number u is not below the
threshold round(p * 65536); p is so met within 2^-17. The numbers of 32 columns lie bit-sliced in 16 random words: bit i
of word j is bit j of column i's u. Comparing them takes one bitwise operation a word for all 32 columns together, where
numbers side by side would take some three instructions a column: half of the time of the whole pass.

The 16 words come from four calls of Philox4x32-7 (seven rounds pass BigCrush). The key is the 64-bit mask key, the
counter of call q of word w is (4 w + q, position low 32 bits, position high 32 bits, 0), and its results are the words
4 q to 4 q + 3.
"""

import hashlib

import torch

ROUNDS = 7
BITS = 16  # of the number that is compared with p
WORD = 32  # columns that share a word
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
_MASK32 = 0xFFFFFFFF


def mask_key(seed: int, layer: int, module: str) -> int:
    """The 64-bit Philox key of one linear of one adapter, in [0, 2^64); the same on any platform."""
    digest = hashlib.blake2b(f"{seed}/{layer}/{module}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def drop_threshold(p: float) -> int:
    """The 16-bit numbers below which an element is dropped."""
    if not 0 <= p < 1:
        raise ValueError(f"dropout: expected a probability in [0, 1), found {p}")
    return min(round(p * (1 << BITS)), (1 << BITS) - 1)  # 2^16 would be no 16-bit number, and drop nothing


def check_key(key: int) -> None:
    """A wider or negative key would spill out of its two words, and no kernel could draw the same mask."""
    if not 0 <= key < 1 << 64:
        raise ValueError(f"key: expected an integer in [0, 2^64), found {key}")


def word_count(columns: int) -> int:
    """Words of mask bits that a token's columns take."""
    return -(-columns // WORD)


def keep_mask(key: int, positions: torch.Tensor, columns: int, p: float) -> torch.Tensor:
    """Which elements dropout keeps: bool [M, columns].

    key: from `mask_key`. positions: int64 [M], each token's place in its adapter's stream; a negative one counts modulo
    2^64, as in a kernel's unsigned words. p in [0, 1). Raises ValueError for any other key, positions, columns or p.
    """
    return unpack(keep_words(key, positions, columns, p), columns)


def unpack(words: torch.Tensor, columns: int) -> torch.Tensor:
    """Words of mask bits, int32 or int64 [M, word_count(columns)], as bool [M, columns]."""
    shifts = torch.arange(WORD, device=words.device)
    return ((words[..., None] >> shifts) & 1).bool().flatten(-2)[..., :columns]


def keep_words(key: int, positions: torch.Tensor, columns: int, p: float) -> torch.Tensor:
    """The mask of `keep_mask` as words, int64 [M, word_count(columns)] with values in [0, 2^32)."""
    return words_of_threshold(key, positions, columns, drop_threshold(p))


def words_of_threshold(key: int, positions: torch.Tensor, columns: int, threshold: int) -> torch.Tensor:
    """`keep_words` for a threshold from `drop_threshold`."""
    check_key(key)
    if positions.dtype != torch.int64 or positions.dim() != 1:
        raise ValueError(f"positions: expected int64 [M], found {positions.dtype} {tuple(positions.shape)}")
    if columns < 0:
        raise ValueError(f"columns: expected a count of columns, found {columns}")
    first_call = torch.arange(word_count(columns), device=positions.device)[None, :] * 4
    low, high = positions[:, None] & _MASK32, (positions[:, None] >> 32) & _MASK32
    keep = torch.full((len(positions), word_count(columns)), _MASK32, device=positions.device)
    for call in range(BITS // 4):
        counter = (first_call + call, low, high, torch.zeros_like(low))
        for word, random in enumerate(philox4x32(counter, (key & _MASK32, key >> 32))):
            # From the lowest bit of u to the highest: the bit decides unless it equals the threshold's.
            keep = keep & random if threshold >> (4 * call + word) & 1 else keep | random
    return keep


def philox4x32(
    counter: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor],
    key: tuple[int, int],
    rounds: int = ROUNDS,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Philox4x32. Words are int64 tensors with values in [0, 2^32), broadcast against each other."""
    c0, c1, c2, c3 = torch.broadcast_tensors(*counter)
    k0, k1 = key
    for _ in range(rounds):
        high0, low0 = _multiply(MULTIPLIERS[0], c0)
        high1, low1 = _multiply(MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + WEYL[0]) & _MASK32, (k1 + WEYL[1]) & _MASK32
    return c0, c1, c2, c3


def _multiply(a: int, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """High and low words of a 32 x 32 bit product.

    The product may exceed int64's 63 bits; it then wraps modulo 2^64, which keeps every bit, and the arithmetic shift's
    copies of the sign are masked away.
    """
    product = b * a
    return (product >> 32) & _MASK32, product & _MASK32
