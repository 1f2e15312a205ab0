"""Judge `fast` beside the other strategies, by two simulators: python tools/judge_planner.py PATH.csv

A row is a workload, a pipeline and a capacity. `stream` is 1F1B as the runtime has it, no-ops and all. `greedy` knows
no slots: a stage does the oldest backward that is there, else a forward. So a conclusion that hangs on slots alone
falls there. `bound` is what no plan can take less than. Odd workloads are drawn at random.
"""

import random
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Annotated

import pandas as pd
import typer

from lorafusion.core.progress import progress
from lorafusion.core.seals import seal
from lorafusion.core.workload import Job, Sample, Workload
from lorafusion.lab.experiments.planner import repeated_workload
from lorafusion.planning import plan_workload
from lorafusion.planning.bounds import time_bound
from lorafusion.planning.simulator import chosen_costs, costs_of, simulate

STRATEGIES = ("fast", "fewest", "ffd", "mlora", "sequential")
SAMPLES, GLOBAL_BATCH, ODD = 32, 4, 60
MODELS, CAPACITIES = ("llama-3.1-8b", "llama-3.1-70b"), (8192, 16384, 32768, 65536)
GRID = [
    *product(("xsum",), (2, 4, 8, 16, 64), (4, 8, 16), MODELS, CAPACITIES),
    *product(("mixed",), (2, 4, 8, 16), (4, 8, 16), MODELS, CAPACITIES),
]
Case = tuple[Workload, int, str, int]  # stages, model, capacity


def cases() -> Iterator[Case]:
    for name, adapters, stages, model, capacity in GRID:
        yield repeated_workload(name, SAMPLES, GLOBAL_BATCH, adapters, 1), stages, model, capacity
    for seed in range(ODD):
        yield odd_case(seed)


def odd_case(seed: int) -> Case:
    draw = random.Random(seed)
    lengths = draw.choice([
        lambda: draw.randint(2, 40), lambda: draw.lognormvariate(6, 0.8), lambda: 50 * draw.paretovariate(1.1),
        lambda: draw.choice([50, 51, 2000, 2010]), lambda: 100,
    ])  # fmt: skip
    jobs = []
    for index in range(draw.choice([2, 3, 5, 8, 16])):
        tokens = [max(2, min(8000, int(lengths()))) for _ in range(draw.randint(4, 80))]
        samples = tuple(Sample(number, count) for number, count in enumerate(tokens))
        jobs.append(Job(name=f"a{index}", dataset="odd", rank=16, alpha=32.0, samples=samples,
                        global_batch_size=draw.choice([1, 2, 4, 8, 16])))  # fmt: skip
    longest = max(sample.tokens for job in jobs for sample in job.samples)
    capacity = draw.choice([longest, 2 * longest, 8192, 32768])
    model = draw.choice(MODELS)
    return (
        Workload(name=f"odd-{seed}", jobs=tuple(jobs)),
        draw.choice([2, 3, 4, 6, 8, 16]),
        model,
        max(longest, capacity),
    )


def judged(case: Case) -> dict[str, object]:
    workload, stages, model, capacity = case
    costs = chosen_costs(stages, model)
    row: dict[str, object] = {"workload": workload.name, "adapters": len(workload.jobs), "stages": stages,
                              "model": model, "capacity": capacity,
                              "samples": sum(len(job.samples) for job in workload.jobs),
                              "bound": time_bound(workload.jobs, costs, capacity)}  # fmt: skip
    for strategy in STRATEGIES:
        plan = plan_workload(workload, strategy, stages=stages, capacity=capacity, costs=costs)
        table = costs_of(plan, workload, costs)
        row[f"{strategy}_stream"] = simulate(plan, table, workload=workload).makespan
        row[f"{strategy}_greedy"] = simulate(plan, table, "greedy", workload).makespan
    return row


def main(path: Annotated[Path, typer.Argument(help="of the CSV file to write")]) -> None:
    with progress() as bar:
        rows = list(bar.track(map(judged, cases()), len(GRID) + ODD, description="judging"))
    pd.DataFrame(rows).to_csv(path, index=False, float_format="%.6g")
    seal(path)


if __name__ == "__main__":
    typer.run(main)
