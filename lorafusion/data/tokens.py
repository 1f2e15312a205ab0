"""The tokens of a sample, fetched when a run needs them."""

from __future__ import annotations

import hashlib
from typing import Protocol

import torch

from lorafusion.workload import Job


class TokenSource(Protocol):
    """Where a job's tokens come from."""

    def tokens(self, job: Job, position: int) -> torch.Tensor:
        """Token ids int64 [n] on the CPU of the sample at a position of the job's stream."""


class SyntheticTokens:
    """A toy language a job: a few words of the vocabulary in a fixed cycle, entered anywhere.

    Lengths are the workload's; content is a pure function of the job's seed and the sample's id. A model can learn
    it (first which words occur, then what follows what), so a run on it can tell training from mere computing.
    """

    def __init__(self, vocab_size: int, words: int = 8) -> None:
        self.vocab_size = vocab_size
        self.words = min(words, vocab_size)

    def tokens(self, job: Job, position: int) -> torch.Tensor:
        sample = job.sample_at(position)
        cycle = torch.randperm(self.vocab_size, generator=_generator(job.seed))[: self.words]
        start = int(torch.randint(self.words, (), generator=_generator(job.seed, sample.id)))
        return cycle[(start + torch.arange(sample.tokens)) % self.words]


def _generator(*parts: int) -> torch.Generator:
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=7).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))
