"""Suites: what is measured, on what, how often; and their cells, the points of their grids."""

from __future__ import annotations

import re
import shlex
from itertools import product
from pathlib import Path
from typing import Literal, NamedTuple

from pydantic import Field, field_validator, model_validator

from lorafusion.core.config import (
    CONFIGS,
    Attention,
    Graphs,
    Name,
    Processes,
    SystemConfig,
    names_in,
    no_graphs,
    read_model,
    read_systems,
    require_attention,
    require_possible,
    uses_graphs,
)
from lorafusion.core.files import read_yaml
from lorafusion.core.machine import has_gpu
from lorafusion.core.schema import (
    LEAST_SCALE,
    MOST_MINUTES,
    MOST_PROCESSES,
    MOST_REPEATS,
    MOST_SAMPLES,
    MOST_SCALE,
    MOST_SEED,
    MOST_STAGES,
    MOST_TOKENS,
    Config,
    UserError,
    one_of,
    shown,
    validated,
)
from lorafusion.lab.cluster.site import read_site

COMMITTED = ("paper", "reference")  # folders of results that no suite may write to
MOST_RUNS = 10_000  # of a suite: each is a process, and a step of the workflow


class Grid(Config):
    """A block of a suite: the product of models, GPU counts, workloads and systems under the same settings."""

    models: list[str] = Field(min_length=1)
    gpus: list[Processes] = Field(min_length=1, description="processes, where the device is the CPU")
    workloads: list[str] = Field(min_length=1)
    systems: list[str] = Field(min_length=1)
    data_parallel: int = Field(
        default=1, ge=1, le=MOST_PROCESSES, description="replicas; stages = gpus / data_parallel"
    )
    samples: int = Field(ge=1, le=MOST_SAMPLES, description="samples an adapter")
    global_batch: int = Field(ge=1, le=MOST_SAMPLES, description="samples of one optimizer step of an adapter")
    capacity: int | dict[str, int] = Field(description="tokens a microbatch may hold, or that by workload")
    length_scale: float = Field(
        default=1.0, ge=LEAST_SCALE, le=MOST_SCALE, description="divides the sample lengths, for small models"
    )
    checkpointing: bool = Field(default=False, description="recompute activations in the backward pass")
    graphs: Graphs = Field(
        default="off",
        exclude_if=lambda graphs: graphs == "off",
        description="replay stages as CUDA graphs; auto: where the device is a GPU, and the system's design allows it",
    )
    attention: Attention = Field(
        default="flash",
        exclude_if=lambda attention: attention == "flash",
        description="whose kernels a GPU computes it by; auto: cuDNN's where they can be used",
    )
    merged_qkv: bool = Field(default=False, description="one adapter for q, k and v as one linear, in every system")
    tuned: bool = Field(
        default=False,
        description="`capacity` is the most that is tried; smaller ones until it fits, then until it is slower",
    )
    repeats: int | None = Field(
        default=None, ge=1, le=MOST_REPEATS, description="fresh processes a cell, by default the suite's"
    )
    priority: int = Field(default=0, ge=0, le=100, description="cells of a higher one are run before all others")
    minutes: int = Field(ge=1, le=MOST_MINUTES, description="time limit of a run; longer is status timeout")
    memory_gb: int = Field(default=4, ge=1, le=1_000_000, description="host memory of a run")

    def capacity_of(self, workload: str) -> int:
        return self.capacity if isinstance(self.capacity, int) else self.capacity[workload]

    @model_validator(mode="after")
    def _settings_cover_the_product(self) -> Grid:
        values = self.capacity.values() if isinstance(self.capacity, dict) else [self.capacity]
        if not all(1 <= value <= MOST_TOKENS for value in values):
            raise ValueError(f"capacity must be from 1 to {MOST_TOKENS} tokens")
        if isinstance(self.capacity, dict) and set(self.capacity) != set(self.workloads):
            raise ValueError("capacity, where given by workload, must name exactly the workloads of its block")
        for gpus in self.gpus:
            if gpus % self.data_parallel:
                raise ValueError(f"{gpus} gpus cannot hold {self.data_parallel} replicas of equal size")
        return self


class Arrangement(NamedTuple):
    """Processes that train together, written as `2x1` (stages x replicas) or `2x1+recompute`: with activations that are
    computed again in the backward pass."""

    stages: int
    replicas: int
    recompute: bool

    @classmethod
    def read(cls, text: str) -> Arrangement:
        match = re.fullmatch(r"([1-9]\d{0,4})x([1-9]\d{0,4})(\+recompute)?", text)
        if not match:
            raise UserError(
                f"arrangement: expected stages x replicas such as 2x1 or 2x1+recompute, found {shown(text)}"
            )
        for count, most in ((match[1], MOST_STAGES), (match[2], MOST_PROCESSES)):
            if len(count) > len(str(most)) or int(count) > most:
                raise UserError(f"arrangement: expected {most} at most, found {shown(text)}")
        return cls(int(match[1]), int(match[2]), bool(match[3]))

    def __str__(self) -> str:
        return f"{self.stages}x{self.replicas}{'+recompute' if self.recompute else ''}"


class Checks(Config):
    """The correctness checks that the suite's figures rest on."""

    lossless: list[str] = Field(
        default=["1x1", "2x1"],
        min_length=1,
        description="stages x replicas that train together, as 2x1 or 2x1+recompute",
    )

    @field_validator("lossless")
    @classmethod
    def _are_arrangements(cls, value: list[str]) -> list[str]:
        for arrangement in value:
            Arrangement.read(arrangement)
        return value


