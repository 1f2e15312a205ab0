"""The runs that checks compare: two toy jobs, trained by a system in processes, or by plain libraries in this one."""

import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
import yaml
from safetensors.torch import load_file, save_file

from lorafusion.core.clock import free_memory
from lorafusion.core.config import ModelConfig, read_model
from lorafusion.core.plan import Plan
from lorafusion.core.schema import UserError
from lorafusion.core.workload import ALL_LINEAR, Job, Sample, Workload
from lorafusion.engine.checkpoint import seal_initial
from lorafusion.lab import plain_training
from lorafusion.lab.forked import launch
from lorafusion.lab.suite import Arrangement, Suite
from lorafusion.launch.spec import RunSpec
from lorafusion.planning import plan_system

RUN_SECONDS = 300
Tensors = dict[str, torch.Tensor]  # of an adapter, by their names
SINGLE = Arrangement(1, 1, False)
CAPACITY = 96  # of a microbatch, in tokens of the toy jobs


class Setup(NamedTuple):
    """What a check trains on. layers: how many of the model's there are, all by default; stretch: of the toy jobs'
    samples, so that a model of real width gets microbatches of real length."""

    model: str = "tiny"
    layers: int | None = None
    device: str = "cpu"
    dtype: str = "float64"
    stretch: int = 1

    def __str__(self) -> str:
        part = f", {self.layers} layers" if self.layers else ""
        return f"{self.model}{part}, {self.dtype} on {self.device}"

    @property
    def suffix(self) -> str:
        """Of the figures of a setup other than `EXACT`."""
        return "" if self == EXACT else f" ({self})"

    @property
    def config(self) -> ModelConfig:
        config = read_model(self.model)
        return config.model_copy(update={"num_hidden_layers": self.layers}) if self.layers else config

    @property
    def base(self) -> plain_training.Base:
        return plain_training.Base(self.config, getattr(torch, self.dtype), torch.device(self.device))

    def has_room_for(self, arrangement: Arrangement) -> bool:
        """Has the model as many layers as stages, and this machine as many GPUs as processes?"""
        if arrangement.stages > self.config.num_hidden_layers:
            return False
        return self.device == "cpu" or arrangement.stages * arrangement.replicas <= torch.cuda.device_count()


EXACT = Setup()


def setups_of(suite: Suite) -> list[Setup]:
    """What a suite's checks train on: exactly on the CPU, always; and the measured path on the suite's own device and
    in its dtype, on the tiny model and on two layers of each of the suite's."""
    if suite.device == "cpu":
        return [EXACT]
    models = dict.fromkeys(model for grid in suite.cells for model in grid.models if model != EXACT.model)
    tiny = Setup(device=suite.device, dtype=suite.dtype)
    return [EXACT, tiny, *(Setup(model, 2, suite.device, suite.dtype, stretch=40) for model in models)]


@dataclass(frozen=True)
class TrainingResult:
    """What a run leaves: the losses of each job's global batches, and each job's adapter by tensor name; the gradients
    of each one's first step, where they were asked for; and the plan that was followed, if there was one."""

    losses: dict[str, list[float]]
    weights: dict[str, Tensors]
    gradients: dict[str, Tensors] = field(default_factory=dict)
    plan: Plan | None = None


def toy_jobs(learning_rate: float = 1e-2, dropout: float = 0.1, stretch: int = 1) -> tuple[Job, ...]:
    """Two adapters that differ in everything that must not leak from one to the other. No border between samples that
    are stretched is a multiple of anything."""
    lengths = ([19, 7, 33, 12, 26, 5, 14, 21, 9, 30, 17, 11], [40, 8, 15, 23, 6, 31, 10, 18])
    shapes = ((4, 8.0, dropout, 4, ("q_proj", "v_proj", "down_proj")), (6, 6.0, 2 * dropout, 3, ALL_LINEAR))
    return tuple(
        Job(name=f"job-{index}", dataset="toy", rank=rank, alpha=alpha, dropout=probability, target_modules=modules,
            learning_rate=learning_rate, seed=index + 1, global_batch_size=batch, epochs=2,
            samples=tuple(Sample(i, stretch * (tokens - 1) + 1) for i, tokens in enumerate(lengths[index])))
        for index, (rank, alpha, probability, batch, modules) in enumerate(shapes)
    )  # fmt: skip


