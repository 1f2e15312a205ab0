"""Sample lengths: seeded draws from the committed table of the paper's datasets, and the workloads made of them."""

import csv
import hashlib
from pathlib import Path

import numpy as np
from pydantic import Field

from lorafusion.core.config import CONFIGS
from lorafusion.core.files import read_yaml
from lorafusion.core.schema import MOST_TOKENS, Config, UserError, one_of, validated
from lorafusion.core.workload import MERGED, MERGED_PARTS, AdapterParameters, Job, Prompt, Sample, Workload

LENGTHS_TABLE = CONFIGS / "workloads" / "lengths.csv"
MIXED = "mixed"


class LengthDistribution(Config):
    """One row of the table: a log-normal by its mean and the standard deviation of its logarithm, clamped."""

    dataset: str
    mean: float = Field(gt=0, le=MOST_TOKENS, description="tokens, before the clamp")
    log_sigma: float = Field(gt=0, le=10)
    maximum: int = Field(ge=2, le=MOST_TOKENS, description="tokens; longer samples are counted as this long")


class AdapterConfig(AdapterParameters, Config):
    """One adapter of a workload file."""

    dataset: str
    prompt: Prompt = 0.0


class WorkloadConfig(Config):
    """A file of configs/workloads: which adapters are trained together, on which datasets."""

    description: str
    adapters: tuple[AdapterConfig, ...] = Field(min_length=1)


def read_table(path: Path = LENGTHS_TABLE) -> dict[str, LengthDistribution]:
    """The committed length distributions by dataset."""
    with open(path) as file:
        rows = csv.DictReader(line for line in file if not line.startswith("#"))
        return {row["dataset"]: validated(LengthDistribution, row, path) for row in rows}


def _merged(modules: tuple[str, ...], path: Path) -> tuple[str, ...]:
    missing = [name for name in MERGED_PARTS if name not in modules]
    if missing:
        raise UserError(f"{path}: to merge q, k and v an adapter must be on all of them, found none on {missing[0]}")
    return (MERGED, *(name for name in modules if name not in MERGED_PARTS))


def draw_lengths(dataset: str, count: int, seed: int, scale: float = 1.0) -> list[int]:
    """`count` sample lengths of a dataset, in tokens divided by `scale` (at least 2).

    A pure function of its arguments on any machine: NumPy's Philox, keyed by dataset and seed. `mixed` draws each
    sample from one of the table's datasets with equal chances.
    """
    table = read_table()
    one_of("dataset", dataset, {*table, MIXED}, LENGTHS_TABLE)
    key = int.from_bytes(hashlib.blake2b(f"{dataset}/{seed}".encode(), digest_size=16).digest(), "little")
    generator = np.random.Generator(np.random.Philox(key=key))
    sources = [table[name] for name in sorted(table)] if dataset == MIXED else [table[dataset]]
    choice = generator.integers(len(sources), size=count)
    normal = generator.standard_normal(count)
    sigma = np.array([source.log_sigma for source in sources])[choice]
    mean = np.array([source.mean for source in sources])[choice]
    maximum = np.array([source.maximum for source in sources])[choice]
    # The mean of a log-normal is exp(mu + sigma^2/2).
    tokens = np.minimum(np.exp(np.log(mean) - sigma**2 / 2 + sigma * normal), maximum) / scale
    return [max(2, int(value)) for value in np.rint(tokens)]


def make_workload(
    config_path: str | Path,
    *,
    samples: int,
    global_batch: int,
    scale: float = 1.0,
    seed: int = 0,
    merged_qkv: bool = False,
) -> Workload:
    """The workload of a configuration file with `samples` samples an adapter; adapter i draws with seed + i.

    merged_qkv: one adapter for q, k and v as one linear. Raises `UserError` where not all adapters are on the three."""
    path = Path(config_path)
    config = validated(WorkloadConfig, read_yaml(path), path)
    jobs = []
    for index, adapter in enumerate(config.adapters):
        if merged_qkv:
            adapter = adapter.model_copy(update={"target_modules": _merged(adapter.target_modules, path)})
        lengths = draw_lengths(adapter.dataset, samples, seed + index, scale)
        jobs.append(
            Job(
                name=f"adapter-{index}",
                **adapter.model_dump(),
                seed=seed + index,
                global_batch_size=global_batch,
                samples=tuple(Sample(i, tokens) for i, tokens in enumerate(lengths)),
            )
        )
    return Workload(name=path.stem, jobs=tuple(jobs))
