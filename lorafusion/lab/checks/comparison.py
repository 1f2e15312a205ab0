"""How near a training must come to that of plain libraries (`plain_training`)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from lorafusion.core.schema import UserError
from lorafusion.core.workload import Job
from lorafusion.lab.checks.toy_runs import Setup, TrainingResult, train_plainly
from lorafusion.lab.checks.verdicts import Evidence

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


@dataclass(frozen=True)
class PlainReference:
    """What plain libraries train. exact: in float64. rounded: in the setup's dtype, where that is another; its error is
    the unit of everybody's error there."""

    exact: TrainingResult
    rounded: TrainingResult | None

    @classmethod
    def of(cls, jobs: Sequence[Job], setup: Setup) -> PlainReference:
        exact = train_plainly(jobs, setup, "float64")
        return cls(exact, None if setup.dtype == "float64" else train_plainly(jobs, setup, setup.dtype))

    def compare(self, evidence: Evidence, label: str, result: TrainingResult, jobs: Sequence[Job]) -> None:
        """Add a run's errors. A B that did not move from zero is a fault, however well all else agrees."""
        kind = "error over that of plain libraries" if self.rounded else "relative difference"
        bounds = (MOST_LOSS_ERROR, MOST_WEIGHT_ERROR) if self.rounded else (LOSS_TOLERANCE, WEIGHT_TOLERANCE)
        loss, weight = self.errors(result, jobs)
        evidence.add(f"{label}: {kind} of a loss", loss, bounds[0])
        evidence.add(f"{label}: of a tensor", weight, bounds[1])
        evidence.require(min(smallest_b(result.weights[job.name]) for job in jobs) > 0)

    def errors(self, result: TrainingResult, jobs: Sequence[Job]) -> tuple[float, float]:
        """Of the losses, and of the adapters' tensors: the largest relative ones, or over those of plain libraries."""
        weights = max(self._weight_error(result, job.name) for job in jobs)
        exact, losses = ([loss for job in jobs for loss in run.losses[job.name]] for run in (self.exact, result))
        if self.rounded is None:
            return max(abs(loss - right) / abs(right) for loss, right in zip(losses, exact, strict=True)), weights
        rounded = [loss for job in jobs for loss in self.rounded.losses[job.name]]
        least = LOSS_ROUNDING * math.hypot(*exact) / MOST_LOSS_ERROR
        return math.dist(losses, exact) / max(math.dist(rounded, exact), least), weights

    def _weight_error(self, result: TrainingResult, job: str) -> float:
        exact, weights = self.exact.weights[job], result.weights[job]
        if weights.keys() != exact.keys():
            raise UserError(f"check: the adapters of {job} have different tensors")
        differences = {name: weights[name].to(tensor) - tensor for name, tensor in exact.items()}
        if self.rounded is None:
            return max(float(differences[name].norm() / tensor.norm()) for name, tensor in exact.items())
        # Of all tensors: where a gradient nearly cancels, its rounding decides which way Adam's whole step goes, and of
        # one tensor that makes any ratio.
        units = [self.rounded.weights[job][name].to(tensor) - tensor for name, tensor in exact.items()]
        return _norm(differences.values()) / _norm(units)


def _norm(tensors: Iterable[torch.Tensor]) -> float:
    return math.sqrt(sum(float(tensor.square().sum()) for tensor in tensors))


def smallest_b(weights: dict[str, torch.Tensor]) -> float:
    """The smallest norm of an adapter's B, which is zero until it is trained."""
    return min(float(tensor.norm()) for name, tensor in weights.items() if "lora_B" in name)