def train_plainly(jobs: Sequence[Job], setup: Setup, dtype: str) -> TrainingResult:
    """Each job by plain libraries, from the weights that runs of the setup begin with."""
    results = {job.name: plain_training.train_plainly(job, setup.base, getattr(torch, dtype)) for job in jobs}
    losses = {name: result.losses for name, result in results.items()}
    return TrainingResult(losses, {name: result.weights for name, result in results.items()})


def train(
    workload: Workload,
    system: str,
    arrangement: Arrangement = SINGLE,
    capacity: int = CAPACITY,
    setup: Setup = EXACT,
    initial: dict[str, Tensors] | None = None,
) -> TrainingResult:
    """Train a workload by a system and bring back losses and adapters.

    initial: the adapters of jobs that are trained in part already; then the gradients of the first steps come back too.
    """
    stages, replicas, recompute = arrangement
    plan = plan_system(workload, system, stages=stages, capacity=capacity * setup.stretch, data_parallel=replicas)
    with tempfile.TemporaryDirectory(prefix="lorafusion-check-") as directory:
        folder = Path(directory)
        settings = {"device": setup.device, "dtype": setup.dtype, "checkpointing": float(recompute),
                    "save_adapters": str(folder / "adapters")}  # fmt: skip
        if initial is not None:
            write_initial(workload.jobs, initial, folder / "initial")
            settings |= {"initial": str(folder / "initial"), "save_gradients": str(folder / "gradients")}
        spec = write_spec(folder, system, setup.config.model_dump(mode="json"), workload, plan, **settings)
        free_memory()  # of a GPU, which plain training had, for the run's processes
        outcome = launch(spec, stages * replicas, RUN_SECONDS)
        run = f"check: the run of {system} on {stages} stage(s)"
        if outcome.status != "ok":
            raise UserError(f"{run} ended as {outcome.status}: {outcome.note}")
        weights = {job.name: _read_all(folder / "adapters" / job.name) for job in workload.jobs}
        gradients = {name: _read_all(folder / "gradients" / name) for name in initial or ()}
        losses = outcome.report["losses"]
        tensors = [tensor for adapter in weights.values() for tensor in adapter.values()]
        sound = all(map(math.isfinite, sum(losses.values(), [])))
        if not (sound and all(bool(tensor.isfinite().all()) for tensor in tensors)):
            raise UserError(f"{run} gave a loss or a weight that is no number")
        return TrainingResult(losses, weights, gradients, plan)


def write_spec(folder: Path, system: str, model: dict, workload: Workload, plan: Plan, **settings: object) -> RunSpec:
    """A run of a plan, whose files are written to a folder. settings: fields of `RunSpec`; adapters have its dtype."""
    texts = {"model.yaml": yaml.safe_dump(model), "workload.json": workload.to_json(), "plan.json": plan.to_json()}
    for name, text in texts.items():
        (folder / name).write_text(text)
    paths = {name.partition(".")[0]: str(folder / name) for name in texts}
    return RunSpec(system=system, adapter_dtype=settings["dtype"], **paths, **settings)


def write_initial(jobs: Sequence[Job], adapters: dict[str, Tensors], folder: Path) -> None:
    """Adapters that are trained in part, as a run finds them: weights, and optimizers without memory."""
    folder.mkdir()
    for job in jobs:
        state = {"stopped": torch.zeros(()), "optimizer_steps": torch.tensor(float(job.start))}
        for name, weight in adapters[job.name].items():
            wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
            state |= {f"{name}/weight": weight.contiguous(), f"{name}/float32": wide.clone()}
            state |= {f"{name}/{moment}": torch.zeros_like(wide) for moment in ("exp_avg", "exp_avg_sq")}
        save_file(state, folder / f"{job.name}.safetensors")
    seal_initial(folder, {job.name: job.start for job in jobs})


def _read_all(folder: Path) -> Tensors:
    """The tensors of all stages."""
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}
