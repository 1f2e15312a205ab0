"""What `lorafusion plan propose` reads, prints and writes."""

import json
import shlex
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from lorafusion.core.config import ModelConfig, read_model
from lorafusion.core.files import require_replaceable, write
from lorafusion.core.schema import UserError
from lorafusion.core.workload import Workload
from lorafusion.planning.memory import GIB
from lorafusion.planning.propose import Choice, Cluster, Search
from lorafusion.planning.simulator import CostModel, Question, costs_for, read_cost_model
from lorafusion.planning.simulator.profile import is_profile
from lorafusion.planning.simulator.trace import write_trace
from lorafusion.train.config import TrainConfig, read_train_config

VERSION = 1  # of the file with all choices
COLUMNS = ("groups", "at once", "stages", "replicas", "nodes", "idle", "capacity", "of at most", "tokens/s", "bubble",
           "GiB", "time", "GPU-hours")  # fmt: skip
WIDTH = 132  # characters of the table, of a terminal or not
SHOWN = 12  # rows of the table, those that do not fit besides
SYSTEM = "lorafusion"


class Source(NamedTuple):
    """What is to be trained. config: the jobs file, where that is what was named; capacity: what it states."""

    path: Path
    workload: Workload
    model: ModelConfig
    name: str
    config: TrainConfig | None = None

    @property
    def capacity(self) -> int | None:
        return self.config.capacity if self.config else None

    @property
    def recomputes(self) -> bool:
        """Does the jobs file ask that all layers recompute their activations?"""
        return self.config is not None and self.config.recomputed_share == 1


def read_source(path: Path, model: str | None) -> Source:
    """A workload file with a name of configs/models, or a jobs file, which names its model."""
    if path.suffix not in (".yaml", ".yml"):
        workload = Workload.read(path)
        if model is None:
            raise UserError(f"--model: expected the base model of {path}, as a workload names none; found none")
        return Source(path, workload, read_model(model), model)
    config = read_train_config(path)  # before torch is imported, which takes seconds
    if model is not None:
        raise UserError(f"--model: {path} names its model, {config.model}; found {model} too")
    from lorafusion.train.prepare import base_model, prepare

    base = base_model(config)
    with tempfile.TemporaryDirectory(prefix="lorafusion-") as scratch:
        # How many stages it has is to be found out.
        workload = prepare(config.model_copy(update={"processes": 1, "data_parallel": 1}), base, Path(scratch))
    return Source(path, workload, base, config.model, config)


def costs_by_stages(source: Source, path: Path | None, checkpointing: bool) -> Callable[[int], CostModel]:
    """The cost model by the number of stages: by the model's FLOP, or by a file, which is a profile of the model or a
    cost model whose layers are divided anew. A jobs file may ask for graphs."""
    if source.config is not None and source.config.plans_graphs(source.model):
        eager = costs_by_stages(source._replace(config=None), path, checkpointing)
        return lambda stages: eager(stages).captured()
    if path is None or is_profile(path):
        # Of GPUs, also where a jobs file says that it is tried on a CPU.
        return lambda stages: costs_for(Question(stages, source.model, path, checkpointing=checkpointing))
    read = read_cost_model(path)
    layers = source.model.num_hidden_layers
    if sum(read.layers) != layers:
        raise UserError(f"{path}: layers: {sum(read.layers)} of all stages, but {source.name} has {layers}")
    return read.model_copy(update={"checkpointing": checkpointing or read.checkpointing}).divided


def print_choices(choices: list[Choice]) -> None:
    """A table of the fastest choices, and lines for those that do not fit."""
    table = Table(box=None)
    for name in COLUMNS:
        table.add_column(name, justify="right")
    for choice in [choice for choice in choices if not choice.reason][:SHOWN]:
        sizes = (choice.groups, choice.at_once, choice.stages, choice.data_parallel, choice.nodes, choice.idle)
        tokens = (choice.capacity, choice.largest_capacity)
        numbers = (f"{choice.throughput:,.0f}", f"{choice.bubble:.1%}", f"{choice.memory / GIB:.1f}")
        times = (duration(choice.makespan), gpu_hours(choice))
        table.add_row(*map(str, (*sizes, *tokens)), *numbers, *times)
    console = Console(highlight=False)
    console.width = max(console.width, WIDTH)
    console.print(table)
    for choice in (choice for choice in choices if choice.reason):
        print(f"{choice.stages} stage{'s' * (choice.stages > 1)}: {choice.reason}")


