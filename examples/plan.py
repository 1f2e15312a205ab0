"""Plan a workload by three strategies and look at the plans: `python examples/plan.py [FOLDER for the plans]`."""

import sys
from pathlib import Path

from lorafusion.core.workload import Job, Sample, Workload
from lorafusion.planning import plan_workload
from lorafusion.planning.simulator import chosen_costs, simulate_plan

STAGES, CAPACITY, MODEL = 4, 1024, "llama-3.1-8b"


def workload() -> Workload:
    """Four adapters with 32 samples each, of 40 to 400 tokens."""
    jobs = []
    for adapter in range(4):
        lengths = [40 + (adapter * 211 + index * 97) % 361 for index in range(32)]
        samples = tuple(Sample(index, tokens) for index, tokens in enumerate(lengths))
        job = Job(name=f"job{adapter}", dataset="example", rank=16, alpha=32, global_batch_size=8, samples=samples)
        jobs.append(job)
    return Workload(name="example", jobs=tuple(jobs))


def main(folder: Path | None) -> None:
    jobs, costs = workload(), chosen_costs(STAGES, MODEL)
    print("strategy    microbatches  no-ops    fill  makespan  idle of each stage")
    for strategy in ("sequential", "paper", "fast"):
        plan = plan_workload(jobs, strategy, stages=STAGES, capacity=CAPACITY, costs=costs)
        timeline, _ = simulate_plan(plan, jobs, MODEL)
        counts, idle = plan.statistics, "  ".join(f"{share:.0%}" for share in timeline.bubble("whole"))
        numbers = f"{counts.microbatches:12}{counts.noops:8}{counts.fill:8.1%}{timeline.makespan:9.3f}s"
        print(f"{strategy:12}{numbers}  {idle}")
        if folder:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{strategy}.json").write_text(plan.to_json())  # `lorafusion plan show FILE` draws it
    print("\nThe first microbatches of `fast`, with the samples of each adapter:")
    for index, microbatch in enumerate(plan.microbatches[:6]):
        parts = ", ".join(f"{jobs.jobs[part.adapter].name} {list(part.samples)}" for part in microbatch.segments)
        steps = "".join(f"; then {jobs.jobs[adapter].name} steps" for adapter in microbatch.step_after)
        print(f"  {index}: {parts or 'no-op'}{steps}")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else None)
