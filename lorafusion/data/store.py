"""The tokens of a job on disk: one safetensors file, memory-mapped, of which a worker reads what it trains.

ids int32 [total] holds all samples end to end; sample i is ids[offsets[i]:offsets[i + 1]] and learns from
first_labels[i] on; offsets int64 [n + 1], first_labels int32 [n]. A sample's id is its row. The rows of evaluation data
of a job's own come after the training rows. What else is to be known of the file stands in its header, so that it can
never be about another file.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from pydantic import Field, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from lorafusion.core.files import whole
from lorafusion.core.schema import Config, UserError
from lorafusion.core.workload import Job, Sample
from lorafusion.data.blocks import SYNTHETIC
from lorafusion.data.tokens import SyntheticTokens, Tokens, TokenSource

if TYPE_CHECKING:
    from lorafusion.data.text import Encoded

NOTES = "lorafusion"
TENSORS = {"ids": "I32", "offsets": "I64", "first_labels": "I32"}


class StoreNotes(Config):
    """What the header of a store says of it."""

    version: Literal[2] = 2
    fingerprint: str = Field(description="changes with everything that the tokens depend on")
    training: int = Field(ge=1, description="rows before those of evaluation data")
    largest_id: int = Field(ge=0)
    counts: tuple[str, ...] = Field(description="what became of the samples of each data block, for the user")
    content: str = Field(default="", description="hash of the tensors and of the other notes")

    def hash_of(self, tensors: Mapping[str, np.ndarray]) -> str:
        """What `content` must be with these tensors."""
        digest = hashlib.sha256(self.model_dump_json(exclude={"content"}).encode())
        for name in TENSORS:
            digest.update(np.ascontiguousarray(tensors[name]))
        return digest.hexdigest()


def store_path(folder: Path, name: str) -> Path:
    return folder / f"{name}.safetensors"


def stored_dataset(name: str, fingerprint: str) -> str:
    """The dataset of a job whose tokens are in a store of this fingerprint, so that a workload tells other tokens of
    the same lengths apart."""
    return f"{name}@{fingerprint}"


class StoreWriter:
    """Collects samples in memory, 4 bytes a token, and writes them in one step."""

    def __init__(self) -> None:
        self._ids, self._lengths, self._first_labels = array("i"), array("q"), array("i")

    def __len__(self) -> int:
        return len(self._lengths)

    def extend(self, samples: Iterable[Encoded]) -> None:
        for ids, first_label in samples:
            self._ids.extend(ids)
            self._lengths.append(len(ids))
            self._first_labels.append(first_label)

    def write(self, path: Path, *, fingerprint: str, training: int, counts: tuple[str, ...]) -> None:
        """The file, whole or not at all, its folder made. At least one sample must have been collected."""
        tensors = {
            "ids": np.asarray(self._ids, dtype=np.int32),
            "offsets": np.cumsum([0, *self._lengths], dtype=np.int64),
            "first_labels": np.asarray(self._first_labels, dtype=np.int32),
        }
        largest = int(tensors["ids"].max())
        notes = StoreNotes(fingerprint=fingerprint, training=training, largest_id=largest, counts=counts)
        notes = notes.model_copy(update={"content": notes.hash_of(tensors)})
        with whole(path) as partial:
            partial.write_bytes(save(tensors, metadata={NOTES: notes.model_dump_json()}))


class StoreFile:
    """An open store. Raises `UserError` for a file that is missing, not a token store, or damaged."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            file = safe_open(path, framework="pt")
        except FileNotFoundError:
            raise UserError(f"{path}: no such token store; prepare the run again") from None
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"{path}: not a whole safetensors file ({error}); delete it, prepare the run again"
            ) from None
        header = file.metadata() or {}
        if NOTES not in header or set(file.keys()) != set(TENSORS):
            raise UserError(f"{path}: a safetensors file, but not a token store")
        try:
            self.notes = StoreNotes.model_validate_json(header[NOTES])
        except ValidationError:
            raise UserError(f"{path}: a token store of another version; prepare the run again") from None
        self._ids = file.get_slice("ids")
        self._offsets, self._first_labels = file.get_tensor("offsets"), file.get_tensor("first_labels")
        if not self._is_sound({name: file.get_slice(name).get_dtype() for name in TENSORS}):
            raise UserError(
                f"{path}: a damaged token store, its rows do not fit its ids; delete it, prepare the run again"
            )

    def require_content(self) -> None:
        """Read the whole file and raise `UserError` unless it is as it was written."""
        tensors = {"ids": self._ids[:], "offsets": self._offsets, "first_labels": self._first_labels}
        if self.notes.hash_of({name: tensor.numpy() for name, tensor in tensors.items()}) != self.notes.content:
            raise UserError(f"{self.path}: a damaged token store, its hash is not its own; prepare the run again")

    def __len__(self) -> int:
        return len(self._first_labels)

    @property
    def lengths(self) -> list[int]:
        """Tokens of each row."""
        return self._offsets.diff().tolist()

    def first_label(self, row: int) -> int:
        return int(self._first_labels[self._known(row)])

    def tokens(self, row: int) -> Tokens:
        begin, end = self._offsets[self._known(row) : row + 2].tolist()
        return Tokens(self._ids[begin:end].to(torch.int64), self.first_label(row))

    def _known(self, row: int) -> int:
        if not 0 <= row < len(self):
            raise UserError(f"{self.path}: no sample {row}, the store has {len(self)}; prepare the run again")
        return row

    def _is_sound(self, dtypes: dict[str, str]) -> bool:
        offsets, first_labels = self._offsets, self._first_labels
        if dtypes != TENSORS or offsets.dim() != 1 or offsets.shape != (len(first_labels) + 1,):
            return False
        lengths = offsets.diff()
        return bool(
            offsets[0] == 0
            and [int(offsets[-1])] == self._ids.get_shape()
            and (first_labels >= 1).all()
            and (first_labels < lengths).all()
            and self.notes.training <= len(self)
        )


