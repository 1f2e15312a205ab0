"""The checks that the figures rest on: real runs of real systems, compared, with a verdict that can be "failed"."""

from __future__ import annotations

import gc
import math
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import yaml

from lorafusion.cells import unavailable
from lorafusion.config import Arrangement, ModelConfig, Suite, SystemConfig, read_model, read_systems
from lorafusion.errors import UserError, one_of
from lorafusion.files import write
from lorafusion.plan import Plan
from lorafusion.runtime.forked import launch
from lorafusion.runtime.spec import RunSpec
from lorafusion.scheduler import plan_system
from lorafusion.seals import seal
from lorafusion.verdicts import Verdict
from lorafusion.workload import ALL_LINEAR, Job, Sample, Workload

if TYPE_CHECKING:
    import torch

RUN_SECONDS = 300
# Packing changes the shapes of the matrix products and so the order of their sums, and Adam, which divides a gradient
# by its own size, hands the relative rounding of one that nearly cancels on to the weight. In float32 one element in
# 384 of a tensor came out 1.1e-4 off, the tensor 1.7e-4; in float64 the same tensor agrees to 4e-16. So the checks
# train in float64 on the CPU, where rounding is out of the way and every fault of a plan, a mask or a scale stands out.
# The norms of transformers' layers round to float32 still, and a value on the edge of two goes the other way in one of
# 3e7: one such flip moved a loss by up to 6e-9 and a tensor by up to 8e-8.
LOSS_TOLERANCE = 1e-7
WEIGHT_TOLERANCE = 1e-6
# On a GPU the path that is measured has no float64. There the measure is the error that plain libraries make in the
# same dtype on the same device.
MOST_LOSS_ERROR = 3.0
MOST_WEIGHT_ERROR = 2.0
PLAIN = "plain libraries"
CAPACITY = 96  # of a microbatch, in tokens of the toy jobs
TOGETHER = 4 * CAPACITY  # in which both adapters end a global batch in one microbatch
CLIPPED = {"max_grad_norm": 0.05, "weight_decay": 0.1, "schedule": "linear", "warmup_steps": 2}


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


class Curve(NamedTuple):
    """The losses of a job's global batches, and who trained it: `alone`, an arrangement, or `plain libraries`."""

    job: str
    trainer: str
    losses: list[float]


@dataclass(frozen=True)
class Plain:
    """What plain libraries train on a ground. exact: in float64. rounded: in the ground's dtype, where that is another;
    what it is off by is the unit of everybody's error there."""

    exact: Trained
    rounded: Trained | None

    @classmethod
    def of(cls, jobs: Sequence[Job], ground: Ground) -> Plain:
        exact = train_plainly(jobs, ground, "float64")
        return cls(exact, None if ground.is_exact else train_plainly(jobs, ground, ground.dtype))

    @property
    def bounds(self) -> tuple[float, float]:
        """The most that `errors` may be."""
        return (MOST_LOSS_ERROR, MOST_WEIGHT_ERROR) if self.rounded else (LOSS_TOLERANCE, WEIGHT_TOLERANCE)

    def errors(self, found: Trained, jobs: Sequence[Job]) -> tuple[float, float]:
        """Of the losses, and of the adapters' tensors: the largest relative ones, or over those of plain libraries."""
        each = [(self._loss_error(found, job.name), self._weight_error(found, job.name)) for job in jobs]
        return max(loss for loss, _ in each), max(weight for _, weight in each)

    def _loss_error(self, found: Trained, job: str) -> float:
        exact, ours = self.exact.losses[job], found.losses[job]
        if self.rounded is None:
            return max(abs(one - other) / abs(other) for one, other in zip(ours, exact, strict=True))
        rounded = self.rounded.losses[job]
        unit = max(abs(one - other) for one, other in zip(rounded, exact, strict=True))
        return max(abs(one - other) for one, other in zip(ours, exact, strict=True)) / unit

    def _weight_error(self, found: Trained, job: str) -> float:
        exact, ours = self.exact.weights[job], found.weights[job]
        if ours.keys() != exact.keys():
            raise UserError(f"check: the adapters of {job} have different tensors")
        apart = {name: ours[name].to(tensor) - tensor for name, tensor in exact.items()}
        if self.rounded is None:
            return max(float(apart[name].norm() / tensor.norm()) for name, tensor in exact.items())
        # Of all tensors: where a gradient nearly cancels, its rounding decides which way Adam's whole step goes, and of
        # one tensor that makes any ratio.
        units = [self.rounded.weights[job][name].to(tensor) - tensor for name, tensor in exact.items()]
        return _norm(apart.values()) / _norm(units)


