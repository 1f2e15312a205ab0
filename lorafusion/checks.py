"""The checks that the figures rest on: real runs of real systems, compared, with a verdict that can be "failed"."""

from __future__ import annotations

import json
import math
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from lorafusion.config import read_systems
from lorafusion.errors import UserError
from lorafusion.imports import load
from lorafusion.plan import Plan
from lorafusion.runtime.launch import launch
from lorafusion.runtime.spec import RunSpec
from lorafusion.workload import ALL_LINEAR, Job, Sample, Workload

RUN_SECONDS = 300
# Packing changes the shapes of the matrix products and so the order of their sums, and Adam, which divides a gradient
# by its own size, hands the relative rounding of one that nearly cancels on to the weight. In float32 one element in
# 384 of a tensor came out 1.1e-4 off, the tensor 1.7e-4; in float64 the same tensor agrees to 4e-16. So the checks
# train in float64, where rounding is out of the way and every fault of a plan, a mask or a scale stands out. The norms
# of transformers' layers round to float32 still, and a value on the edge of two goes the other way in one of 3e7: one
# such flip moved a loss by up to 6e-9 and a tensor by up to 8e-8.
DTYPE = "float64"
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


def lossless(stages: int, system: str = "lorafusion", dropout: float = 0.1) -> Verdict:
    """Two adapters trained together on `stages` stages equal each trained alone on one, step for step."""
    jobs = toy_jobs(dropout=dropout)
    together = train(Workload(name="together", jobs=jobs), system, stages)
    loss_error = weight_error = 0.0
    moved = math.inf
    for job in jobs:
        alone = train(Workload(name="alone", jobs=(job,)), system, 1)
        for ours, theirs in zip(together.losses[job.name], alone.losses[job.name], strict=True):
            loss_error = max(loss_error, abs(ours - theirs) / abs(theirs))
        for name, theirs in alone.weights[job.name].items():
            ours = together.weights[job.name][name]
            weight_error = max(weight_error, float((ours - theirs).norm() / theirs.norm()))
            if "lora_B" in name:
                moved = min(moved, float(ours.norm()))
    return Verdict(
        check=f"lossless-{stages}",
        passed=loss_error <= LOSS_TOLERANCE and weight_error <= WEIGHT_TOLERANCE and moved > 0,
        statement=f"{system}: two adapters trained together on {stages} stage(s) equal each trained alone",
        figures={
            "largest relative difference of a step's loss": loss_error,
            "allowed difference of a loss": LOSS_TOLERANCE,
            "largest relative difference of a weight tensor": weight_error,
            "allowed difference of a tensor": WEIGHT_TOLERANCE,
            "smallest norm of a trained B (zero at the start)": moved,
        },
    )


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


def train(workload: Workload, system: str, stages: int, capacity: int = 96, checkpointing: bool = False) -> Trained:
    """Train a workload on the tiny model on the CPU, in float64, and bring back losses and adapters."""
    from safetensors.torch import load_file

    with tempfile.TemporaryDirectory(prefix="lorafusion-check-") as directory:
        folder = Path(directory)
        plan = load(read_systems()[system].planner, "planner")(workload, system, stages, capacity)
        (folder / "workload.json").write_text(workload.to_json())
        (folder / "plan.json").write_text(plan.to_json())
        spec = RunSpec(
            system=system,
            model="tiny",
            workload=str(folder / "workload.json"),
            plan=str(folder / "plan.json"),
            dtype=DTYPE,
            adapter_dtype=DTYPE,
            save_adapters=str(folder / "adapters"),
            checkpointing=checkpointing,
        )
        outcome = launch(spec, stages, RUN_SECONDS)
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