class TokenStore:
    """The token source of jobs whose stores are in a folder, each file opened when it is first asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files: dict[str, StoreFile] = {}

    def tokens(self, job: Job, sample: Sample) -> Tokens:
        return self._file(job).tokens(sample.id)

    def labels(self, job: Job, sample: Sample) -> int:
        return sample.tokens - self._file(job).first_label(sample.id)

    def _file(self, job: Job) -> StoreFile:
        if job.name not in self._files:
            store = StoreFile(store_path(self.folder, job.name))
            if job.dataset.rpartition("@")[2] != store.notes.fingerprint:
                raise UserError(
                    f"{store.path}: holds other tokens ({store.notes.fingerprint}) than job {job.name!r} was planned "
                    f"for ({job.dataset}); prepare the run again"
                )
            self._files[job.name] = store
        return self._files[job.name]


class JobTokens:
    """The token source of any workload of `prepare`: synthetic jobs' tokens are made up, the others' are in a store."""

    def __init__(self, folder: Path, vocab_size: int) -> None:
        self._stored, self._synthetic = TokenStore(folder), SyntheticTokens(vocab_size)

    def tokens(self, job: Job, sample: Sample) -> Tokens:
        return self._source(job).tokens(job, sample)

    def labels(self, job: Job, sample: Sample) -> int:
        return self._source(job).labels(job, sample)

    def _source(self, job: Job) -> TokenStore | SyntheticTokens:
        return self._synthetic if job.dataset.startswith(SYNTHETIC) else self._stored


def token_source(folder: str | None, vocabulary: int) -> TokenSource:
    """The tokens in a folder of stores; without a folder, synthetic ones."""
    return JobTokens(Path(folder), vocabulary) if folder else SyntheticTokens(vocabulary)
