"""Check: adapters trained together equal each trained alone, and both equal plain libraries."""

from collections.abc import Sequence

from lorafusion.core.schema import UserError
from lorafusion.core.workload import Job, Workload
from lorafusion.lab.checks.comparison import PlainReference
from lorafusion.lab.checks.toy_runs import CAPACITY, EXACT, Setup, TrainingResult, setups_of, toy_jobs, train
from lorafusion.lab.checks.verdicts import PLAIN, Curve, Evidence, Verdict, left_out
from lorafusion.lab.suite import Arrangement, Suite

TOGETHER = 4 * CAPACITY  # in which both adapters end a global batch in one microbatch
CLIPPED = {"rslora": True, "max_grad_norm": 0.05, "weight_decay": 0.1, "schedule": "linear", "warmup_steps": 2}


def check_suite(suite: Suite) -> tuple[Verdict, list[Curve]]:
    """The check of a suite, in its arrangements and on its models."""
    return lossless([Arrangement.read(text) for text in suite.checks.lossless], setups=setups_of(suite))


def lossless(
    arrangements: list[Arrangement], system: str = "lorafusion", setups: Sequence[Setup] = (EXACT,)
) -> tuple[Verdict, list[Curve]]:
    """Two adapters trained together, in each arrangement that a setup has room for, and each trained alone equal
    training with plain transformers, PEFT and torch, step for step. So do two whose global batches end in one
    microbatch, with gradients that are clipped. The curves are those of the first setup."""
    evidence, curves = Evidence(), []
    for setup in setups:
        jobs = _jobs_for(setup)
        runs = _runs(jobs, [item for item in arrangements if setup.has_room_for(item)], system, setup)
        plain = PlainReference.of(jobs, setup)
        for trainer, result in runs.items():
            label = f"trained {trainer if trainer == 'alone' else f'as {trainer}'}{setup.suffix}"
            plain.compare(evidence, label, result, jobs)
        clipped = [job.model_copy(update=CLIPPED) for job in jobs]
        together = _train_together(clipped, system, setup)
        PlainReference.of(clipped, setup).compare(
            evidence, f"clipped, stepping together{setup.suffix}", together, clipped
        )
        curves = curves or [Curve(job.name, trainer, result.losses[job.name])
                            for trainer, result in (runs | {PLAIN: plain.exact}).items() for job in jobs]  # fmt: skip
    names = ", ".join(map(str, arrangements))
    without_room = [f"{item} on {setup}" for setup in setups for item in arrangements if not setup.has_room_for(item)]
    statement = (
        f"{system}: two adapters trained together (stages x replicas: {names}), and each alone, equal plain "
        f"transformers, PEFT and torch{left_out('no room here', without_room)}"
    )
    return evidence.verdict("lossless", statement), curves


def _jobs_for(setup: Setup) -> tuple[Job, ...]:
    """The toy jobs; of a large model for one epoch and without dropout: to draw its masks on the CPU takes a minute,
    and the gradients are checked with them."""
    if not setup.layers:
        return toy_jobs(stretch=setup.stretch)
    return tuple(job.model_copy(update={"epochs": 1}) for job in toy_jobs(dropout=0.0, stretch=setup.stretch))


def _runs(
    jobs: Sequence[Job], arrangements: Sequence[Arrangement], system: str, setup: Setup
) -> dict[str, TrainingResult]:
    """By who trained: `alone`, or the arrangement."""
    single = [train(Workload(name="check", jobs=(job,)), system, setup=setup) for job in jobs]
    losses = {name: values for result in single for name, values in result.losses.items()}
    alone = TrainingResult(losses, {name: state for result in single for name, state in result.weights.items()})
    workload = Workload(name="check", jobs=tuple(jobs))
    return {"alone": alone} | {str(item): train(workload, system, item, setup=setup) for item in arrangements}


def _train_together(jobs: Sequence[Job], system: str, setup: Setup) -> TrainingResult:
    result = train(Workload(name="check", jobs=tuple(jobs)), system, capacity=TOGETHER, setup=setup)
    if max(len(microbatch.step_after) for microbatch in result.plan.microbatches) < len(jobs):
        raise UserError(f"check lossless: the adapters never step after one microbatch of {system}; it proves nothing")
    return result
