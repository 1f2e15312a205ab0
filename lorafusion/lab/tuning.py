"""How many tokens a microbatch may hold in a cell, by one rule for all systems: the most that fits, then the fastest.

Tried, as each system takes its own memory (`planning.capacity` lists the other answers). The most that is tried is the
suite's. It is made smaller (`sizes`) until the plan's largest microbatches fit in memory, and further until a size is
clearly slower than the fastest (`trials.SLOWER`). A trial is one run of the first global batch of each adapter (of as
many as there are stages), planned as the whole workload is. Systems that fix the number of samples of a microbatch take
as many as fit in those tokens (`planning.common.largest_microbatch`), so that the same rule tunes them.
"""

import json
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pandas as pd

from lorafusion.core.files import write
from lorafusion.core.machine import provenance
from lorafusion.core.plan import Plan
from lorafusion.core.schema import UserError
from lorafusion.core.seals import seal
from lorafusion.core.workload import Workload
from lorafusion.lab.experiments.end_to_end import cell_files, spec_of, unavailable
from lorafusion.lab.experiments.experiment import require_device
from lorafusion.lab.keys import CellFiles
from lorafusion.lab.tuned import PROFILE_TRIAL, TRY_CAPACITIES, Trial, TrialOptions, Tried, Tuned
from lorafusion.launch.attempt import Attempt, attempt_at, other_node
from lorafusion.launch.outcome import Outcome
from lorafusion.launch.spec import RunSpec
from lorafusion.planning import plan_system

MOST_TRIALS = 10
PROFILE_COLUMNS = ("suite", "cell", "workload", "qkv", "system", "gpu_name", "git_sha", "tree_hash", "config_hash",
                   "plan_hash", "class", "milliseconds", "kernels", "share")  # fmt: skip


def tune_cell(
    suite_path: Path,
    name: str,
    workload_path: Path,
    out: Path,
    launch: Callable[..., Outcome] | None = None,
    nodes: int = 1,
) -> str:
    """Tune a cell of a suite and write the outcome, also where nothing fits; returns it in a line. Of several nodes the
    first decides what is tried next, and writes."""
    files, workload = _read(suite_path, name, workload_path)
    suite, cell = files.suite, files.cell
    with tempfile.TemporaryDirectory(prefix="lorafusion-") as scratch, attempt_at(out, nodes, launch) as attempt:
        spec = trials_of(files, workload, workload_path, candidates(workload, files), Path(scratch))
        tried = _try_all(spec, cell.gpus, 60 * cell.grid.minutes, attempt)
    if other_node():
        return other_node()
    origin = provenance(suite.device)
    tuned = Tuned(suite=suite.name, cell=name, system=cell.system, stages=cell.stages,
                  data_parallel=cell.grid.data_parallel, config_hash=files.configuration,
                  workload_hash=workload.content_hash, trials=tuple(tried),
                  **{key: origin[key] for key in ("gpu_name", "git_sha", "git_dirty", "tree_hash")})  # fmt: skip
    write(out, tuned.to_json())
    return ", ".join(map(str, tuned.trials))


def _read(suite_path: Path, name: str, workload_path: Path) -> tuple[CellFiles, Workload]:
    """A cell of a suite that can be run here, and its workload."""
    files = cell_files(suite_path, name)
    require_device(files.suite, suite_path)
    reason = unavailable(files.system)
    if reason:
        raise UserError(f"cell {name}: {reason}")
    return files, files.workload(workload_path)


def trials_of(files: CellFiles, workload: Workload, workload_path: Path, plans: list[Plan], folder: Path) -> RunSpec:
    """The run that tries a cell's plans in turn; they and those of the beginning are written to a folder."""
    part = beginning(workload, files.cell.stages)
    (folder / "part.json").write_text(part.to_json())
    trials = []
    for plan in plans:
        paths = [folder / f"{kind}-{plan.capacity}.json" for kind in ("whole", "part")]
        paths[0].write_text(plan.to_json())
        paths[1].write_text(plan_cell(part, files, plan.capacity).to_json())
        trials.append(Trial(plan=str(paths[0]), part=str(paths[1]), capacity=plan.capacity))
    options = TrialOptions(
        trials=tuple(trials), part=str(folder / "part.json"), throughputs=str(folder / "throughputs.jsonl")
    )
    return with_trials(spec_of(files.cell, files.suite, workload_path), options)


def with_trials(spec: RunSpec, options: TrialOptions) -> RunSpec:
    """A spec whose task is to try plans."""
    return spec.model_copy(update={"task": TRY_CAPACITIES, "options": options.model_dump(mode="json")})


def beginning(workload: Workload, stages: int) -> Workload:
    """The first global batch of each job, or as many as there are stages, for a pipeline that is not empty mostly."""
    jobs = tuple(job.model_copy(update={"steps": min(len(job.batches), job.start + stages)}) for job in workload.jobs)
    return workload.model_copy(update={"jobs": jobs})


