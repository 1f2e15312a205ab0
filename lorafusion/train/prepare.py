"""From a jobs file to what a run needs: the base model, each job's tokens in a store, and the workload.

Tokens are made anew only where something that they depend on has changed; jobs with the same data share them. The order
of the samples and the choice of those to evaluate on are no part of that: they are in the workload.
"""

import hashlib
import logging
import math
import os
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lorafusion.core.config import ModelConfig, read_model
from lorafusion.core.files import write
from lorafusion.core.schema import MOST_EPOCHS, UserError, validated
from lorafusion.core.workload import Job, Sample, Workload, content_hash
from lorafusion.data.blocks import HubData, JsonlData, SyntheticData, TextData
from lorafusion.data.encoder import Encoder, load_encoder
from lorafusion.data.lengths import draw_lengths
from lorafusion.data.store import StoreFile, StoreWriter, store_path, stored_dataset
from lorafusion.data.text import SampleCounts, SampleRule, encode, hub_dataset
from lorafusion.model.description import huggingface_model
from lorafusion.train.config import TrainConfig, TrainJob
from lorafusion.train.fit import fitted, max_length_of, steps_of, warm_up, where

LOGGER = logging.getLogger(__name__)
VERSION = 2  # of what is made of a row: another one makes other tokens of the same text
StoredData = JsonlData | HubData | TextData
DATA = "data"  # the folder of the stores, beside workload.json


def base_model(config: TrainConfig) -> ModelConfig:
    """The base model of a jobs file: of configs/models, or of a Hugging Face folder or repository."""
    if config.revision and Path(config.model).is_dir():
        raise UserError(
            f"{config.path}: revision: the model is a local folder, which has none (found {config.revision!r})"
        )
    if config.is_described:
        model = read_model(config.model)
        if config.revision:
            model = model.model_copy(update={"revision": config.revision})
    else:
        model = huggingface_model(config.model, config.revision)
    return model.model_copy(update={"weights": config.weights}) if config.weights else model


def prepare(config: TrainConfig, model: ModelConfig, folder: Path) -> Workload:
    """The workload of a jobs file; model: its `base_model`. Writes `folder`/workload.json and, for each job that is not
    synthetic, a token store in `folder`/data; says on standard error what became of the samples of each data block."""
    config = fitted(config, model)
    stores = _Stores(config, model, folder / DATA)
    jobs = []
    for job in config.jobs:
        longest = max_length_of(config, job, model)
        rule = SampleRule(longest, job.too_long, job.learn_prompt, job.add_bos, job.add_eos)
        rows = _synthetic_rows(config, job, rule) if job.is_synthetic else stores.rows(job, rule)
        jobs.append(_job(config, job, rows))
    workload = Workload(name=config.path.stem, jobs=tuple(jobs))
    write(folder / "workload.json", workload.to_json())
    return workload


class Rows(NamedTuple):
    """A job's samples in the order of its data, and those of evaluation data of its own; what the dataset is called."""

    dataset: str
    training: list[Sample]
    evaluation: list[Sample]


class _Stores:
    """The token stores of a run's jobs."""

    def __init__(self, config: TrainConfig, model: ModelConfig, folder: Path) -> None:
        self.config, self.model, self.folder = config, model, folder
        self.encoder: Encoder | None = None
        self.digests: dict[StoredData, list[str]] = {}
        self.written: dict[str, Path] = {}  # stores by fingerprint

    def rows(self, job: TrainJob, rule: SampleRule) -> Rows:
        """The samples of a job's store, which is made first if there is none or something has changed."""
        place = where(self.config, job)
        encoder = self.encoder = self.encoder or self._load_encoder(job)
        blocks = [block for block in (job.data, job.evaluation_data) if isinstance(block, StoredData)]
        try:
            fingerprint = self._fingerprint(encoder, blocks, rule)
            store = self._fresh(job, fingerprint) or self._make(encoder, job, blocks, rule, fingerprint)
        except UserError as error:
            raise UserError(*(f"{place}: {mistake}" for mistake in error.mistakes)) from None
        self.written.setdefault(fingerprint, store.path)
        if store.notes.largest_id >= self.model.vocab_size:
            raise UserError(
                f"{place}: the tokenizer gives token {store.notes.largest_id}, but the model's vocabulary has "
                f"{self.model.vocab_size}; choose the model's own tokenizer"
            )
        for block, counts in zip(blocks, store.notes.counts, strict=True):
            LOGGER.info(f"{job.name}: {block.dataset}: {counts}")
        samples = [Sample(row, tokens) for row, tokens in enumerate(store.lengths)]
        dataset = stored_dataset(job.data.dataset, fingerprint)
        return Rows(dataset, samples[: store.notes.training], samples[store.notes.training :])

    def _load_encoder(self, job: TrainJob) -> Encoder:
        if self.config.tokenizer:
            return load_encoder(self.config.tokenizer)
        source = self.model.weights if self.config.is_described else self.config.model
        if source == "random":
            raise UserError(
                f"{self.config.path}: tokenizer: field required, as model {self.config.model!r} has none of its own "
                f"and job {job.name!r} has text to tokenise"
            )
        return load_encoder(source, self.model.revision)

    def _fingerprint(self, encoder: Encoder, blocks: list[StoredData], rule: SampleRule) -> str:
        """A hash of everything that the tokens depend on. Files count by their content, wherever they are."""
        tokenizer = encoder.tokenizer
        return content_hash(
            {
                "blocks": [block.model_dump(exclude={"jsonl", "text"}) for block in blocks],
                "content": [self._digests(block) for block in blocks],
                "tokenizer": [tokenizer.backend_tokenizer.to_str(), tokenizer.bos_token_id, tokenizer.eos_token_id],
                "rule": asdict(rule),
                "version": VERSION,
            }
        )

    def _digests(self, block: StoredData) -> list[str]:
        if block not in self.digests:
            if isinstance(block, HubData):
                files = tuple(Path(file["filename"]) for file in hub_dataset(block).cache_files)
            else:
                files = block.jsonl if isinstance(block, JsonlData) else block.text
            self.digests[block] = [_digest(path) for path in files]
        return self.digests[block]

    def _fresh(self, job: TrainJob, fingerprint: str) -> StoreFile | None:
        """The job's store, or another job's that is the same, if there is one of this fingerprint."""
        path = store_path(self.folder, job.name)
        try:
            store = StoreFile(path)
            if store.notes.fingerprint == fingerprint:
                store.require_content()
                return store
        except UserError:
            pass  # it is made anew
        if fingerprint not in self.written:
            return None
        _link(self.written[fingerprint], path)
        return StoreFile(path)

    def _make(
        self, encoder: Encoder, job: TrainJob, blocks: list[StoredData], rule: SampleRule, fingerprint: str
    ) -> StoreFile:
        writer, sizes, counts = StoreWriter(), [], [SampleCounts() for _ in blocks]
        for block, count in zip(blocks, counts, strict=True):
            writer.extend(encode(block, encoder, rule, count))
            sizes.append(len(writer))
        path = store_path(self.folder, job.name)
        writer.write(path, fingerprint=fingerprint, training=sizes[0], counts=tuple(map(str, counts)))
        return StoreFile(path)


