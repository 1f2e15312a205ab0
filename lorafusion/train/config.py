"""The jobs file of `lorafusion train`: which adapters, of which base model, on which data, on what hardware.

The pydantic models here are the schema. Paths in the file are relative to its folder, hyper-parameters mean what they
mean in `lorafusion.core.workload`.
"""

import re
from collections import Counter
from pathlib import Path
from typing import Literal, TypeVar

from pydantic import Field, ValidationInfo, field_validator

from lorafusion.core.config import Attention, Graphs, ModelConfig, names_in, no_graphs, read_system, uses_graphs
from lorafusion.core.files import named_path, read_yaml
from lorafusion.core.machine import has_gpu
from lorafusion.core.schema import (
    MOST_EPOCHS,
    MOST_MINUTES,
    MOST_PROCESSES,
    MOST_SEED,
    MOST_STEPS,
    MOST_TOKENS,
    Config,
    Mistakes,
    UserError,
    meant,
    shown,
    validated,
)
from lorafusion.core.workload import (
    ALL_LINEAR,
    ORDER_KEYS,
    Alpha,
    BatchSize,
    Dropout,
    EvaluationSteps,
    GradientNorm,
    Hyperparameters,
    JobName,
    LearningRate,
    Priority,
    Rank,
    Schedule,
    Weight,
)
from lorafusion.data.blocks import Data, SyntheticData, SyntheticSamples, data_block
from lorafusion.launch.spec import DType
from lorafusion.train.other_tools import BATCH, Stated, over, translated, with_global_batch

SYSTEM = "lorafusion"  # that trains a jobs file
DEFAULT_MAX_LENGTH = 4096
REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
NOWHERE = "/"  # in the place of what cannot be

Read = TypeVar("Read", bound=Config)