class Suite(Config):
    """A file of configs/suites: what is measured, on what, how often."""

    name: str = Name
    description: str
    device: Literal["cpu", "cuda"]
    dtype: Literal["float32", "bfloat16", "float16"]
    adapter_dtype: Literal["float32", "bfloat16", "float16"]
    repeats: int = Field(ge=1, le=MOST_REPEATS, description="fresh processes a cell")
    seed: int = Field(default=1, ge=0, le=MOST_SEED)
    gpus_per_node: int = Field(
        default=8, ge=1, le=MOST_PROCESSES, description="larger cells run on several nodes; a site's number comes first"
    )
    machine: str | None = Field(
        default=None, description="a cost profile of configs/machines to plan by; by default the models' FLOP"
    )
    checks: Checks = Checks()
    cost: bool = Field(default=True, description="say in each result what the run costs besides time")
    profiled: list[str] = Field(default=[], description="workloads whose cells are profiled, on a GPU")
    cells: list[Grid] = Field(min_length=1)

    def repeats_of(self, grid: Grid) -> int:
        return grid.repeats or self.repeats

    @field_validator("name")
    @classmethod
    def _has_a_folder_of_its_own(cls, value: str) -> str:
        if value.lower() in COMMITTED:
            raise ValueError(f"results/{value} is committed and no suite's, choose another name")
        return value


class Cell(Config):
    """One point of a suite's grid, with its settings."""

    system: str
    model: str
    gpus: int
    workload: str
    grid: Grid

    @property
    def stages(self) -> int:
        return self.gpus // self.grid.data_parallel

    @property
    def name(self) -> str:
        """The identity of a cell, the same in file names, tables and reports."""
        return f"{self.workload_name}/system~{self.system}"

    @property
    def workload_name(self) -> str:
        """The part of the identity that its systems share: they train the same workload."""
        merged = "/qkv~merged" if self.grid.merged_qkv else ""
        # Where stages could be, they are another cell. A system of one stage has no other way to take several GPUs.
        is_choice = self.stages == 1 < self.gpus and read_systems()[self.system].max_stages != 1
        replicas = f"/replicas~{self.gpus}" if is_choice else ""
        cell = f"model~{self.model}/workload~{self.workload}/gpus~{self.gpus}"
        return f"{cell}/batch~{self.grid.global_batch}{replicas}{merged}"


def suite_path(name: str | None) -> Path:
    """The file of a suite by name or path; without a name, of the suite that fits this machine."""
    chosen = ("h200" if has_gpu() else "smoke") if name is None else name
    path = Path(chosen) if chosen.endswith((".yaml", ".yml")) else CONFIGS / "suites" / f"{chosen}.yaml"
    if not path.exists():
        names = ", ".join(sorted(names_in("suites")))
        raise UserError(f"suite: no file {path}; known suites: {names}")
    return path


def read_suite(path: str | Path) -> Suite:
    """A suite whose every name is known and whose cells can exist, with the nodes of the site, if that says them."""
    suite = validated(Suite, read_yaml(path), path)
    gpus_per_node = read_site().gpus_per_node
    if gpus_per_node:
        suite = suite.model_copy(update={"gpus_per_node": gpus_per_node})
    runs = sum(suite.repeats_of(cell.grid) for cell in cells(suite, source=path))
    if runs > MOST_RUNS:
        raise UserError(f"{path}: repeats: {runs} runs of all cells, expected {MOST_RUNS} at most")
    return suite


def step_command(suite: str | Path, output: Path) -> str:
    """What to type to make one file of a suite again, whichever driver made it."""
    return shlex.join(["lorafusion", "lab", "run", str(suite), "--step", str(output)])


def cells(suite: Suite, source: str | Path = "suite") -> list[Cell]:
    """Every cell of a suite, in order; raises `UserError` for an unknown name or two cells of one identity."""
    systems, seen, out = read_systems(), set(), []
    if suite.machine is not None:
        one_of("machine", suite.machine, names_in("machines"), source)
    for name in suite.profiled:
        one_of("workload", name, {name for grid in suite.cells for name in grid.workloads}, f"{source}: profiled")
    for index, grid in enumerate(suite.cells):
        where = f"{source}: cells.{index}"
        for kind, names, choices in (
            ("system", grid.systems, set(systems)),
            ("model", grid.models, names_in("models")),
            ("workload", grid.workloads, names_in("workloads")),
        ):
            for name in names:
                one_of(kind, name, choices, where)
        configs = {model: read_model(model) for model in grid.models}
        for model, workload, gpus, system in product(grid.models, grid.workloads, grid.gpus, grid.systems):
            cell = Cell(system=system, model=model, gpus=gpus, workload=workload, grid=grid)
            _require_possible(cell, systems[system], configs[model].num_hidden_layers, where)
            reason = no_graphs(system, systems[system], suite.device, configs[model])
            uses_graphs(grid.graphs, reason, f"{where}.graphs")
            require_attention(grid.attention, suite.device, f"{where}.attention")
            if cell.name in seen:
                raise UserError(f"{where}: cell {cell.name} is in the suite twice")
            seen.add(cell.name)
            out.append(cell)
    return out


def _require_possible(cell: Cell, system: SystemConfig, layers: int, where: str) -> None:
    if cell.stages > layers:
        raise UserError(f"{where}: {cell.stages} stages, but model {cell.model} has only {layers} layers")
    try:
        require_possible(cell.system, system, cell.stages, cell.grid.data_parallel)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