def _synthetic_rows(config: TrainConfig, job: TrainJob, rule: SampleRule) -> Rows:
    """The samples of a synthetic job; ids of the evaluation samples follow those of the training samples."""
    rows: list[list[Sample]] = []
    first = 0
    for block in (job.data, job.evaluation_data):
        lengths = _synthetic_lengths(config, job, block, rule) if isinstance(block, SyntheticData) else []
        rows.append([Sample(first + index, tokens) for index, tokens in enumerate(lengths)])
        first += len(lengths)
    return Rows(job.data.dataset, *rows)


def _synthetic_lengths(config: TrainConfig, job: TrainJob, block: SyntheticData, rule: SampleRule) -> list[int]:
    drawn = block.synthetic
    lengths = draw_lengths(drawn.dataset, drawn.samples, job.seed, drawn.scale)
    limit, longest = rule.max_length, max(lengths)
    if longest > limit and rule.too_long == "error":
        raise UserError(f"{where(config, job)}: {block.dataset}: {longest} tokens, more than max_length {limit}")
    if rule.too_long == "drop":
        lengths = [tokens for tokens in lengths if tokens <= limit]
        if not lengths:
            raise UserError(f"{where(config, job)}: {block.dataset}: every sample is longer than max_length {limit}")
    return [min(tokens, limit) for tokens in lengths]


def _job(config: TrainConfig, job: TrainJob, rows: Rows) -> Job:
    """A job with its samples in training order."""
    dataset, training, evaluation = rows
    if isinstance(job.evaluation, float) and job.evaluation:
        training, evaluation = _split(config, job, training, job.evaluation)
    if job.shuffle:
        training = [training[index] for index in _permutation(len(training), f"shuffle/{job.seed}")]
    samples = {"dataset": dataset, "samples": tuple(training), "evaluation": tuple(evaluation)}
    epochs, steps = _duration(config, job, len(training))
    settings = job.hyper_parameters | {"epochs": epochs, "warmup_steps": warm_up(config, job, steps)}
    return validated(Job, settings | samples, where(config, job))


def _duration(config: TrainConfig, job: TrainJob, samples: int) -> tuple[int, int]:
    """How often a job's samples are gone through, and its steps; says so where both its epochs and its steps would end
    it."""
    of_an_epoch, steps = math.ceil(samples / job.global_batch_size), int(steps_of(job, samples))
    if job.steps is None:
        return job.epochs or 1, steps
    needed = math.ceil(job.steps / of_an_epoch)
    if job.epochs is None and needed > MOST_EPOCHS:
        raise UserError(
            f"{where(config, job)}: steps: {job.steps} need {needed} epochs of {samples} samples, expected "
            f"{MOST_EPOCHS} at most"
        )
    if job.epochs and job.steps != job.epochs * of_an_epoch:
        ends = "epochs" if job.epochs < needed else "steps"
        LOGGER.info(
            f"{job.name}: {job.epochs} epoch(s) have {job.epochs * of_an_epoch} steps, steps is {job.steps}: "
            f"{ends} end(s) the job"
        )
    return job.epochs or needed, steps


def _split(
    config: TrainConfig, job: TrainJob, samples: list[Sample], share: float
) -> tuple[list[Sample], list[Sample]]:
    """The samples to train on, and those held out, a share of them and at least one. The job's seed has no say in
    which, so that jobs on the same data are measured on the same samples."""
    count = max(1, round(share * len(samples)))
    if count >= len(samples):
        raise UserError(f"{where(config, job)}: evaluation: no sample is left to train, there are {len(samples)}")
    held_out = set(_permutation(len(samples), "evaluation")[:count])
    return (
        [sample for index, sample in enumerate(samples) if index not in held_out],
        [samples[index] for index in sorted(held_out)],
    )


def _permutation(count: int, key: str) -> list[int]:
    """An order of `count` things drawn by a key: raw Philox numbers, which are the same in every version of NumPy."""
    seed = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=16).digest(), "little")
    return np.argsort(np.random.Philox(key=seed).random_raw(count), kind="stable").tolist()


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()


def _link(source: Path, target: Path) -> None:
    """Make `target` the same file as `source` in one step; a copy where the file system has no hard links."""
    partial = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        os.link(source, partial)
    except OSError:
        shutil.copyfile(source, partial)
    partial.replace(target)
