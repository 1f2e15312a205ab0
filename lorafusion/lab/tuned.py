"""The outcome of tuning a cell: which capacities were tried, how fast each was, and which is the cell's."""

from __future__ import annotations

import json
from pathlib import Path

from pydantic import Field

from lorafusion.core.schema import MOST_TOKENS, Config, Data, Float, Int, validated
from lorafusion.core.seals import require_own_seal, sealed
from lorafusion.core.workload import read_versioned
from lorafusion.launch.spec import RunSpec

VERSION = 3
TRY_CAPACITIES = "lorafusion.lab.trials:try_capacities"
PROFILE_TRIAL = "lorafusion.lab.trials:profile_trial"


class Trial(Config):
    """A plan that is tried."""

    plan: str = Field(description="path of the plan of the workload")
    part: str = Field(description="path of that of its first global batches, which is run")
    capacity: int = Field(ge=1)


class TrialOptions(Config):
    """The options of both tasks of `lab.trials`."""

    trials: tuple[Trial, ...] = Field(min_length=1, description="plans to be timed one after another")
    part: str = Field(description="path of the workload of the trials' first global batches")
    throughputs: str = Field(description="file for tokens a second, a line as each trial's are known")

    @classmethod
    def of(cls, spec: RunSpec) -> TrialOptions:
        return validated(cls, spec.options, f"task {spec.task}")


class Tried(Data):
    """A capacity that was tried: tokens a second of the first global batches, or why there is no such number."""

    capacity: Int = Field(ge=1, le=MOST_TOKENS)
    throughput: Float | None = Field(default=None, gt=0, le=1e12)
    status: str = "ok"
    note: str = ""

    def __str__(self) -> str:
        return f"{self.capacity}: {self.status if self.throughput is None else f'{self.throughput:,.0f} tok/s'}"


class Tuned(Data):
    """The outcome for a cell, and what it was made from."""

    version: Int = VERSION
    suite: str
    cell: str
    system: str
    stages: Int
    data_parallel: Int
    config_hash: str
    workload_hash: str
    gpu_name: str | None
    git_sha: str | None
    git_dirty: bool | None
    tree_hash: str | None
    trials: tuple[Tried, ...] = Field(min_length=1)
    seal: str | None = Field(default=None, description="hash of all the rest, so that a change by hand shows")

    @property
    def capacity(self) -> int:
        """The fastest capacity; ties go to the larger. If none finished: the smallest tried (the run will report the
        error)."""
        done = [trial for trial in self.trials if trial.throughput is not None]
        if not done:
            return min(trial.capacity for trial in self.trials)
        return max(done, key=lambda trial: (trial.throughput, trial.capacity)).capacity

    def to_json(self) -> str:
        return json.dumps(sealed(self.model_dump(mode="json")), indent=1) + "\n"

    @classmethod
    def read(cls, path: str | Path) -> Tuned:
        """Read such a file; `UserError` names the file and what is wrong."""
        tuned = validated(cls, read_versioned(path, VERSION, "tuning"), path)
        require_own_seal(tuned.model_dump(mode="json"), path)
        return tuned
