"""What checks train on, the toy jobs, and the runs that are compared: ours in processes, plain libraries' here."""

from __future__ import annotations

import gc
import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import yaml

from lorafusion.core.config import ModelConfig, read_model
from lorafusion.core.plan import Plan
from lorafusion.core.schema import UserError
from lorafusion.core.workload import ALL_LINEAR, Job, Sample, Workload
from lorafusion.engine.fork_server import launch
from lorafusion.lab.suite import Arrangement, Suite
from lorafusion.launch.spec import RunSpec
from lorafusion.planning import plan_system

if TYPE_CHECKING:
    import torch

RUN_SECONDS = 300
CAPACITY = 96  # of a microbatch, in tokens of the toy jobs


class Ground(NamedTuple):
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
    def is_exact(self) -> bool:
        return self.dtype == "float64"

    @property
    def config(self) -> ModelConfig:
        config = read_model(self.model)
        return config.model_copy(update={"num_hidden_layers": self.layers}) if self.layers else config

    def has_room_for(self, arrangement: Arrangement) -> bool:
        """Has the model as many layers as stages, and this machine as many GPUs as processes?"""
        if arrangement.stages > self.config.num_hidden_layers:
            return False
        if self.device == "cpu":
            return True
        import torch

        return arrangement.stages * arrangement.replicas <= torch.cuda.device_count()


EXACT = Ground()


def grounds_of(suite: Suite | None) -> list[Ground]:
    """What a suite's checks train on: exactly on the CPU, always; and the measured path on the suite's own device and
    in its dtype, on the tiny model and on two layers of each of the suite's."""
    if suite is None or suite.device == "cpu":
        return [EXACT]
    models = dict.fromkeys(model for grid in suite.cells for model in grid.models if model != EXACT.model)
    own = [Ground(device=suite.device, dtype=suite.dtype)]
    return [EXACT, *own, *(Ground(model, 2, suite.device, suite.dtype, stretch=40) for model in models)]


@dataclass(frozen=True)
class Trained:
    """What a run leaves: the losses of each job's global batches, and each job's adapter by tensor name; the gradients
    of each one's first step, where they were asked for; and the plan that was followed, if there was one."""

    losses: dict[str, list[float]]
    weights: dict[str, dict]
    gradients: dict[str, dict] = field(default_factory=dict)
    plan: Plan | None = None


def toy_jobs(learning_rate: float = 1e-2, dropout: float = 0.1, stretch: int = 1) -> tuple[Job, ...]:
    """Two adapters that differ in everything that must not leak from one to the other. No border between samples that
    are stretched is a multiple of anything."""
    lengths = (
        [19, 7, 33, 12, 26, 5, 14, 21, 9, 30, 17, 11],
        [40, 8, 15, 23, 6, 31, 10, 18],
    )
    shapes = ((4, 8.0, dropout, 4, ("q_proj", "v_proj", "down_proj")), (6, 6.0, 2 * dropout, 3, ALL_LINEAR))
    return tuple(
        Job(
            name=f"job-{index}",
            dataset="toy",
            rank=rank,
            alpha=alpha,
            dropout=probability,
            target_modules=modules,
            learning_rate=learning_rate,
            seed=index + 1,
            global_batch_size=batch,
            epochs=2,
            samples=tuple(Sample(i, stretch * (tokens - 1) + 1) for i, tokens in enumerate(lengths[index])),
        )
        for index, (rank, alpha, probability, batch, modules) in enumerate(shapes)
    )


def train_plainly(jobs: Sequence[Job], ground: Ground, dtype: str) -> Trained:
    """Each job by plain libraries, from the weights that runs on the ground begin with."""
    import torch

    from lorafusion.lab import plain_training

    drawn, device = getattr(torch, ground.dtype), torch.device(ground.device)
    trained = {
        job.name: plain_training.train_plainly(job, ground.config, getattr(torch, dtype), device=device, drawn=drawn)
        for job in jobs
    }
    return Trained(
        {name: one.losses for name, one in trained.items()}, {name: one.weights for name, one in trained.items()}
    )


