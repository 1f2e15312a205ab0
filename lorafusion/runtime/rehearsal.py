"""A run's executor, once, on a few tokens before the clock starts.

What happens once in a process must not be measured: a GPU's library loads a kernel at its first use, processes connect
at their first message. What a microbatch does is met in `TrainingRun.warm_up`; this is what its executor does around
it, up to an optimizer's step. On an H200 first steps took 0.1 to 0.6 s of runs of 3 to 5 s, never twice the same.
"""

from __future__ import annotations

from collections.abc import Callable

from lorafusion.plan import Microbatch, Plan, Segment, make_plan
from lorafusion.runtime.training import TrainingRun
from lorafusion.workload import Workload

# A learning rate of zero changes no weight.
QUIET = {"epochs": 1, "steps": None, "start": 0, "learning_rate": 0.0, "weight_decay": 0.0, "schedule": "constant",
         "warmup_steps": 0, "evaluation": (), "evaluate_every": None}  # fmt: skip


def rehearse(run: TrainingRun, execute: Callable[[TrainingRun], object]) -> None:
    """Have an executor train the first adapter for a step of nothing. Leaves no trace; every process calls it."""
    rehearsal = run.again(*of_a_step(run.workload, run.plan))
    execute(rehearsal)
    rehearsal.record.clock.synchronize()
    rehearsal.record.readback.wait()
    if run.around is not None:
        run.around.attach(run)


def of_a_step(workload: Workload, plan: Plan) -> tuple[Workload, Plan]:
    """The first job on its shortest samples, one for each replica, in a global batch of which each replica has its
    sample; replicas beyond the samples have none."""
    job, replicas = workload.jobs[0], plan.data_parallel
    samples = tuple(sorted(job.samples, key=lambda one: one.tokens)[:replicas])
    job = job.model_copy(update=QUIET | {"samples": samples, "global_batch_size": len(samples)})
    made = workload.model_copy(update={"jobs": (job,)})
    microbatches = [Microbatch(noop=True)] * (replicas - len(samples))
    for position in reversed(range(len(samples))):
        segment = Segment(adapter=0, samples=(position,), tokens=job.sample_at(position).tokens)
        microbatches.insert(0, Microbatch(segments=(segment,)))
    microbatches[len(samples) - 1] = microbatches[len(samples) - 1].model_copy(update={"step_after": (0,)})
    longest = max(one.tokens for one in samples)
    return made, make_plan(plan.system, made, microbatches, stages=plan.stages, capacity=longest, flush=plan.flush,
                           data_parallel=replicas)  # fmt: skip
