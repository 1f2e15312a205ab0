"""Check: the gradients of one step against float64, on the path that is measured and in its dtype.

Losses hide much: in bf16 under Adam a LoRA term a tenth too large, or one that is missing from the gradient of the
input, stays within any bound that rounding allows. A step's gradients show it, if B is not zero. Two measures:

- of each tensor the norm of its error over that of plain libraries in the same dtype on the same device. It sees what
  goes astray. Rounding alone makes it 0.8 to 1.9 at most (bf16 on a CPU, tensors of 12 systems), a part of dx that is
  missing 40 and more.
- the length of the gradients along the exact ones: rounding errors cancel in it, and a factor of 1.02 does not. Of one
  tensor plain bf16 is up to 1.7 % off, on average over the layers of a linear 0.4 % (0.6 % at worst), whatever the
  number of tokens; so it is that average that is bounded.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import NamedTuple

import torch

from lorafusion.core.config import read_systems
from lorafusion.core.schema import UserError, one_of
from lorafusion.core.workload import MERGED, MERGED_PARTS, Job, Workload
from lorafusion.lab import plain_training
from lorafusion.lab.checks.systems import possible, systems_of
from lorafusion.lab.checks.toy_runs import SINGLE, Setup, Tensors, TrainingResult, setups_of, toy_jobs, train
from lorafusion.lab.checks.verdicts import Curve, Evidence, Verdict, left_out
from lorafusion.lab.experiments.end_to_end import unavailable
from lorafusion.lab.suite import Arrangement, Suite

MOST_ERROR = 2.5
MOST_LENGTH_ERROR = 0.01
MASKED = "lorafusion"  # its dropout is a function of a token's place
CAPACITY = 88  # tokens of the toy jobs: two microbatches with samples of both
TERM = 0.5  # size of the LoRA term, where the base linear's output has 1
ONE_STEP = {"start": 1, "steps": 2}  # not the first: the job's stream is not at its beginning


def check_suite(suite: Suite) -> tuple[Verdict, list[Curve]]:
    """The check of a suite's systems, in the arrangements of `lossless`."""
    arrangements = [Arrangement.read(text) for text in suite.checks.lossless]
    merged = systems_of(suite, merged=True)
    return gradients(systems_of(suite), arrangements, gradient_setups_of(suite), merged), []


def gradient_setups_of(suite: Suite | None) -> list[Setup]:
    """The suite's own device and dtype: the tiny model, and on a GPU two layers of each of the suite's models."""
    if suite is None:
        return [Setup(dtype="bfloat16", stretch=4)]
    tiny = Setup(device=suite.device, dtype=suite.dtype, stretch=4)
    return [tiny, *(setup for setup in setups_of(suite) if setup.layers)]


def _distinct(names: Sequence[str]) -> list[str]:
    """Of systems with the same executor and LoRA operation the first."""
    systems, first = read_systems(), {}
    for name in names:
        parts = systems[name].model_dump(include={"executor", "lora", "shard", "wide_adapters", "liger"})
        first.setdefault(tuple(parts.values()), name)
    return list(first.values())


@dataclass(frozen=True)
class ExpectedGradients:
    """What one step of some jobs has as gradients, by job and tensor. weights: the adapters to begin with."""

    jobs: tuple[Job, ...]
    weights: dict[str, Tensors]
    exact: dict[str, Tensors]
    rounded: dict[str, Tensors]

    @classmethod
    def of(cls, setup: Setup, dropout: float, merged: bool = False) -> ExpectedGradients:
        """By plain libraries, in float64 and in the setup's dtype. merged: q, k and v are one linear in the runs;
        plain libraries have one A for the three, which is the same adapter if nothing is dropped."""
        jobs = [job.model_copy(update=ONE_STEP) for job in toy_jobs(dropout=dropout, stretch=setup.stretch)]
        plain = [_targeting(job, *MERGED_PARTS) for job in jobs] if merged else jobs
        weights = {job.name: _initial(job, setup, merged) for job in plain}
        exact, rounded = (
            {job.name: plain_training.gradients_plainly(job, setup.base, weights[job.name], dtype) for job in plain}
            for dtype in (torch.float64, setup.base.drawn)
        )
        if not merged:
            return cls(tuple(jobs), weights, exact, rounded)
        together = tuple(_targeting(job, MERGED) for job in plain)
        first = {name: _joined(tensors, lambda parts: parts[0]) for name, tensors in weights.items()}
        sums = [{name: _joined(tensors, sum) for name, tensors in side.items()} for side in (exact, rounded)]
        return cls(together, first, *sums)

    def errors(self, gradients: dict[str, Tensors]) -> tuple[float, float]:
        """The largest error of a tensor over that of plain libraries; and how far the gradients' length is off, at
        worst, on average over the layers of a linear."""
        largest, lengths = 0.0, {}
        for job, tensors in self.exact.items():
            if gradients[job].keys() != tensors.keys():
                raise UserError(f"check gradients: {job} has gradients of other tensors than plain training")
            for name, exact in tensors.items():
                gradient, rounded = (side[job][name].to(exact) for side in (gradients, self.rounded))
                error = float((gradient - exact).norm() / (rounded - exact).norm())
                largest = largest if math.isnan(largest) or error <= largest else error  # NaN, too, which then stays
                length = float((gradient * exact).sum() / exact.square().sum()) - 1
                lengths.setdefault((job, *name.split(".")[-3:-1]), []).append(length)
        means = [abs(fmean(values)) for values in lengths.values()]
        return largest, math.nan if any(map(math.isnan, means)) else max(means)