class TrainJob(Hyperparameters, Config):
    """One adapter to train: its data and its hyper-parameters."""

    name: JobName
    data: Data
    shuffle: bool = Field(default=True, description="put the samples in an order drawn once from the job's seed")
    max_length: int | None = Field(
        default=None,
        ge=2,
        le=MOST_TOKENS,
        description="tokens of a sample; null: 4096, or what the model has positions for if fewer",
    )
    too_long: Literal["truncate", "drop", "error"] = "truncate"
    learn_prompt: bool = Field(default=False, description="learn the tokens of the prompt too")
    add_bos: bool | None = Field(
        default=None, description="begin a sample with that token, if its text does not; null: as the tokenizer does"
    )
    add_eos: bool = Field(default=True, description="end a sample with that token, if its text does not")
    evaluation: Data | float = Field(
        default=0.0, description="the share of the samples, to 0.5, that the loss is measured on, or data of its own"
    )
    evaluate_every: EvaluationSteps = None
    priority: Priority = 0
    weight: Weight = 1.0
    epochs: int | None = Field(
        default=None, ge=1, le=MOST_EPOCHS, description="null: as many as the steps need; without those, one"
    )
    # A workload states these three; who trains may leave them to usual values.
    rank: Rank = 16
    alpha: Alpha = 32.0
    global_batch_size: BatchSize = 8
    # A workload is to be the same arithmetic for all systems; who trains wants an adapter that generalises.
    dropout: Dropout = 0.05
    # The usual rate of an adapter; a workload keeps to one that is safe for a random model.
    learning_rate: LearningRate = 2e-4
    # Both as transformers' Trainer has them; in a workload each step depends on its own gradient alone.
    schedule: Schedule = "linear"
    max_grad_norm: GradientNorm = 1.0
    warmup_ratio: float = Field(
        default=0.0, ge=0, lt=1, description="the share of the steps that is warm-up; instead of warmup_steps"
    )

    @field_validator("target_modules", mode="before")
    @classmethod
    def _may_be_a_text(cls, value: object) -> object:
        if value in ("all", "all-linear", ["all-linear"]):
            return ALL_LINEAR
        if not isinstance(value, str):
            return value
        names = [name.strip() for name in value.split(",")]
        return names if {*names} <= {*ALL_LINEAR} else [value]

    @field_validator("evaluation", mode="before")
    @classmethod
    def _is_share_or_block(cls, value: object) -> object:
        if not isinstance(value, dict | Config) and not _is_share(value, 0.5):
            raise ValueError("expected a share from 0 to 0.5, or a data block")
        return value

    @field_validator("target_modules")
    @classmethod
    def _are_linears_or_a_pattern(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for name in value:
            if name in ALL_LINEAR:
                continue
            if len(value) > 1 or not re.search(r"\W", name):
                raise ValueError(f"unknown linear {name!r}; known: {', '.join(ALL_LINEAR)}")
            try:
                re.compile(name)
            except re.error as error:
                raise ValueError(f"not a regular expression ({error})") from None
        return value

    @field_validator("evaluation")
    @classmethod
    def _is_of_the_datas_kind(cls, value: Data | float, info: ValidationInfo) -> Data | float:
        synthetic = isinstance(info.data.get("data"), SyntheticData)
        if not isinstance(value, float) and synthetic != isinstance(value, SyntheticData):
            raise ValueError("expected synthetic data where the job's data is synthetic, and only there")
        return value

    @field_validator("evaluate_every")
    @classmethod
    def _has_something_to_evaluate_on(cls, value: int | None, info: ValidationInfo) -> int | None:
        if value and not info.data.get("evaluation"):
            raise ValueError("`evaluation` does not say on what")
        return value

    @property
    def is_synthetic(self) -> bool:
        return isinstance(self.data, SyntheticData)

    @property
    def evaluation_data(self) -> Data | None:
        """The data to evaluate on, where that is not a share of the job's own."""
        return None if isinstance(self.evaluation, float) else self.evaluation

    @property
    def hyper_parameters(self) -> dict:
        """The fields that a `Job` takes as they are."""
        return self.model_dump(include={"name", "evaluate_every", *ORDER_KEYS, *Hyperparameters.model_fields})


class TrainConfig(Config):
    """A jobs file as it was read: paths are absolute, defaults are merged under the jobs."""

    path: Path = Field(description="the file itself")
    model: str = Field(description="a name of configs/models, such a file, a Hugging Face folder or a repository")
    revision: str | None = Field(default=None, min_length=1, description="commit or tag of the model on the hub")
    weights: Literal["random"] | None = Field(default=None, description="null: the model's own")
    tokenizer: str | None = Field(default=None, description="folder or repository; null: the model's own")
    output: Path = Field(description="folder for the adapters, checkpoints and logs")
    device: Literal["cpu", "cuda"] | None = Field(default=None, description="null: cuda if there is a GPU")
    dtype: DType | None = Field(default=None, description="of the base model; null: bfloat16 on cuda, else float32")
    adapter_dtype: DType = "float32"
    processes: int = Field(default=1, ge=1, le=MOST_PROCESSES, description="GPUs, or processes on the CPU")
    data_parallel: int = Field(
        default=1, ge=1, le=MOST_PROCESSES, description="replicas; stages = processes / data_parallel"
    )
    capacity: int | None = Field(
        default=None, ge=2, le=MOST_TOKENS, description="tokens of a microbatch; null: found by trying"
    )
    checkpointing: Literal["auto", "none", "all"] | float = Field(
        default="auto", description="which layers recompute their activations, or which share of them"
    )
    graphs: Graphs = Field(
        default="auto", description="replay stages as CUDA graphs; auto: where the device is a GPU and they fit"
    )
    attention: Attention = Field(
        default="flash", description="whose kernels a GPU computes it by; auto: cuDNN's where they can be used"
    )
    save_every: int = Field(default=100, ge=1, le=MOST_STEPS, description="microbatch slots between two checkpoints")
    keep: int = Field(default=2, ge=1, le=MOST_STEPS, description="checkpoints to keep")
    stall_minutes: float = Field(
        default=10.0, gt=0, le=MOST_MINUTES, description="without a microbatch, after which a run is ended"
    )
    wandb: Literal["off", "offline", "online"] = "off"
    wandb_project: str = Field(default="lorafusion", min_length=1)
    seed: int = Field(default=1, ge=0, le=MOST_SEED, description="draws the base model's random weights")
    jobs: tuple[TrainJob, ...] = Field(min_length=1)

    @field_validator("wandb", mode="before")
    @classmethod
    def _yaml_reads_off_as_false(cls, value: object) -> object:
        return "off" if value is False else value

    @field_validator("checkpointing", mode="before")
    @classmethod
    def _is_word_or_share(cls, value: object) -> object:
        if value not in ("auto", "none", "all") and not _is_share(value, 1):
            raise ValueError("expected auto, none, all or a share from 0 to 1")
        return value

    @field_validator("data_parallel")
    @classmethod
    def _divides_the_processes(cls, value: int, info: ValidationInfo) -> int:
        processes = info.data.get("processes", value)
        if processes % value:
            raise ValueError(f"{processes} processes cannot hold replicas of equal size")
        return value

    @property
    def stages(self) -> int:
        return self.processes // self.data_parallel

    @property
    def recomputed_share(self) -> float | None:
        """The share of the layers that recompute their activations; None: found by trying."""
        setting = self.checkpointing
        return setting if isinstance(setting, float) else {"none": 0.0, "all": 1.0, "auto": None}[setting]

    @property
    def chosen_device(self) -> Literal["cpu", "cuda"]:
        """The device asked for, or the one that this machine has."""
        return self.device or ("cuda" if has_gpu() else "cpu")

    @property
    def chosen_dtype(self) -> DType:
        """The dtype of the base model asked for, or the one that suits the device."""
        return self.dtype or ("bfloat16" if self.chosen_device == "cuda" else "float32")

    def without_graphs(self, model: ModelConfig | None) -> str:
        """Why stages cannot replay graphs here, memory aside; empty where they can. model: None before it is known."""
        return no_graphs(SYSTEM, read_system(SYSTEM), self.chosen_device, model)

    def plans_graphs(self, model: ModelConfig) -> bool:
        """Does a plan for the device asked for, or for GPUs, count on graphs? Memory aside."""
        return self.graphs != "off" and not no_graphs(SYSTEM, read_system(SYSTEM), self.device or "cuda", model)

    def uses_graphs(self, reason: str) -> bool:
        """As `core.config.uses_graphs`."""
        return uses_graphs(self.graphs, reason, f"{self.path}: graphs")

    @property
    def is_described(self) -> bool:
        """Is the model a file of the form of configs/models, and not a checkpoint?"""
        return self.model.endswith(".yaml") or self.model in names_in("models")


FILE_KEYS = {*TrainConfig.model_fields, "defaults"} - {"path"}
JOB_KEYS = {*TrainJob.model_fields, *BATCH}
# In the place of what is wrong, so that the rest is read too.
NO_JOB = TrainJob(name="none", data=SyntheticData(synthetic=SyntheticSamples()))


def read_train_config(path: str | Path) -> TrainConfig:
    """The jobs file at `path`. All its mistakes are one `UserError`; each names the file, the job and the key."""
    return _Reader(Path(path)).config()


class _Reader:
    """Reads a jobs file, and gathers the mistakes in it."""

    def __init__(self, path: Path) -> None:
        self.path, self.folder, self.mistakes = path, path.absolute().parent, Mistakes()

    def config(self) -> TrainConfig:
        top = self._stated(read_yaml(self.path), FILE_KEYS, JOB_KEYS, "in a job or in defaults", str(self.path))
        jobs, defaults = (top.pop(key, Stated(key, None)).value for key in ("jobs", "defaults"))
        replicas = meant(top["data_parallel"].value, int) if "data_parallel" in top else 1
        values = {"path": self.path.absolute(), "jobs": self._jobs(jobs, defaults, replicas)}
        for key, located in (("model", _located_model), ("tokenizer", _located), ("output", _output)):
            if key in top and isinstance(top[key].value, str):
                values[key] = NOWHERE
                with self.mistakes.gathered():
                    values[key] = located(top[key].value, f"{self.path}: {top[key].key}", self.folder)
        with self.mistakes.gathered():
            config = _validated(TrainConfig, top, values, str(self.path))
        self.mistakes.require_none()
        return config

    def _stated(self, mapping: object, keys: set[str], others: set[str], place: str, where: str) -> dict[str, Stated]:
        """What a mapping states. others: keys that belong in another place."""
        return translated(mapping, keys, dict.fromkeys(others, place), where, self.mistakes)

    def _jobs(self, jobs: object, defaults: object, replicas: object) -> tuple[TrainJob, ...]:
        """The jobs that are right. Without any, a stand-in, so that the file's other mistakes are told too."""
        where, place = f"{self.path}: defaults", "at the top of the file"
        under = self._stated({} if defaults is None else defaults, JOB_KEYS - {"name"}, FILE_KEYS, place, where)
        right = []
        with self.mistakes.gathered():
            if not isinstance(jobs, list) or not jobs:
                raise UserError(f"{self.path}: jobs: expected a list of jobs, found {shown(jobs)}")
            names = [_name(job, index) for index, job in enumerate(jobs)]
            for job, name in zip(jobs, names, strict=True):
                where = f"{self.path}: jobs.{name}"
                stated = over(under, self._stated(job, JOB_KEYS, FILE_KEYS, place, where))
                if not isinstance(job, dict):
                    continue
                with self.mistakes.gathered():
                    right.append(self._job(with_global_batch(stated, replicas, where), where))
            for name in (name for name, count in Counter(names).items() if count > 1):
                raise UserError(f"{self.path}: jobs: two are named {name!r}; adapters need distinct names")
        return tuple(right) or (NO_JOB,)

    def _job(self, stated: dict[str, Stated], where: str) -> TrainJob:
        """A job, whose data blocks are read first, so that a mistake in them is told by kind."""
        blocks: dict[str, object] = {}
        keys = [key for key in ("data", "evaluation") if key in stated]
        keys = [key for key in keys if key == "data" or isinstance(stated[key].value, dict)]
        for key in keys:
            with self.mistakes.gathered():
                blocks[key] = data_block(stated[key].value, f"{where}.{stated[key].key}", self.folder)
        if len(blocks) < len(keys):
            blocks = {"data": NO_JOB.data, "evaluation": 0.1}
        return _validated(TrainJob, stated, blocks, where)


def _name(job: object, index: int) -> str | int:
    """What a job is called in messages."""
    name = job.get("name") if isinstance(job, dict) else None
    return name if isinstance(name, str) else index


def _validated(model: type[Read], stated: dict[str, Stated], values: dict[str, object], where: str) -> Read:
    """What is stated as an instance of a model, some values of it already read. Mistakes have the keys of the file."""
    try:
        return validated(model, {key: value for key, (_, value) in stated.items()} | values, where)
    except UserError as error:
        mistakes = error.mistakes
        for ours, (key, _) in stated.items():
            start, written = f"{where}: {ours}:", f"{where}: {key}:"
            mistakes = [line.replace(start, written, 1) if line.startswith(start) else line for line in mistakes]
        raise UserError(*mistakes) from None


def _located_model(value: str, where: str, folder: Path) -> str:
    if value in names_in("models"):
        return value
    if value.endswith(".yaml"):
        file = named_path(folder, value, where)
        if not file.is_file():
            raise UserError(f"{where}: no such file {file}")
        return str(file)
    return _located(value, where, folder, f"; or one of configs/models: {', '.join(sorted(names_in('models')))}")


def _located(value: str, where: str, folder: Path, alternative: str = "") -> str:
    """A local folder as an absolute path, or else a name that the hub may know."""
    local = named_path(folder, value, where)
    if value and local.is_dir():
        return str(local)
    if value.startswith((".", "/", "~")) or not REPOSITORY.fullmatch(value):
        raise UserError(f"{where}: expected a folder or a repository owner/name{alternative} (found {shown(value)})")
    return value


def _output(value: str, where: str, folder: Path) -> Path:
    """Resolved, as `new/../mine` is the folder `mine` as soon as `new` has been made."""
    try:
        path = named_path(folder, value, where)
        for place in (path, *path.parents):
            if place.is_symlink() and not place.exists():
                raise UserError(f"{where}: {place} is a link to nothing, expected a folder or a new name")
        return path.resolve()
    except RuntimeError:
        raise UserError(f"{where}: expected a folder, found links in a circle ({value})") from None


def _is_share(value: object, most: float) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= most
