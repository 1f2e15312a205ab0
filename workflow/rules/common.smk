# Which suite, which cells, where their files are. The only place with Python.
import os
import random
import sys
from pathlib import Path

from snakemake.exceptions import WorkflowError

from lorafusion.cells import config_hash, unavailable
from lorafusion.config import CONFIGS, cells, read_suite, read_systems, suite_path
from lorafusion.errors import UserError
from lorafusion.measure.environment import has_gpu

# The workflow's own Python, also where the environment was not activated and inside Slurm jobs.
shell.prefix(f"set -euo pipefail; export PATH={Path(sys.executable).parent}:$PATH; ")


def unknown_settings():
    """A misspelt --config key would otherwise be ignored."""
    unknown = sorted(set(config) - {"suite", "suite_name"})
    if unknown:
        raise UserError(f"--config: unknown key {unknown[0]!r}; known: suite")


try:
    unknown_settings()
    # Relative, so that a checkout can be moved without its results being made again.
    SUITE_PATH = os.path.relpath(
        suite_path(config.get("suite") or os.environ.get("LORAFUSION_SUITE"))
    )
    SUITE = read_suite(SUITE_PATH)
    # Dry runs and jobs that Slurm has already placed need no GPU here.
    if (
        SUITE.device == "cuda"
        and "slurm" not in sys.argv
        and not workflow.dryrun
        and not has_gpu()
    ):
        raise UserError(
            f"{SUITE_PATH}: a suite for GPUs, but nvidia-smi finds none; try suite=smoke or Slurm"
        )
except UserError as error:
    raise WorkflowError(f"error: {error}") from None

WORKLOAD_CONFIGS = os.path.relpath(CONFIGS / "workloads")
SYSTEMS = read_systems()
CELLS = {cell.name: cell for cell in cells(SUITE, SUITE_PATH)}
WORKLOADS = {cell.workload_name: cell for cell in CELLS.values()}
config["suite_name"] = SUITE.name  # for the captions of the report
MODELS = sorted({cell.model for cell in CELLS.values()})
PLANNED = {
    name: cell
    for name, cell in CELLS.items()
    if not unavailable(cell, SYSTEMS[cell.system])
}
REPEATS = range(1, SUITE.repeats + 1)
RESULTS = f"results/{SUITE.name}"
LOGS = f"{RESULTS}/logs"
RUNS = [f"{name}/repeat~{repeat}" for repeat in REPEATS for name in CELLS]


wildcard_constraints:
    cell="model~[^/]+/workload~[^/]+/gpus~[0-9]+/batch~[0-9]+/system~[^/]+",
    shared="model~[^/]+/workload~[^/]+/gpus~[0-9]+/batch~[0-9]+",
    repeat="[0-9]+",
    stages="[0-9]+",
    model="[^/]+",


def cell_of(wildcards):
    return CELLS[wildcards.cell]


def nodes_of(wildcards):
    return -(-cell_of(wildcards).gpus // SUITE.gpus_per_node)


def launcher(wildcards):
    """What starts a run: nothing on one node, one launcher a node on more."""
    return "srun" if nodes_of(wildcards) > 1 else ""


def gres(wildcards):
    """The GPUs of each node, in Slurm's words; none for a suite on CPUs."""
    if SUITE.device == "cpu":
        return ""
    return f"gpu:{min(cell_of(wildcards).gpus, SUITE.gpus_per_node)}"


def order(wildcards):
    """Repeat after repeat, the cells of a repeat in an order shuffled by its number.

    Drift of the machine then spreads over the systems and is not taken for a difference between them.
    """
    names = sorted(CELLS)
    random.Random(int(wildcards.repeat)).shuffle(names)
    later_repeats = len(names) * (SUITE.repeats - int(wildcards.repeat))
    return 1 + later_repeats + len(names) - names.index(wildcards.cell)
