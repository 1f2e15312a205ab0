"""The gradients of one step against float64, on the path that is measured and in its dtype.

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

import torch

from lorafusion.core.config import read_systems
from lorafusion.core.plan import Plan
from lorafusion.core.schema import UserError, one_of
from lorafusion.core.workload import MERGED, MERGED_PARTS, Job, Workload
from lorafusion.lab import plain_training
from lorafusion.lab.checks import grounds
from lorafusion.lab.checks.comparisons import possible
from lorafusion.lab.checks.grounds import Ground, Trained, toy_jobs, train
from lorafusion.lab.checks.verdicts import Verdict
from lorafusion.lab.experiments.end_to_end import unavailable
from lorafusion.lab.suite import Arrangement, Suite

MOST_ERROR = 2.5
MOST_LENGTH_ERROR = 0.01
CAPACITY = 88  # tokens of the toy jobs: two microbatches with samples of both
TERM = 0.5  # size of the LoRA term, where the base linear's output has 1
ONE_STEP = {"start": 1, "steps": 2}  # not the first: the job's stream is not at its beginning

Tensors = dict[str, torch.Tensor]


def grounds_of(suite: Suite | None) -> list[Ground]:
    """The suite's own device and dtype: the tiny model, and on a GPU two layers of each of the suite's models."""
    if suite is None:
        return [Ground(dtype="bfloat16", stretch=4)]
    tiny = Ground(device=suite.device, dtype=suite.dtype, stretch=4)
    return [tiny, *(one for one in grounds.grounds_of(suite) if one.layers)]


def _distinct(names: Sequence[str]) -> list[str]:
    """Of systems with the same executor and LoRA operation the first."""
    known, out = read_systems(), {}
    for name in names:
        parts = known[name].model_dump(include={"executor", "lora", "shard", "wide_adapters", "liger"})
        out.setdefault(tuple(parts.values()), name)
    return list(out.values())


@dataclass(frozen=True)
class Expected:
    """What one step of some jobs has as gradients, by job and tensor. weights: the adapters to begin with."""

    jobs: tuple[Job, ...]
    weights: dict[str, Tensors]
    exact: dict[str, Tensors]
    rounded: dict[str, Tensors]

    @classmethod
    def of(cls, ground: Ground, dropout: float, merged: bool = False) -> Expected:
        """By plain libraries, in float64 and in the ground's dtype. merged: q, k and v are one linear in the runs;
        plain libraries have one A for the three, which is the same adapter if nothing is dropped."""
        device, drawn = torch.device(ground.device), getattr(torch, ground.dtype)
        jobs = [job.model_copy(update=ONE_STEP) for job in toy_jobs(dropout=dropout, stretch=ground.stretch)]
        plain = [_apart(job) for job in jobs] if merged else jobs
        weights = {job.name: _initial(job, ground, merged) for job in plain}
        exact, rounded = (
            {
                job.name: plain_training.gradients_plainly(
                    job, ground.config, weights[job.name], dtype, drawn, device=device
                )
                for job in plain
            }
            for dtype in (torch.float64, drawn)
        )
        if not merged:
            return cls(tuple(jobs), weights, exact, rounded)
        together = tuple(job.model_copy(update={"target_modules": _merged_modules(job)}) for job in plain)
        first = {name: _joined(tensors, lambda parts: parts[0]) for name, tensors in weights.items()}
        sums = [{name: _joined(tensors, sum) for name, tensors in one.items()} for one in (exact, rounded)]
        return cls(together, first, *sums)

    def errors(self, found: dict[str, Tensors]) -> tuple[float, float]:
        """The largest error of a tensor over that of plain libraries; and how far the gradients' length is off, at
        worst, on average over the layers of a linear."""
        largest, lengths = 0.0, {}
        for job, tensors in self.exact.items():
            if found[job].keys() != tensors.keys():
                raise UserError(f"check gradients: {job} has gradients of other tensors than plain training")
            for name, exact in tensors.items():
                ours, rounded = (one[job][name].to(exact) for one in (found, self.rounded))
                error = float((ours - exact).norm() / (rounded - exact).norm())
                largest = largest if math.isnan(largest) or error <= largest else error  # NaN, too, which then stays
                length = float((ours * exact).sum() / exact.square().sum()) - 1
                lengths.setdefault((job, *name.split(".")[-3:-1]), []).append(length)
        means = [abs(fmean(values)) for values in lengths.values()]
        return largest, math.nan if any(map(math.isnan, means)) else max(means)


def gradients(
    names: Sequence[str],
    arrangements: Sequence[Arrangement],
    on: Sequence[Ground],
    merged: Sequence[str] = (),
    masked: Sequence[str] = ("lorafusion",),
) -> Verdict:
    """One step of each system, from adapters whose B is not zero, has the gradients of float64. masked: systems whose
    dropout is a function of a token's place; they are compared with it, too, and in every arrangement that a ground has
    room for. merged: those that are compared with q, k and v as one linear, too."""
    known, figures, limits, passed, mixed = read_systems(), {}, {}, True, not masked
    for name in (*names, *merged, *masked):
        one_of("system", name, set(known), "check gradients")
    able = [name for name in dict.fromkeys((*names, *merged, *masked)) if not unavailable(known[name])]
    single = Arrangement(1, 1, False)
    for ground in on:
        some = list(dict.fromkeys([single, *(one for one in arrangements if ground.has_room_for(one))]))
        compared = [name for name in able if name in names]
        compared = _distinct(compared) if ground.layers else compared
        cases = [(0.0, False, [(name, possible(some[-1], known[name])) for name in compared])]
        cases.append((0.1, False, [(name, one) for name in able if name in masked for one in some]))
        cases.append((0.0, True, [(name, single) for name in able if name in merged]))
        for dropout, together, runs in cases:
            if runs:
                expected = Expected.of(ground, dropout, together)
                for name, where in runs:
                    what = f"{name} as {where}, {_described(dropout, together)} ({ground})"
                    run = one_step(name, where, ground, expected)
                    error, length = expected.errors(run.gradients)
                    mixed = mixed or _is_mixed(run.plan)
                    of_tensor, of_length = f"{what}: error over that of plain libraries", f"{what}: of the length"
                    figures |= {of_tensor: error, of_length: length}
                    limits |= {of_tensor: MOST_ERROR, of_length: MOST_LENGTH_ERROR}
                    passed = passed and error <= MOST_ERROR and length <= MOST_LENGTH_ERROR
    if not mixed:
        raise UserError(
            "check gradients: no run had two microbatches, one with both adapters; it proves nothing of them"
        )
    missing = [name for name in names if name not in able]
    left_out = f"; left out, as their package is missing: {', '.join(missing)}" if missing else ""
    return Verdict(
        check="gradients",
        passed=passed and bool(able),
        statement=f"the gradients of one step are those of float64, with the errors of plain libraries{left_out}",
        figures=figures,
        limits=limits,
    )


def one_step(system: str, where: Arrangement, ground: Ground, expected: Expected) -> Trained:
    """A run of a system, of one step of each job."""
    workload = Workload(name="gradients", jobs=expected.jobs)
    return train(workload, system, where.stages, CAPACITY, where.recompute, replicas=where.replicas, ground=ground,
                 initial=expected.weights)  # fmt: skip


def _is_mixed(plan: Plan) -> bool:
    return len(plan.microbatches) > 1 and any(len(one.segments) > 1 for one in plan.microbatches)


def _described(dropout: float, merged: bool) -> str:
    return f"{'dropout' if dropout else 'no dropout'}{', q, k and v merged' if merged else ''}"


def _initial(job: Job, ground: Ground, tied: bool) -> Tensors:
    """An adapter with A as it is drawn, one for q, k and v where tied, and a B that makes the LoRA term TERM large."""
    device, dtype = torch.device(ground.device), getattr(torch, ground.dtype)
    weights = plain_training.adapter_weights(plain_training.build_model(job, ground.config, dtype, 1, device)[0])
    generator = torch.Generator().manual_seed(job.seed)
    for name, tensor in weights.items():
        if "lora_B" in name:
            value = torch.randn(tensor.shape, generator=generator) * TERM / math.sqrt(job.rank)
            weights[name] = value.to(tensor.dtype)
        elif tied and any(f".{part}." in name for part in MERGED_PARTS):
            first = next(part for part in MERGED_PARTS if f".{part}." in name)
            weights[name] = weights[name.replace(first, MERGED_PARTS[0])]
    return weights


def _apart(job: Job) -> Job:
    """A job with q, k and v, where it has one of them."""
    rest = tuple(one for one in job.target_modules if one not in MERGED_PARTS)
    return job.model_copy(update={"target_modules": (*MERGED_PARTS, *rest)})


def _merged_modules(job: Job) -> tuple[str, ...]:
    return (MERGED, *(one for one in job.target_modules if one not in MERGED_PARTS))


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