def duration(seconds: float) -> str:
    """Seconds in the unit that suits them."""
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} s"


def gpu_hours(choice: Choice) -> str:
    """With two decimals, of less than a tenth with two digits."""
    hours = choice.gpu_hours
    return f"{hours:,.2f}" if hours >= 0.1 else f"{hours:.2g}"


def to_json(source: Source, cluster: Cluster, choices: list[Choice]) -> str:
    """All choices, the best first; of it also the adapters and seconds of each group."""
    chosen, names = choices[0], [job.name for job in source.workload.jobs]
    rows = [choice._asdict() for choice in choices]
    for row in rows:
        row.pop("members"), row.pop("times")
    groups = [
        {"jobs": [names[job] for job in jobs], "seconds": seconds}
        for jobs, seconds in zip(chosen.members, chosen.times, strict=True)
    ]
    data = {"version": VERSION, "workload_hash": source.workload.content_hash, "model": source.name}
    data |= {"cluster": cluster._asdict(), "choices": rows, "groups": groups}
    return json.dumps(data, indent=1) + "\n"


def write_timeline(search: Search, choices: list[Choice], path: Path) -> None:
    """The slowest group of the best choice, for Perfetto."""
    plan, timeline = search.timeline(choices[0], SYSTEM)
    write_trace(timeline, plan, path)
    print(f"{path}: open it in https://ui.perfetto.dev")


def require_new(folder: Path) -> None:
    """Raise `UserError` unless a folder is new or empty: files of other groups in it would be trained too."""
    is_empty = folder.is_dir() and not any(folder.iterdir())
    if not is_empty and (folder.exists() or folder.is_symlink()):
        raise UserError(f"--write: {folder}: expected a new or an empty folder, found something there")
    require_replaceable(folder / "group-0000.yaml")


def write_groups(source: Source, choices: list[Choice], checkpointing: bool, folder: Path) -> None:
    """A jobs file, or a workload file, of each group of the best choice."""
    choice = choices[0]
    for index, members in enumerate(choice.members):
        name = f"group-{index:04}"
        if source.config is None:
            jobs = tuple(source.workload.jobs[job] for job in members)
            write(folder / f"{name}.json", Workload(name=name, jobs=jobs).to_json())
        else:
            from lorafusion.train.groups import group_file

            names = {source.workload.jobs[job].name for job in members}
            processes = choice.stages * choice.data_parallel
            text = group_file(source.config, name, names, processes, choice.data_parallel, checkpointing)
            write(folder / f"{name}.yaml", text)


def print_next(
    source: Source, cluster: Cluster, choices: list[Choice], checkpointing: bool, folder: Path | None
) -> None:
    """The best choice in a line, and the commands that follow it."""
    choice = choices[0]
    size, plural = f"{choice.stages} x {choice.data_parallel}", "s" * (choice.groups > 1)
    at_once = f", {choice.at_once} at once" * (choice.at_once < choice.groups)
    print(
        f"best: {choice.groups} group{plural} of {size} GPUs{at_once}, {choice.idle} of {cluster.gpus} idle; "
        f"{choice.throughput:,.0f} tokens/s, {duration(choice.makespan)}, {gpu_hours(choice)} GPU-hours"
    )
    if choice.nodes > 1:
        print(f"A group is on {choice.nodes} nodes, and `lorafusion train` runs on one: this can only be planned.")
    path, place = shlex.quote(str(source.path)), shlex.quote(str(folder or "groups"))
    if choice.groups > 1 and folder is None:
        print("next: the same command with `--write groups`, which writes a file of each group")
    elif source.config is not None and folder is None:
        keys = f"processes: {choice.stages * choice.data_parallel}, data_parallel: {choice.data_parallel}"
        print(f"next: in {path} {keys}{', checkpointing: all' * checkpointing}; then `lorafusion train {path}`")
    elif source.config is not None:
        print(f"next: for file in {place}/group-*.yaml; do lorafusion train $file; done  # or an array of Slurm jobs")
    else:
        sizes = f"--stages {choice.stages} --data-parallel {choice.data_parallel} --capacity {choice.capacity}"
        line = f"lorafusion plan FILE --model {shlex.quote(source.name)} {sizes} --out"
        if folder is None:
            print(f"next: {line.replace('FILE', path)} plan.json")
        else:
            print(f"next: for file in {place}/group-*.json; do {line.replace('FILE', '$file')} $file.plan; done")
