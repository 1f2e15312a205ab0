"""The tokens of a sample, fetched when a run needs them."""

import hashlib
from typing import NamedTuple, Protocol

import torch

from lorafusion.core.workload import Job, Sample


class Tokens(NamedTuple):
    """What a sample holds: ids int64 [n] on the CPU, of which those from `first_label` (at least 1) on are learnt."""

    ids: torch.Tensor
    first_label: int


class TokenSource(Protocol):
    """Where a job's tokens come from; samples are told apart by their ids."""

    def tokens(self, job: Job, sample: Sample) -> Tokens:
        """The tokens of one of the job's samples, to train or to evaluate on."""

    def labels(self, job: Job, sample: Sample) -> int:
        """How many of its tokens are learnt, at least 1, without fetching them."""


class SyntheticTokens:
    """A toy language a job: a few words of the vocabulary in a fixed cycle, entered anywhere.

    Lengths are the workload's; content is a pure function of the job's seed and the sample's id. A model can learn
    it (first which words occur, then what follows what), so a run on it can tell training from mere computing.
    """

    def __init__(self, vocab_size: int, words: int = 8) -> None:
        self.vocab_size = vocab_size
        self.words = min(words, vocab_size)
        self._cycles: dict[int, torch.Tensor] = {}

    def tokens(self, job: Job, sample: Sample) -> Tokens:
        cycle = self._cycle(job.seed)
        start = int(torch.randint(self.words, (), generator=_generator(job.seed, sample.id)))
        return Tokens(cycle[(start + torch.arange(sample.tokens)) % self.words], job.first_label(sample))

    def labels(self, job: Job, sample: Sample) -> int:
        return sample.tokens - job.first_label(sample)

    def _cycle(self, seed: int) -> torch.Tensor:
        """A language's words, kept: with Llama's vocabulary they take the host half a millisecond, at each sample."""
        if seed not in self._cycles:
            # A copy: the part alone would hold the whole.
            self._cycles[seed] = torch.randperm(self.vocab_size, generator=_generator(seed))[: self.words].clone()
        return self._cycles[seed]


def _generator(*parts: int) -> torch.Generator:
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=7).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))
