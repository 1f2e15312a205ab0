"""What a training's outcome is a function of, worked out again from docs/reference/measurements.md.

For `plain_training` alone. What trains draws its masks, batches, tokens and first weights with other code; were
they shared, a fault in them would be on both sides of every comparison and seen by none. So nothing here is imported
from the code that it judges, and of a job only plain fields are read: a test holds this file to that.
"""

import hashlib
import math
from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch

from lorafusion.core.workload import Job, Sample

WORDS = 8  # of a synthetic language
COLUMNS = 32  # of a token that share a word of the mask
U32 = np.uint64(0xFFFFFFFF)


class Placed(NamedTuple):
    """A sample of a job's stream, and how many tokens of the stream come before it."""

    sample: Sample
    offset: int


class LabelledText(NamedTuple):
    """Ids int64 [n] of a sample, of which those from `first_label` on are learnt."""

    ids: torch.Tensor
    first_label: int


def scaling(job: Job) -> float:
    """alpha / rank; for rank-stabilised LoRA alpha / the root of rank."""
    return job.alpha / (job.rank**0.5 if job.rslora else job.rank)


def global_batches(job: Job) -> list[list[Placed]]:
    """The samples of each optimizer step: epoch after epoch in the job's order, `global_batch_size` at a time, the last
    of an epoch with what is left; no more than `steps` of them. Those before `start` are among them."""
    batches, offset = [], 0
    for _ in range(job.epochs):
        for index, sample in enumerate(job.samples):
            if index % job.global_batch_size == 0:
                batches.append([])
            batches[-1].append(Placed(sample, offset))
            offset += sample.tokens
    return batches[: job.steps]


def synthetic_text(job: Job, sample: Sample, vocabulary: int) -> LabelledText:
    """A language of WORDS words in a fixed cycle, drawn by the job's seed; a sample enters it where its id says. Of the
    job's share of its tokens nothing is learnt, rounded down, nor of the first; the last is always learnt."""
    cycle = torch.randperm(vocabulary, generator=_generator(f"({job.seed},)"))[:WORDS].tolist()
    count = len(cycle)
    first = int(torch.randint(count, (), generator=_generator(f"({job.seed}, {sample.id})")))
    ids = torch.tensor([cycle[(first + place) % count] for place in range(sample.tokens)])
    prompt = math.floor(job.prompt * sample.tokens)
    return LabelledText(ids, sorted((1, prompt, sample.tokens - 1))[1])


def base_weight(name: str, shape: torch.Size, std: float, seed: int, dtype: torch.dtype, device: torch.device):
    """A random weight of the base model: ones for a norm, zeros for a bias, else a normal distribution."""
    if name.endswith("norm.weight"):
        return torch.ones(shape, dtype=dtype, device=device)
    if name.endswith(".bias"):
        return torch.zeros(shape, dtype=dtype, device=device)
    generator = _generator(f"{seed}/{name}", device)
    return torch.empty(shape, dtype=dtype, device=device).normal_(0.0, std, generator=generator)


def first_a(job: Job, linear: str, columns: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A [rank, columns] of a linear of the model, by its whole name: uniform up to one over the root of the columns,
    in float32, and then rounded to the dtype."""
    limit = 1.0 / math.sqrt(columns)
    generator = _generator(f"{job.seed}/{linear}.lora_A", device)
    drawn = torch.empty(job.rank, columns, dtype=torch.float32, device=device)
    return drawn.uniform_(-limit, limit, generator=generator).to(dtype)


def keep_mask(job: Job, layer: int, module: str, offset: int, tokens: int, columns: int) -> torch.Tensor:
    """Which elements of x [tokens, columns] the job's dropout keeps before a linear, the first token being `offset`
    tokens into the job's stream: bool, on the CPU."""
    digest = hashlib.blake2b(f"{job.seed}/{layer}/{module}".encode(), digest_size=8).digest()
    return keep_mask_of_key(int.from_bytes(digest, "little"), job.dropout, offset, tokens, columns)


def keep_mask_of_key(key: int, dropout: float, offset: int, tokens: int, columns: int) -> torch.Tensor:
    """`keep_mask` of the 64-bit key of a linear of a job."""
    threshold = min(round(dropout * 65536), 65535)
    words = _keep_words(key, offset, tokens, -(-columns // COLUMNS), threshold)
    bits = np.unpackbits(
        words.astype("<u4").view(np.uint8).reshape(tokens, 4 * words.shape[1]), axis=1, bitorder="little"
    )
    return torch.from_numpy(bits[:, :columns].astype(bool))


@lru_cache(maxsize=4096)
def _keep_words(key: int, offset: int, tokens: int, words: int, threshold: int) -> np.ndarray:
    """uint32 [tokens, words], a bit for each element: kept where a number of 16 bits is not below the threshold. Bit i
    of the j-th of 16 random words is bit j of the number of column i."""
    halves = key & 0xFFFFFFFF, key >> 32
    place = offset + np.arange(tokens, dtype=np.uint64)[:, None]
    below = np.zeros((tokens, words), np.uint64)
    equal = np.full((tokens, words), U32)
    calls = 4 * np.arange(words, dtype=np.uint64)
    random = [word for call in range(4) for word in philox(place, calls + np.uint64(call), halves)]
    for bit in reversed(range(16)):  # the highest bit that differs from the threshold's decides
        if threshold >> bit & 1:
            below |= equal & ~random[bit]
            equal &= random[bit]
        else:
            equal &= ~random[bit]
    return (~below & U32).astype(np.uint32)


def philox(place: np.ndarray, call: np.ndarray, key: tuple[int, int]) -> Iterator[np.ndarray]:
    """Philox4x32 with seven rounds, of the counter (call, place's low word, place's high word, 0)."""
    a, b, c, d = np.broadcast_arrays(call, place & U32, place >> np.uint64(32), np.uint64(0))
    first, second = key
    for index in range(7):
        product_a, product_c = a * np.uint64(0xD2511F53), c * np.uint64(0xCD9E8D57)
        k, m = ((first + index * 0x9E3779B9) & 0xFFFFFFFF), ((second + index * 0xBB67AE85) & 0xFFFFFFFF)
        a, b = (product_c >> np.uint64(32)) ^ b ^ np.uint64(k), product_c & U32
        c, d = (product_a >> np.uint64(32)) ^ d ^ np.uint64(m), product_a & U32
    return iter((a, b, c, d))


def _generator(name: str, device: torch.device | None = None) -> torch.Generator:
    """torch's generator, seeded with the first seven bytes of a name's BLAKE2b, the lowest first."""
    digest = hashlib.blake2b(name.encode(), digest_size=7).digest()
    return torch.Generator(device or torch.device("cpu")).manual_seed(int.from_bytes(digest, "little"))