def sizes(most: int) -> Iterator[int]:
    """A capacity, three quarters of it, half of it, and so on. By halves alone a system that takes a power of two of
    samples can miss one: with 32,768 tokens four of WikiSum from each adapter, with 16,384 one, in between two."""
    while most:
        yield most
        if most > 1:
            yield most * 3 // 4
        most //= 2


def candidates(workload: Workload, files: CellFiles) -> list[Plan]:
    """The plans of a cell at its capacity and at smaller ones, without those that only say the same again; as far down
    as its planner can. Raises the planner's `UserError` where it cannot even at the first."""
    first, *smaller = sizes(files.cell.grid.capacity_of(files.cell.workload))
    plans = [plan_cell(workload, files, first)]
    for capacity in smaller:
        if len(plans) == MOST_TRIALS:
            break
        try:
            plan = plan_cell(workload, files, capacity)
        except UserError:
            break
        if plan.microbatches == plans[-1].microbatches:
            plans.pop()  # the smaller capacity says better what is in the plan
        plans.append(plan)
    return plans


def plan_cell(workload: Workload, files: CellFiles, capacity: int) -> Plan:
    """The plan of a workload as a cell runs it."""
    cell = files.cell
    return plan_system(workload, cell.system, stages=cell.stages, capacity=capacity,
                       data_parallel=cell.grid.data_parallel, costs=files.costs, graphs=files.graphs)  # fmt: skip


def _try_all(spec: RunSpec, processes: int, seconds: float, attempt: Attempt) -> list[Tried]:
    """What each capacity gave, in `seconds` for all. Memory that does not suffice ends the processes, and new ones go
    on with the next; whatever else ends them ends it all."""
    tried: list[Tried] = []
    options, end = TrialOptions.of(spec), time.monotonic() + seconds
    trials = options.trials
    for number in range(len(trials)):
        finished = Path(options.throughputs)
        finished.unlink(missing_ok=True)
        part = with_trials(spec, options.model_copy(update={"trials": trials}))
        outcome = attempt.launch(part, processes, max(1.0, end - time.monotonic()), number)
        rates = [json.loads(line) for line in finished.read_text().splitlines()] if finished.exists() else []
        tried += [Tried(capacity=trial.capacity, throughput=rate) for trial, rate in zip(trials, rates, strict=False)]
        if outcome.status != "ok":
            failed = trials[len(rates)]
            tried.append(Tried(capacity=failed.capacity, status=outcome.status, note=outcome.note))
        # Not where a smaller capacity does not fit and a larger one did.
        left = len(trials) - 1 if outcome.status == "oom" and not rates else 0
        left = attempt.decided(number, left, max(1.0, end - time.monotonic()))
        if not left:
            break
        trials = trials[-left:]
    return tried


def profile_cell(
    suite_path: Path,
    name: str,
    workload_path: Path,
    plan_path: Path,
    out: Path,
    tuned_path: Path | None = None,
    launch: Callable[..., Outcome] | None = None,
    nodes: int = 1,
) -> str:
    """Where the GPU's time goes in the first global batches of a cell, planned with the capacity of its plan; written
    as CSV, by the first of several nodes. Returns how it went in a line."""
    files, workload = _read(suite_path, name, workload_path)
    suite, cell = files.suite, files.cell
    if suite.device == "cpu":
        raise UserError(f"{suite_path}: a suite for a CPU; only a GPU's kernels can be told apart")
    plan = files.plan(plan_path, files.tuned(tuned_path))
    with tempfile.TemporaryDirectory(prefix="lorafusion-") as scratch, attempt_at(out, nodes, launch) as attempt:
        spec = trials_of(files, workload, workload_path, [plan], Path(scratch))
        task = spec.model_copy(update={"task": PROFILE_TRIAL})
        outcome = attempt.launch(task, cell.gpus, 60 * cell.grid.minutes)
    if other_node():
        return other_node()
    if outcome.status != "ok":
        raise UserError(f"profile: the run of {name} ended as {outcome.status}: {outcome.note}")
    identity = {
        "suite": suite.name,
        "cell": name,
        "workload": cell.workload,
        "qkv": "merged" if cell.grid.merged_qkv else "separate",
        "system": cell.system,
        "config_hash": files.configuration,
        "plan_hash": plan.content_hash,
    } | {key: value for key, value in provenance(suite.device).items() if key in PROFILE_COLUMNS}
    frame = pd.DataFrame([identity | row for row in outcome.report["profile"]], columns=PROFILE_COLUMNS)
    write(out, frame.to_csv(index=False))
    seal(out)
    return f"{len(frame)} classes of kernels"