def _norm(tensors: Iterable[torch.Tensor]) -> float:
    return math.sqrt(sum(float(tensor.square().sum()) for tensor in tensors))


class Findings:
    """The errors of several runs against plain libraries, and whether all are within their bounds."""

    def __init__(self) -> None:
        self.figures: dict[str, float] = {}
        self.passed = True

    def add(self, what: str, found: Trained, plain: Plain, jobs: Sequence[Job]) -> None:
        """Compare a run. A B that did not move from zero is a fault, however well all else agrees."""
        kind = "relative difference" if plain.rounded is None else "error over that of plain libraries"
        most_loss, most_weight = plain.bounds
        loss, weight = plain.errors(found, jobs)
        moved = min(_smallest_b(found.weights[job.name]) for job in jobs)
        self.figures |= {f"{what}: {kind} of a loss": loss, f"{what}: of a tensor": weight}
        self.figures |= {f"allowed {kind} of a loss": most_loss, f"allowed {kind} of a tensor": most_weight}
        self.passed = self.passed and loss <= most_loss and weight <= most_weight and moved > 0


def lossless(
    arrangements: list[Arrangement],
    system: str = "lorafusion",
    dropout: float = 0.1,
    grounds: Sequence[Ground] = (EXACT,),
) -> tuple[Verdict, list[Curve]]:
    """Two adapters trained together, in each arrangement that a ground has room for, and each trained alone equal
    training with plain transformers, PEFT and torch (`lorafusion.outside`), step for step. So do two whose global
    batches end in one microbatch, with gradients that are clipped. The curves are those of the first ground."""
    findings, curves, left_out = Findings(), [], []
    for ground in grounds:
        where = "" if ground == EXACT else f" ({ground})"
        jobs = _jobs_for(ground, dropout)
        plain = Plain.of(jobs, ground)
        runs = {"alone": _merged([train(_workload(job), system, 1, ground=ground) for job in jobs])}
        for arrangement in arrangements:
            if ground.has_room_for(arrangement):
                runs[str(arrangement)] = train(_workload(*jobs), system, arrangement.stages, ground=ground,
                                               checkpointing=arrangement.recompute,
                                               replicas=arrangement.replicas)  # fmt: skip
            else:
                left_out.append(f"{arrangement} on {ground}")
        for trainer, run in runs.items():
            findings.add(f"trained {trainer if trainer == 'alone' else f'as {trainer}'}{where}", run, plain, jobs)
        clipped = [job.model_copy(update=CLIPPED) for job in jobs]
        run = train(_workload(*clipped), system, 1, TOGETHER, ground=ground)
        if max(len(one.step_after) for one in run.plan.microbatches) < len(jobs):
            raise UserError(
                f"check lossless: the adapters never step after one microbatch of {system}; it proves nothing"
            )
        findings.add(f"clipped, stepping together{where}", run, Plain.of(clipped, ground), clipped)
        if not curves:
            runs[PLAIN] = plain.exact
            curves = [Curve(job.name, trainer, run.losses[job.name]) for trainer, run in runs.items() for job in jobs]
    names = ", ".join(map(str, arrangements))
    statement = (
        f"{system}: two adapters trained together (stages x replicas: {names}), and each alone, equal plain "
        f"transformers, PEFT and torch{_left_out('no room here', left_out)}"
    )
    return Verdict(check="lossless", passed=findings.passed, statement=statement, figures=findings.figures), curves


def _jobs_for(ground: Ground, dropout: float) -> tuple[Job, ...]:
    """The toy jobs; of a large model for one epoch and without dropout: to draw its masks on the CPU takes a minute,
    and the gradients are checked with them."""
    jobs = toy_jobs(dropout=0.0 if ground.layers else dropout, stretch=ground.stretch)
    return tuple(job.model_copy(update={"epochs": 1}) for job in jobs) if ground.layers else jobs


def _workload(*jobs: Job) -> Workload:
    return Workload(name="check", jobs=jobs)


def _merged(runs: Sequence[Trained]) -> Trained:
    """Runs of different jobs as one."""
    losses = {name: values for run in runs for name, values in run.losses.items()}
    return Trained(losses, {name: state for run in runs for name, state in run.weights.items()})


def _left_out(why: str, names: Sequence[str]) -> str:
    return f"; left out, {why}: {', '.join(names)}" if names else ""


def _smallest_b(weights: dict) -> float:
    return min(float(tensor.norm()) for name, tensor in weights.items() if "lora_B" in name)