class GradientCase(NamedTuple):
    """What is trained by whom: dropout, q, k and v as one linear or not, and systems in arrangements."""

    dropout: float
    merged: bool
    runs: list[tuple[str, Arrangement]]

    def __str__(self) -> str:
        return f"{'dropout' if self.dropout else 'no dropout'}{', q, k and v merged' if self.merged else ''}"


def gradients(
    names: Sequence[str], arrangements: Sequence[Arrangement], setups: Sequence[Setup], merged: Sequence[str] = ()
) -> Verdict:
    """One step of each system, from adapters whose B is not zero, has the gradients of float64. That whose dropout is a
    function of a token's place is compared with it, too, and in every arrangement that a setup has room for. merged:
    those that are compared with q, k and v as one linear, too."""
    systems, evidence, plans = read_systems(), Evidence(), []
    every = list(dict.fromkeys((*names, *merged, MASKED)))
    for name in every:
        one_of("system", name, set(systems), "check gradients")
    able = [name for name in every if not unavailable(systems[name])]
    for setup in setups:
        possible_here = [SINGLE, *(item for item in arrangements if setup.has_room_for(item))]
        chosen = [[name for name in able if name in group] for group in (names, merged)]
        for case in _cases(setup, list(dict.fromkeys(possible_here)), *chosen):
            expected = ExpectedGradients.of(setup, case.dropout, case.merged) if case.runs else None
            for name, arrangement in case.runs:
                result = one_step(name, arrangement, setup, expected)
                plans.append(result.plan)
                label, (error, length) = f"{name} as {arrangement}, {case} ({setup})", expected.errors(result.gradients)
                evidence.add(f"{label}: error over that of plain libraries", error, MOST_ERROR)
                evidence.add(f"{label}: of the length", length, MOST_LENGTH_ERROR)
    if not any(len(plan.microbatches) > 1 and max(len(item.segments) for item in plan.microbatches) > 1
               for plan in plans):  # fmt: skip
        raise UserError(
            "check gradients: no run had two microbatches, one with both adapters; it proves nothing of them"
        )
    missing = [name for name in names if name not in able]
    statement = "the gradients of one step are those of float64, with the errors of plain libraries"
    return evidence.verdict("gradients", statement + left_out("as their package is missing", missing))


def _cases(setup: Setup, arrangements: list[Arrangement], names: list[str], merged: list[str]) -> list[GradientCase]:
    """Of a large model not all systems are compared, but one of each kind."""
    systems, compared = read_systems(), _distinct(names) if setup.layers else names
    return [
        GradientCase(0.0, False, [(name, possible(arrangements[-1], systems[name])) for name in compared]),
        GradientCase(0.1, False, [(MASKED, arrangement) for arrangement in arrangements]),
        GradientCase(0.0, True, [(name, SINGLE) for name in merged]),
    ]


def one_step(system: str, arrangement: Arrangement, setup: Setup, expected: ExpectedGradients) -> TrainingResult:
    """A run of a system, of one step of each job."""
    workload = Workload(name="gradients", jobs=expected.jobs)
    return train(workload, system, arrangement, CAPACITY, setup, expected.weights)


def _initial(job: Job, setup: Setup, tied: bool) -> Tensors:
    """An adapter with A as it is drawn, one for q, k and v where tied, and a B that makes the LoRA term TERM large."""
    weights = plain_training.adapter_weights(plain_training.build_model(job, setup.base)[0])
    generator = torch.Generator().manual_seed(job.seed)
    for name, tensor in weights.items():
        if "lora_B" in name:
            value = torch.randn(tensor.shape, generator=generator) * TERM / math.sqrt(job.rank)
            weights[name] = value.to(tensor.dtype)
        elif tied and any(f".{part}." in name for part in MERGED_PARTS):
            first = next(part for part in MERGED_PARTS if f".{part}." in name)
            weights[name] = weights[name.replace(first, MERGED_PARTS[0])]
    return weights


def _targeting(job: Job, *linears: str) -> Job:
    """A job with these for q, k and v."""
    rest = tuple(module for module in job.target_modules if module not in MERGED_PARTS)
    return job.model_copy(update={"target_modules": (*linears, *rest)})


def _joined(tensors: Tensors, of_a: Callable[[list[torch.Tensor]], torch.Tensor]) -> Tensors:
    """Tensors of q, k and v apart, under the names and in the shapes of the merged linear."""
    first, out = f".{MERGED_PARTS[0]}.", {}
    for name, tensor in tensors.items():
        if first in name:
            parts = [tensors[name.replace(first, f".{part}.")] for part in MERGED_PARTS]
            out[name.replace(first, f".{MERGED}.")] = torch.cat(parts) if "lora_B" in name else of_a(parts)
        elif not any(f".{part}." in name for part in MERGED_PARTS):
            out[name] = tensor
    return out
