"""The checks that the figures rest on: real runs of real systems, compared, with a verdict that can be "failed"."""

from __future__ import annotations

import json
import math
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

from lorafusion.cells import unavailable
from lorafusion.config import Arrangement, SystemConfig, read_model, read_systems
from lorafusion.errors import UserError, one_of
from lorafusion.files import write
from lorafusion.plan import Plan
from lorafusion.runtime.launch import launch
from lorafusion.runtime.spec import RunSpec
from lorafusion.scheduler import plan_system
from lorafusion.seals import seal
from lorafusion.workload import ALL_LINEAR, Job, Sample, Workload

RUN_SECONDS = 300
# Packing changes the shapes of the matrix products and so the order of their sums, and Adam, which divides a gradient
# by its own size, hands the relative rounding of one that nearly cancels on to the weight. In float32 one element in
# 384 of a tensor came out 1.1e-4 off, the tensor 1.7e-4; in float64 the same tensor agrees to 4e-16. So the checks
# train in float64, where rounding is out of the way and every fault of a plan, a mask or a scale stands out. The norms
# of transformers' layers round to float32 still, and a value on the edge of two goes the other way in one of 3e7: one
# such flip moved a loss by up to 6e-9 and a tensor by up to 8e-8.
DTYPE = "float64"
MODEL = "tiny"
PLAIN = "plain libraries"
LOSS_TOLERANCE = 1e-7
WEIGHT_TOLERANCE = 1e-6


@dataclass(frozen=True)
class Verdict:
    """The outcome of a check: did it hold, and by which figures."""

    check: str
    passed: bool
    statement: str
    figures: dict[str, float]


@dataclass(frozen=True)
class Trained:
    """What a run leaves: the losses of each job's global batches, and each job's adapter by tensor name."""

    losses: dict[str, list[float]]
    weights: dict[str, dict]


def toy_jobs(learning_rate: float = 1e-2, dropout: float = 0.1) -> tuple[Job, ...]:
    """Two adapters that differ in everything that must not leak from one to the other."""
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
            samples=tuple(Sample(i, tokens) for i, tokens in enumerate(lengths[index])),
        )
        for index, (rank, alpha, probability, batch, modules) in enumerate(shapes)
    )


class Curve(NamedTuple):
    """The losses of a job's global batches, and who trained it: `alone`, an arrangement, or `plain libraries`."""

    job: str
    trainer: str
    losses: list[float]


def lossless(
    arrangements: list[Arrangement], system: str = "lorafusion", dropout: float = 0.1
) -> tuple[Verdict, list[Curve]]:
    """Two adapters trained together, in each arrangement, equal each trained alone in one process, step for step; and
    that equals training with plain transformers, PEFT and torch (`lorafusion.outside`)."""
    jobs = toy_jobs(dropout=dropout)
    alone = {job.name: train(Workload(name="alone", jobs=(job,)), system, 1) for job in jobs}
    curves, errors, moved = [], {}, math.inf
    for arrangement in arrangements:
        together = train(Workload(name="together", jobs=jobs), system, arrangement.stages,
                         checkpointing=arrangement.recompute, replicas=arrangement.replicas)  # fmt: skip
        found = [_difference(together, alone[job.name], job) for job in jobs]
        errors[f"trained as {arrangement}"] = tuple(map(max, zip(*found, strict=True)))
        curves += [Curve(job.name, str(arrangement), together.losses[job.name]) for job in jobs]
        moved = min(moved, *(_smallest_b(together.weights[job.name]) for job in jobs))
    plain = _plainly(jobs)
    found = [_difference(plain, alone[job.name], job) for job in jobs]
    errors["trained with plain libraries"] = tuple(map(max, zip(*found, strict=True)))
    for trainer, losses in (("alone", {name: one.losses[name] for name, one in alone.items()}), (PLAIN, plain.losses)):
        curves += [Curve(name, trainer, values) for name, values in losses.items()]
    figures = {}
    for trainer, (loss, weight) in errors.items():
        figures |= {f"{trainer}: relative difference of a loss": loss, f"{trainer}: of a tensor": weight}
    figures |= {"allowed difference of a loss": LOSS_TOLERANCE, "allowed difference of a tensor": WEIGHT_TOLERANCE,
                "smallest norm of a trained B (zero at the start)": moved}  # fmt: skip
    passed = moved > 0 and all(
        loss <= LOSS_TOLERANCE and weight <= WEIGHT_TOLERANCE for loss, weight in errors.values()
    )
    names = ", ".join(map(str, arrangements))
    statement = (
        f"{system}: two adapters trained together (stages x replicas: {names}) equal each trained alone, and that "
        f"equals plain transformers, PEFT and torch"
    )
    return Verdict("lossless", passed, statement, figures), curves


def _difference(one: Trained, other: Trained, job: Job) -> tuple[float, float]:
    """The largest relative difference of a loss, and of a tensor of the adapter."""
    pairs = zip(one.losses[job.name], other.losses[job.name], strict=True)
    loss = max(abs(ours - theirs) / abs(theirs) for ours, theirs in pairs)
    ours, theirs = one.weights[job.name], other.weights[job.name]
    if ours.keys() != theirs.keys():
        raise UserError(f"check: the adapters of {job.name} have different tensors")
    return loss, max(float((ours[name] - tensor).norm() / tensor.norm()) for name, tensor in theirs.items())