def train_plainly(jobs: Sequence[Job], ground: Ground, dtype: str) -> Trained:
    """Each job by plain libraries, from the weights that runs on the ground begin with."""
    import torch

    from lorafusion import outside

    drawn, device = getattr(torch, ground.dtype), torch.device(ground.device)
    trained = {
        job.name: outside.train_plainly(job, ground.config, getattr(torch, dtype), device=device, drawn=drawn)
        for job in jobs
    }
    return Trained(
        {name: one.losses for name, one in trained.items()}, {name: one.weights for name, one in trained.items()}
    )


def write_curves(curves: list[Curve], path: Path) -> None:
    """All losses as CSV: job, trainer, step (from 1), loss."""
    lines = ["job,trainer,step,loss"]
    for curve in curves:
        lines += [f"{curve.job},{curve.trainer},{step},{loss!r}" for step, loss in enumerate(curve.losses, 1)]
    write(path, "\n".join(lines) + "\n")
    seal(path)


def systems(names: list[str], arrangement: Arrangement, grounds: Sequence[Ground] = (EXACT,)) -> Verdict:
    """Each system, in an arrangement of so many processes that it can have, trains without dropout what plain
    transformers, PEFT and torch train. Those whose package is missing are left out, and the statement says so."""
    known, findings = read_systems(), Findings()
    for name in names:
        one_of("system", name, set(known), "check systems")
    missing = [name for name in names if unavailable(known[name])]
    for ground in grounds:
        jobs, where = toy_jobs(dropout=0.0, stretch=ground.stretch), "" if ground == EXACT else f" ({ground})"
        plain = Plain.of(jobs, ground)
        wanted = arrangement if ground.has_room_for(arrangement) else Arrangement(1, 1, arrangement.recompute)
        for name in names:
            if name not in missing:
                chosen = possible(wanted, known[name])
                trained = train(_workload(*jobs), name, chosen.stages, ground=ground, checkpointing=chosen.recompute,
                                replicas=chosen.replicas)  # fmt: skip
                findings.add(f"{name} as {chosen}{where}", trained, plain, jobs)
    left_out = _left_out("as their package is missing", missing)
    statement = f"every system trains what plain transformers, PEFT and torch train without dropout{left_out}"
    passed = findings.passed and len(missing) < len(names)
    return Verdict(check="systems", passed=passed, statement=statement, figures=findings.figures)


def possible(arrangement: Arrangement, system: SystemConfig) -> Arrangement:
    """The arrangement, or of as many processes the one that a system can have, or one process."""
    processes = arrangement.stages * arrangement.replicas
    if system.max_gpus is not None and processes > system.max_gpus:
        return arrangement._replace(stages=1, replicas=1)
    if system.max_stages is not None and arrangement.stages > system.max_stages:
        return arrangement._replace(stages=1, replicas=processes)
    return arrangement


def learning(system: str = "lorafusion", grounds: Sequence[Ground] = (EXACT,)) -> Verdict:
    """On a toy language the weights change and every adapter's loss falls to less than half, on the tiny model."""
    jobs = tuple(job.model_copy(update={"epochs": 20}) for job in toy_jobs(learning_rate=3e-2))
    figures, passed = {}, True
    for ground in grounds:
        if ground.model != EXACT.model:  # a large one has words to learn for longer than a check may take
            continue
        trained = train(_workload(*jobs), system, 1, ground=ground)
        ratio = max(values[-1] / values[0] for values in trained.losses.values())
        moved = min(_smallest_b(weights) for weights in trained.weights.values())
        figures |= {
            f"largest ratio of last to first loss ({ground})": ratio,
            f"smallest norm of a trained B, zero at the start ({ground})": moved,
        }
        passed = passed and ratio < 0.5 and moved > 0
    return Verdict(
        check="learning",
        passed=passed and bool(figures),
        statement=f"{system}: on a toy language every adapter's loss falls to less than half and its weights change",
        figures=figures,
    )


def plans(paths: list[Path], workloads: list[Path]) -> Verdict:
    """Every plan passes the checker against its workload; raises `PlanError` at the first that does not."""
    from lorafusion.plan import check

    by_hash = {workload.content_hash: workload for workload in map(Workload.read, workloads)}
    microbatches = noops = 0
    for path in paths:
        plan = Plan.read(path)
        if plan.workload_hash not in by_hash:
            raise UserError(f"{path}: made for workload {plan.workload_hash}, which is not among those given")
        check(plan, by_hash[plan.workload_hash], source=path)
        microbatches += plan.statistics.microbatches
        noops += plan.statistics.noops
    return Verdict(
        check="plans",
        passed=True,
        statement="every plan: each sample once an epoch, exact steps, capacity, the dependency rule",
        figures={"plans": len(paths), "microbatches": microbatches, "no-ops": noops},
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

    from lorafusion.runtime.checkpoint import seal_initial

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
