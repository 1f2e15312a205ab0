"""The checks that the figures rest on: real runs of real systems, compared, with a verdict that can be "failed"."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from lorafusion.core.config import SystemConfig, read_systems
from lorafusion.core.files import write
from lorafusion.core.plan import Plan
from lorafusion.core.schema import UserError, one_of
from lorafusion.core.seals import seal
from lorafusion.core.workload import Job, Workload
from lorafusion.lab.checks.grounds import CAPACITY, EXACT, Ground, Trained, toy_jobs, train, train_plainly
from lorafusion.lab.checks.verdicts import Verdict
from lorafusion.lab.experiments.end_to_end import unavailable
from lorafusion.lab.suite import Arrangement

if TYPE_CHECKING:
    import torch

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
# Relative, of a loss: less than bfloat16 rounds one number by, at most 2^-8, is nobody's fault. A job has six losses or
# so, and those of plain libraries may all be right by chance: on an H200 the error of others was up to 3.6 of theirs
# where gradients and weights were as good.
LOSS_ROUNDING = 2**-9
MOST_LAST_LOSS = 0.5  # over the first, of what an adapter learns in `learning`
PLAIN = "plain libraries"
TOGETHER = 4 * CAPACITY  # in which both adapters end a global batch in one microbatch
CLIPPED = {"rslora": True, "max_grad_norm": 0.05, "weight_decay": 0.1, "schedule": "linear", "warmup_steps": 2}


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
        return self._loss_error(found, jobs), max(self._weight_error(found, job.name) for job in jobs)

    def _loss_error(self, found: Trained, jobs: Sequence[Job]) -> float:
        exact, ours = ([loss for job in jobs for loss in one.losses[job.name]] for one in (self.exact, found))
        if self.rounded is None:
            return max(abs(one - other) / abs(other) for one, other in zip(ours, exact, strict=True))
        rounded = [loss for job in jobs for loss in self.rounded.losses[job.name]]
        least = LOSS_ROUNDING * math.hypot(*exact) / MOST_LOSS_ERROR
        return math.dist(ours, exact) / max(math.dist(rounded, exact), least)

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
        self.limits: dict[str, float] = {}
        self.passed = True

    def add(self, what: str, found: Trained, plain: Plain, jobs: Sequence[Job]) -> None:
        """Compare a run. A B that did not move from zero is a fault, however well all else agrees."""
        kind = "relative difference" if plain.rounded is None else "error over that of plain libraries"
        most_loss, most_weight = plain.bounds
        loss, weight = plain.errors(found, jobs)
        moved = min(_smallest_b(found.weights[job.name]) for job in jobs)
        of_loss, of_tensor = f"{what}: {kind} of a loss", f"{what}: of a tensor"
        self.figures |= {of_loss: loss, of_tensor: weight}
        self.limits |= {of_loss: most_loss, of_tensor: most_weight}
        self.passed = self.passed and loss <= most_loss and weight <= most_weight and moved > 0


def lossless(
    arrangements: list[Arrangement],
    system: str = "lorafusion",
    dropout: float = 0.1,
    grounds: Sequence[Ground] = (EXACT,),
) -> tuple[Verdict, list[Curve]]:
    """Two adapters trained together, in each arrangement that a ground has room for, and each trained alone equal
    training with plain transformers, PEFT and torch (`plain_training`), step for step. So do two whose global
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
    return Verdict(
        check="lossless", passed=findings.passed, statement=statement, figures=findings.figures, limits=findings.limits
    ), curves


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
    return Verdict(
        check="systems", passed=passed, statement=statement, figures=findings.figures, limits=findings.limits
    )


def possible(arrangement: Arrangement, system: SystemConfig) -> Arrangement:
    """The arrangement, or of as many processes the one that a system can have, or one process."""
    processes = arrangement.stages * arrangement.replicas
    if system.max_gpus is not None and processes > system.max_gpus:
        return arrangement._replace(stages=1, replicas=1)
    if system.max_stages is not None and arrangement.stages > system.max_stages:
        return arrangement._replace(stages=1, replicas=processes)
    return arrangement


def learning(system: str = "lorafusion", grounds: Sequence[Ground] = (EXACT,)) -> Verdict:
    """On a toy language the weights change and every adapter's loss falls to half or less, on the tiny model."""
    jobs = tuple(job.model_copy(update={"epochs": 20}) for job in toy_jobs(learning_rate=3e-2))
    figures, limits, passed = {}, {}, True
    for ground in grounds:
        if ground.model != EXACT.model:  # a large one has words to learn for longer than a check may take
            continue
        trained = train(_workload(*jobs), system, 1, ground=ground)
        ratio = max(values[-1] / values[0] for values in trained.losses.values())
        moved = min(_smallest_b(weights) for weights in trained.weights.values())
        of_losses = f"largest ratio of last to first loss ({ground})"
        figures |= {of_losses: ratio, f"smallest norm of a trained B, zero at the start ({ground})": moved}
        limits[of_losses] = MOST_LAST_LOSS
        passed = passed and ratio <= MOST_LAST_LOSS and moved > 0
    return Verdict(
        check="learning",
        passed=passed and bool(figures),
        statement=f"{system}: on a toy language every adapter's loss falls to less than half and its weights change",
        figures=figures,
        limits=limits,
    )


def plans(paths: list[Path], workloads: list[Path]) -> Verdict:
    """Every plan passes the checker against its workload; raises `PlanError` at the first that does not."""
    from lorafusion.core.plan import check

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
