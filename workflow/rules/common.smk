# Which suite, which cells, where their files are. The only place with Python.
import os
import sys
from pathlib import Path

from snakemake.exceptions import WorkflowError

from lorafusion.lab.experiments import EXPERIMENTS
from lorafusion.lab.experiments.end_to_end import unavailable
from lorafusion.core.config import CONFIGS, read_systems
from lorafusion.lab.suite import Arrangement, cells, read_suite, suite_path
from lorafusion.core.schema import UserError
from lorafusion.lab.keys import CellFiles
from lorafusion.core.machine import has_gpu
from lorafusion.lab.report.ratios import lacking
from lorafusion.lab.sweep import shuffled
from lorafusion.lab.checks.catalog import needed_by
from lorafusion.core.workload import content_hash

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
    KERNEL_SUITE, SCHEDULER_SUITE, TRAINING_SUITE = [
        EXPERIMENTS[name].entries().get(SUITE.name)  # none: nothing of it measured
        for name in ("kernels", "planner", "steps")
    ]
    POINTS = {
        name: {point.name: point for point in experiment.points(SUITE.name)}
        for name, experiment in EXPERIMENTS.items()
        if name != "end_to_end"
    }
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
LOSSLESS_PROCESSES = max(
    arrangement.stages * arrangement.replicas
    for arrangement in map(Arrangement.read, SUITE.checks.lossless)
)
CELLS = {cell.name: cell for cell in cells(SUITE, SUITE_PATH)}
WORKLOADS = {cell.workload_name: cell for cell in CELLS.values()}
config["suite_name"] = SUITE.name  # for the captions of the report
COMPARED = sorted({cell.system for cell in CELLS.values()})
MODELS = sorted({cell.model for cell in CELLS.values()})
# Those of which the figure of lorafusion's parts can be drawn.
CONTRIBUTED = [
    model
    for model in MODELS
    if any(
        not lacking(
            cell.system
            for cell in CELLS.values()
            if (cell.model, cell.gpus) == (model, gpus) and not cell.grid.merged_qkv
        )
        for gpus in {cell.gpus for cell in CELLS.values()}
    )
]
PLANNED = {
    name: cell for name, cell in CELLS.items() if not unavailable(SYSTEMS[cell.system])
}
# By model, the cells whose capacity is found and not said.
TUNED = {
    model: names
    for model in MODELS
    if (
        names := [
            name
            for name, cell in PLANNED.items()
            if cell.grid.tuned and cell.model == model
        ]
    )
}
# Only a GPU's kernels can be told apart.
PROFILED = [
    name
    for name, cell in PLANNED.items()
    if cell.workload in SUITE.profiled and SUITE.device == "cuda"
]
REPEATS = range(1, SUITE.repeats + 1)
RESULTS = f"results/{SUITE.name}"
LOGS = f"{RESULTS}/logs"
RUNS = [f"{name}/repeat~{repeat}" for repeat in REPEATS for name in CELLS]
BENCHES = [name for name in POINTS["kernels"] if name != "traffic"]
KERNEL_FOLDER = f"{RESULTS}/kernels"
CHECKS = f"{RESULTS}/checks"
RUN_VERDICTS = [f"{CHECKS}/{name}.json" for name in needed_by("runs")]
TRAINING_VERDICTS = [f"{CHECKS}/{name}.json" for name in needed_by("training")]
KERNEL_VERDICTS = [f"{RESULTS}/checks/kernels.json"] if KERNEL_SUITE else []
KERNEL_RUNS = []
KERNEL_FIGURES = []
if KERNEL_SUITE:
    KERNEL_RUNS = [
        f"{KERNEL_FOLDER}/runs/{name}/repeat~{repeat}.json"
        for repeat in range(1, KERNEL_SUITE.repeats + 1)
        for name in BENCHES
    ]
    KERNEL_FIGURES = ["kernel_speed", "layer_speed"]
    if KERNEL_SUITE.traffic:
        KERNEL_RUNS.append(f"{KERNEL_FOLDER}/runs/traffic.json")
        KERNEL_FIGURES += ["dram_traffic", "roofline"]
KERNEL_RESULTS = [
    *[
        f"{KERNEL_FOLDER}/measurements.{form}"
        for form in ("csv", "html")
        if KERNEL_RUNS
    ],
    *[f"{RESULTS}/figures/{figure}.png" for figure in KERNEL_FIGURES],
]

SCHEDULER_FOLDER = f"{RESULTS}/scheduler"
SCHEDULER_RUNS = []
SCHEDULER_RESULTS = []
if SCHEDULER_SUITE:
    SCHEDULER_RUNS = [
        f"{SCHEDULER_FOLDER}/runs/{name}/repeat~{repeat}.json"
        for repeat in range(1, SCHEDULER_SUITE.repeats + 1)
        for name in POINTS["planner"]
    ]
    SCHEDULER_RESULTS = [
        *[f"{SCHEDULER_FOLDER}/measurements.{form}" for form in ("csv", "html")],
        *[
            f"{RESULTS}/figures/scheduler_{figure}.png"
            for figure in ("bubble", "fill", "time")
        ],
    ]

