"""A run's executor, once, on a few tokens before the clock starts.

What happens once in a process must not be measured: processes make connections, a GPU's library loads a kernel at its
first use. What a microbatch does is met in `TrainingRun.warm_up`; this is what its executor does around it, up to an
optimizer's step.
"""

from lorafusion.core.plan import Microbatch, Plan, Segment, make_plan
from lorafusion.core.workload import Workload
from lorafusion.engine.executor import Executor, prepared
from lorafusion.engine.training import TrainingRun

# A learning rate of zero changes no weight.
QUIET = {"epochs": 1, "steps": None, "start": 0, "learning_rate": 0.0, "evaluation": (), "evaluate_every": None}


def warm_up_executor(run: TrainingRun, execute: Executor) -> None:
    """Connect the processes, and have an executor train the first adapter for a step of nothing. Every process calls
    it. Weights, gradients, optimizers and losses are as before; torch's random generator is not."""
    run.position.set("the warm-up step")
    run.pipeline.connect()
    short_run = run.again(*of_a_step(run.workload, run.plan))
    with prepared(short_run, execute) as train:
        train()
    short_run.record.wait()
    # The group of all has a communicator of its own. Made at the start of the run, after a warm-up that left the memory
    # to torch's allocator, NCCL found none (megatron-fsdp with microbatches of 24,576 tokens on an H200).
    run.wait_for_everyone()
    if run.around is not None:
        run.around.attach(run)


def of_a_step(workload: Workload, plan: Plan) -> tuple[Workload, Plan]:
    """The first job on its shortest samples, one for each replica, in one global batch; replicas beyond them have none.
    It is clipped if any job is."""
    norm = next((job.max_grad_norm for job in workload.jobs if job.max_grad_norm is not None), None)
    job, replicas = workload.jobs[0], plan.data_parallel
    samples = tuple(sorted(job.samples, key=lambda sample: sample.tokens)[:replicas])
    job = job.model_copy(update=QUIET | {"samples": samples, "global_batch_size": len(samples), "max_grad_norm": norm})
    short = workload.model_copy(update={"jobs": (job,)})
    last = len(samples) - 1
    microbatches = [
        Microbatch(
            segments=(Segment(adapter=0, samples=(position,), tokens=job.sample_at(position).tokens),),
            step_after=(0,) if position == last else (),
        )
        for position in range(len(samples))
    ]
    microbatches += [Microbatch(noop=True)] * (replicas - len(samples))
    longest = max(sample.tokens for sample in samples)
    return short, make_plan(plan.system, short, microbatches, stages=plan.stages, capacity=longest, flush=plan.flush,
                           data_parallel=replicas)  # fmt: skip
