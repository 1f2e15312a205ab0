"""The site: what a cluster's nodes are, and what it wants to be told with each job.

One YAML file says it, so that suites need not: the file that LORAFUSION_SLURM_SITE names, else slurm/site.yaml if it is
there. LORAFUSION_SLURM_PARTITION and so on replace single keys.
"""

import os
import re
import shlex
import sys
from collections.abc import Mapping
from typing import Literal

from pydantic import Field, field_validator

from lorafusion.core.config import CONFIGS
from lorafusion.core.files import read_yaml
from lorafusion.core.plugins import import_extra
from lorafusion.core.schema import MOST_PROCESSES, Config, Mistakes, UserError, validated

PREFIX = "LORAFUSION_SLURM_"
SITE = f"{PREFIX}SITE"  # empty: no file, also where slurm/site.yaml is
DEFAULT = CONFIGS.parent / "slurm" / "site.yaml"
WORD = r"^[^\s'\"]+$"  # what sbatch takes for a name
TYPE = r"^[A-Za-z0-9_.]+$"  # what Snakemake's plugin takes for a GPU's


class Site(Config):
    """A cluster. Where a key has no value, the suite's holds, or the cluster's own default."""

    gpus_per_node: int | None = Field(
        default=None, ge=1, le=MOST_PROCESSES, description="GPUs of a node, or processes of a suite for CPUs"
    )
    cpus_per_gpu: int = Field(default=4, ge=1, le=1024, description="cores that come with a GPU")
    physical_cores: bool = Field(default=False, description="a core with its hardware threads is for one job alone")
    memory_gb: int | None = Field(
        default=None, ge=0, le=1_000_000, description="memory of a whole node; 0: no job asks for memory"
    )
    gpu_type: str | None = Field(default=None, pattern=TYPE, description="as in `--gres=gpu:TYPE:8`")
    constraint: str | None = Field(default=None, pattern=WORD, description="features of the nodes with GPUs")
    partition: str | None = Field(default=None, pattern=WORD)
    cpu_partition: str | None = Field(
        default=None,
        pattern=WORD,
        description="for jobs without GPUs, which ask for no constraint or reservation",
    )
    account: str | None = Field(default=None, pattern=WORD)
    qos: str | None = Field(default=None, pattern=WORD, description="quality of service")
    reservation: str | None = Field(default=None, pattern=WORD)
    exclusive: bool = Field(default=False, description="timed jobs get whole nodes, and not their share alone")
    extra: str = Field(default="", description="other options of sbatch, as `--mail-type=FAIL`")
    jobs: int = Field(default=16, ge=1, le=100_000, description="in the queue at once")
    group_minutes: int = Field(
        default=600, ge=0, le=1_000_000, description="the longest job that steps share; 0: a job for each step"
    )
    poll: int = Field(default=40, ge=1, le=3600, description="seconds to the first look at a job's state")
    left_jobs: Literal["cancel", "wait"] = Field(
        default="cancel", description="what becomes of jobs that run on after their Snakemake was killed"
    )
    preflight: int = Field(default=10, ge=0, le=1440, description="minutes that its job may wait; 0: no preflight")
    interface: str | None = Field(default=None, pattern=WORD, description="network between nodes, as ib0")
    before: list[str] = Field(default=[], description="shell lines before each job, as `module load cuda`")

    @field_validator("extra")
    @classmethod
    def _leaves_to_the_plugin_what_it_sets(cls, value: str) -> str:
        """It would fail each job otherwise, one by one."""
        shlex.split(value)  # a quotation mark that is missing
        plugin = import_extra("snakemake_executor_plugin_slurm.validation", "lab", "extra") if value else None
        for pattern, option in plugin.get_forbidden_slurm_options().items() if plugin else ():
            if match := re.search(pattern, value):
                raise ValueError(f"{match[0].strip(' =')}: Snakemake sets the {option} itself; is there a key for it?")
        return value

    @property
    def shell(self) -> str:
        """What a job's shell does first; a line that fails ends it."""
        name = shlex.quote(self.interface or "")
        exports = [f"export NCCL_SOCKET_IFNAME={name} GLOO_SOCKET_IFNAME={name}"] if self.interface else []
        return "".join(f"{line}\n" for line in ["set -e", *self.before, *exports])


def read_site(environment: Mapping[str, str] = os.environ) -> Site:
    """The site of this machine; `UserError` names the file or the variable, and the key that is wrong."""
    path = environment.get(SITE, str(DEFAULT) if DEFAULT.exists() else "")
    site = validated(Site, read_yaml(path, may_be_empty=True), path) if path else Site()
    mistakes, changes = Mistakes(), {}
    for name in sorted(environment):
        if name.startswith(PREFIX) and name != SITE and environment[name]:
            key = name.removeprefix(PREFIX).lower()
            value = environment[name].splitlines() if key == "before" else environment[name]
            with mistakes.gathered():
                changes[key] = getattr(validated(Site, {key: value}, name), key)
    mistakes.require_none()
    return site.model_copy(update=changes)


def site_or_exit() -> Site:
    """The site for Snakemake's profile, which would show a mistake as a failure of its own."""
    try:
        return read_site()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