TRAINING_FOLDER = f"{RESULTS}/training"
TRAINING_RUNS = []
TRAINING_PROFILES = []
TRAINING_RESULTS = []
if TRAINING_SUITE:
    TRAINING_RUNS = [
        f"{TRAINING_FOLDER}/runs/{name}/repeat~{repeat}.json"
        for repeat in range(1, TRAINING_SUITE.repeats + 1)
        for name in TRAINING_SUITE.benches
    ]
    TRAINING_RESULTS = [
        *[f"{TRAINING_FOLDER}/measurements.{form}" for form in ("csv", "html")],
        f"{RESULTS}/figures/training_speed.png",
    ]
    # Only a GPU's kernels can be told apart.
    if TRAINING_SUITE.device == "cuda":
        TRAINING_PROFILES = [
            run.replace(".json", ".profile.csv") for run in TRAINING_RUNS
        ]
        TRAINING_RESULTS.append(f"{RESULTS}/figures/training_profile.png")


wildcard_constraints:
    cell="model~[^/]+/workload~[^/]+/gpus~[0-9]+/batch~[0-9]+(/qkv~merged)?/system~[^/]+",
    shared="model~[^/]+/workload~[^/]+/gpus~[0-9]+/batch~[0-9]+(/qkv~merged)?",
    repeat="[0-9]+",
    stages="[0-9]+",
    model="[^/]+",
    bench="(linear|layer)~[^/]+/rank~[0-9]+/dropout~[^/]+",
    figure="kernel_speed|layer_speed|dram_traffic|roofline",
    planned="workload~[^/]+/stages~[0-9]+/samples~[0-9]+",
    scheduler_figure="scheduler_(bubble|fill|time)",


def cell_of(wildcards):
    return CELLS[wildcards.cell]


def tuned(wildcards):
    """Where a cell's capacity is found, if the suite does not say it."""
    return (
        f"{RESULTS}/tuned/{wildcards.cell}.json"
        if cell_of(wildcards).grid.tuned and wildcards.cell in PLANNED
        else []
    )


def tuned_option(wildcards, input):
    """How a step is told of that."""
    return f"--tuned={input.tuned}" if input.tuned else ""


def configuration(wildcards):
    """What a cell's tuning, runs and profile depend on: they are made again when it changes, and only then."""
    return CellFiles(SUITE, cell_of(wildcards)).configuration


def workload_hash(wildcards):
    """The content that a workload file must have."""
    return CellFiles(SUITE, WORKLOADS[wildcards.shared]).expected_workload.content_hash


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


# Resources of every rule that runs a cell. `device` is one on each machine (profiles), so that nothing disturbs a run's
# clock.
CELL_RESOURCES = {
    "runtime": lambda wildcards: cell_of(wildcards).grid.minutes + 5,
    "mem_mb": lambda wildcards: 1000 * cell_of(wildcards).grid.memory_gb,
    "tasks_per_gpu": 0,
    "gres": gres,
    "cpus_per_task": lambda wildcards: min(
        cell_of(wildcards).gpus, SUITE.gpus_per_node
    ),
    "device": 1,
}


# Of checks that train: all GPUs of a node that their arrangements can use, as many as there are.
check_gres = (
    ""
    if SUITE.device == "cpu"
    else f"gpu:{min(SUITE.gpus_per_node, max(cell.gpus for cell in CELLS.values()))}"
)


def order(wildcards):
    """Repeat after repeat, the cells of a repeat in an order shuffled by its number.

    Drift of the machine then spreads over the systems and is not taken for a difference between them.
    """
    return turn(wildcards.cell, CELLS, int(wildcards.repeat), SUITE.repeats)


def turn(name, names, repeat, repeats):
    """The priority of one of `names` in one of the repeats."""
    order = shuffled(list(names), repeat)
    return 1 + len(order) * (repeats - repeat + 1) - order.index(name)


def training_order(wildcards):
    """As `order`, for the benches."""
    repeats = TRAINING_SUITE.repeats
    return turn(
        wildcards.trained, TRAINING_SUITE.benches, int(wildcards.repeat), repeats
    )


def kernel_order(wildcards):
    """As `order`, for the benches."""
    repeats = KERNEL_SUITE.repeats
    return turn(wildcards.bench, BENCHES, int(wildcards.repeat), repeats)


def kernel_gres(wildcards):
    """One GPU in Slurm's words; none for kernels on CPUs."""
    return "gpu:1" if KERNEL_SUITE.device == "cuda" else ""


def key_of(experiment, name):
    """Changes with what the numbers of a point of an experiment depend on."""
    return EXPERIMENTS[experiment].key(POINTS[experiment][name])