def train(
    workload: Workload,
    system: str,
    stages: int,
    capacity: int = CAPACITY,
    checkpointing: bool = False,
    dtype: str | None = None,
    replicas: int = 1,
    ground: Ground = EXACT,
    initial: dict[str, dict[str, torch.Tensor]] | None = None,
) -> Trained:
    """Train a workload on a ground and bring back losses and adapters. dtype: by default the ground's.

    initial: the adapters of jobs that are trained in part already; then the gradients of the first steps come back too.
    """
    from safetensors.torch import load_file

    with tempfile.TemporaryDirectory(prefix="lorafusion-check-") as directory:
        folder = Path(directory)
        plan = plan_system(workload, system, stages=stages, capacity=capacity * ground.stretch, data_parallel=replicas)
        (folder / "workload.json").write_text(workload.to_json())
        (folder / "plan.json").write_text(plan.to_json())
        (folder / "model.yaml").write_text(yaml.safe_dump(ground.config.model_dump(mode="json")))
        spec = RunSpec(
            system=system,
            model=str(folder / "model.yaml"),
            workload=str(folder / "workload.json"),
            plan=str(folder / "plan.json"),
            device=ground.device,
            dtype=dtype or ground.dtype,
            adapter_dtype=dtype or ground.dtype,
            save_adapters=str(folder / "adapters"),
            checkpointing=float(checkpointing),
        )
        if initial is not None:
            write_initial(workload.jobs, initial, folder / "initial")
            folders = {"initial": str(folder / "initial"), "save_gradients": str(folder / "gradients")}
            spec = spec.model_copy(update=folders)
        _release(ground)
        outcome = launch(spec, stages * replicas, RUN_SECONDS)
        if outcome.status != "ok":
            raise UserError(
                f"check: the run of {system} on {stages} stage(s) ended as {outcome.status}: {outcome.note}"
            )
        weights = {
            job.name: load_file(folder / "adapters" / job.name / "adapter_model.safetensors") for job in workload.jobs
        }
        gradients = {name: _read_all(folder / "gradients" / name) for name in initial or ()}
        losses = outcome.report["losses"]
        finite = all(math.isfinite(value) for values in losses.values() for value in values) and all(
            bool(tensor.isfinite().all()) for state in weights.values() for tensor in state.values()
        )
        if not finite:
            raise UserError(
                f"check: the run of {system} on {stages} stage(s) gave a loss or a weight that is no number"
            )
        return Trained(losses, weights, gradients, plan)


def _release(ground: Ground) -> None:
    """Leave a GPU's memory, which plain training had, to the run's processes."""
    if ground.device == "cuda":
        import torch

        gc.collect()  # a model of PEFT is in a cycle
        torch.cuda.empty_cache()


def write_initial(jobs: Sequence[Job], adapters: dict[str, dict[str, torch.Tensor]], folder: Path) -> None:
    """Adapters that are trained in part, as a run finds them: weights, and optimizers without memory."""
    import torch
    from safetensors.torch import save_file

    from lorafusion.engine.checkpoint import seal_initial

    folder.mkdir()
    for job in jobs:
        state = {"stopped": torch.zeros(()), "optimizer_steps": torch.tensor(float(job.start))}
        for name, weight in adapters[job.name].items():
            wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
            state |= {f"{name}/weight": weight.contiguous(), f"{name}/float32": wide.clone()}
            state |= {f"{name}/{moment}": torch.zeros_like(wide) for moment in ("exp_avg", "exp_avg_sq")}
        save_file(state, folder / f"{job.name}.safetensors")
    seal_initial(folder, {job.name: job.start for job in jobs})


def _read_all(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of all stages."""
    from safetensors.torch import load_file

    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}