def _smallest_b(weights: dict) -> float:
    return min(float(tensor.norm()) for name, tensor in weights.items() if "lora_B" in name)


def _plainly(jobs: tuple[Job, ...]) -> Trained:
    import torch

    from lorafusion.data.tokens import SyntheticTokens
    from lorafusion.outside import train_plainly

    model = read_model(MODEL)
    source, dtype = SyntheticTokens(model.vocab_size), getattr(torch, DTYPE)
    trained = {job.name: train_plainly(job, model, source, dtype) for job in jobs}
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


def systems(names: list[str], arrangement: Arrangement) -> Verdict:
    """Each system, in an arrangement of so many processes that it can have, trains without dropout what plain
    transformers, PEFT and torch train. Those whose package is missing are left out, and the statement says so."""
    jobs, known = toy_jobs(dropout=0.0), read_systems()
    for name in names:
        one_of("system", name, set(known), "check systems")
    missing = [name for name in names if unavailable(known[name])]
    plain, figures, passed = _plainly(jobs), {}, len(missing) < len(names)
    for name in names:
        if name in missing:
            continue
        chosen = possible(arrangement, known[name])
        trained = train(Workload(name="together", jobs=jobs), name, chosen.stages, checkpointing=chosen.recompute,
                        replicas=chosen.replicas)  # fmt: skip
        loss, weight = map(max, zip(*(_difference(trained, plain, job) for job in jobs), strict=True))
        moved = min(_smallest_b(trained.weights[job.name]) for job in jobs)
        figures |= {
            f"{name} as {chosen}: relative difference of a loss": loss,
            f"{name} as {chosen}: of a tensor": weight,
        }
        passed = passed and loss <= LOSS_TOLERANCE and weight <= WEIGHT_TOLERANCE and moved > 0
    figures |= {"allowed difference of a loss": LOSS_TOLERANCE, "allowed difference of a tensor": WEIGHT_TOLERANCE}
    left_out = f"; left out, as their package is missing: {', '.join(missing)}" if missing else ""
    statement = f"every system trains what plain transformers, PEFT and torch train without dropout{left_out}"
    return Verdict("systems", passed, statement, figures)


def possible(arrangement: Arrangement, system: SystemConfig) -> Arrangement:
    """The arrangement, or of as many processes the one that a system can have, or one process."""
    processes = arrangement.stages * arrangement.replicas
    if system.max_gpus is not None and processes > system.max_gpus:
        return arrangement._replace(stages=1, replicas=1)
    if system.max_stages is not None and arrangement.stages > system.max_stages:
        return arrangement._replace(stages=1, replicas=processes)
    return arrangement


def learning(system: str = "lorafusion") -> Verdict:
    """On a toy language the weights change and every adapter's loss falls to less than half."""
    jobs = toy_jobs(learning_rate=3e-2)
    jobs = tuple(job.model_copy(update={"epochs": 20}) for job in jobs)
    trained = train(Workload(name="learning", jobs=jobs), system, 1)
    ratio = max(values[-1] / values[0] for values in trained.losses.values())
    moved = min(
        float(tensor.norm()) for state in trained.weights.values() for name, tensor in state.items() if "lora_B" in name
    )
    return Verdict(
        check="learning",
        passed=ratio < 0.5 and moved > 0,
        statement=f"{system}: on a toy language every adapter's loss falls to less than half and its weights change",
        figures={
            "largest ratio of last to first loss": ratio,
            "smallest norm of a trained B (zero at the start)": moved,
        },
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
    capacity: int = 96,
    checkpointing: bool = False,
    dtype: str = DTYPE,
    replicas: int = 1,
) -> Trained:
    """Train a workload on the tiny model on the CPU and bring back losses and adapters."""
    from safetensors.torch import load_file

    with tempfile.TemporaryDirectory(prefix="lorafusion-check-") as directory:
        folder = Path(directory)
        plan = plan_system(workload, system, stages=stages, capacity=capacity, data_parallel=replicas)
        (folder / "workload.json").write_text(workload.to_json())
        (folder / "plan.json").write_text(plan.to_json())
        spec = RunSpec(
            system=system,
            model=MODEL,
            workload=str(folder / "workload.json"),
            plan=str(folder / "plan.json"),
            dtype=dtype,
            adapter_dtype=dtype,
            save_adapters=str(folder / "adapters"),
            checkpointing=checkpointing,
        )
        outcome = launch(spec, stages * replicas, RUN_SECONDS)
        if outcome.status != "ok":
            raise UserError(
                f"check: the run of {system} on {stages} stage(s) ended as {outcome.status}: {outcome.note}"
            )
        weights = {
            job.name: load_file(folder / "adapters" / job.name / "adapter_model.safetensors") for job in workload.jobs
        }
        losses = outcome.report["losses"]
        finite = all(math.isfinite(value) for values in losses.values() for value in values) and all(
            bool(tensor.isfinite().all()) for state in weights.values() for tensor in state.values()
        )
        if not finite:
            raise UserError(
                f"check: the run of {system} on {stages} stage(s) gave a loss or a weight that is no number"
            )
        return Trained(losses, weights)


def write_verdict(verdict: Verdict, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(asdict(verdict), indent=1) + "\n")
