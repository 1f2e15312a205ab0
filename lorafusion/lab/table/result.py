"""The result file of a run: one JSON object, written whatever happened.

Its form is `Result`: the cell's identity and parameters, the metrics that it should have, those that it has, the
losses, and where all that comes from. A run that ended by itself is believed only where its report shows that it
trained the whole workload (`require_whole`).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from lorafusion.core.files import write
from lorafusion.core.plan import Plan, statistics_of
from lorafusion.core.schema import Int, shortened
from lorafusion.core.seals import sealed
from lorafusion.core.workload import Workload
from lorafusion.lab.table.idle import stages_of
from lorafusion.lab.table.vocabulary import METRICS, STATUSES, WINDOWS
from lorafusion.launch.outcome import FaultyRunError, Outcome

VERSION = 1
EXPECTED = (
    ("throughput", "whole"),
    ("throughput", "steady"),
    ("throughput_padded", "whole"),
    ("time", "whole"),
    ("peak_memory", "whole"),
    ("fill", "whole"),
)
MOST_SPANS = 30_000  # passes and steps of a process whose times are kept; of more only their sums
BESIDE = "beside other "  # begins the end of a note
CAUSES = {"bubble": "bubble", "host": "host_idle", "neighbour": "neighbour_idle"}  # why a stage is idle: its metric
CLOCKS_AGREE = 0.01  # of the host's seconds, by which the device's may differ


class ExpectedMetric(BaseModel):
    """A metric that a cell must have: a failed run has a row for it too."""

    model_config = ConfigDict(extra="forbid")

    metric: Literal[*METRICS]
    window: Literal[WINDOWS]


class ResultMetric(ExpectedMetric):
    """A number of a run, or why there is none.

    cell: columns in which it differs from the run's: a process of the kernel suite measures many cells.
    """

    value: float | None = Field(strict=True, allow_inf_nan=False)
    unit: str
    direction: str
    implementation: str | None = None
    note: str | None = None
    status: Literal[STATUSES] = "ok"
    cell: dict[str, Any] = {}

    @model_validator(mode="after")
    def _a_number_if_ok(self) -> ResultMetric:
        if (self.value is None) == (self.status == "ok"):
            raise ValueError(
                f"expected a number if and only if the status is ok, found {self.value} with {self.status}"
            )
        return self


class Provenance(BaseModel, extra="allow"):
    """Where a result comes from: what no result is without, and what else `Experiment.origin` says."""

    git_sha: str | None
    config_hash: str
    other_jobs: str | None = None
    other_gpu_processes: str | None = None
    other_nodes: list[dict[str, Any]] = []

    @property
    def company(self) -> str:
        """What else ran on the nodes of a run when it began, for its note; empty where nothing is known to have."""
        processes = [self.other_gpu_processes, *(node.get("other_gpu_processes") for node in self.other_nodes)]
        every = {"Slurm jobs": self.other_jobs, "GPU processes": "; ".join(filter(None, processes))}
        parts = [f"{what} ({shortened(names, 80)})" for what, names in every.items() if names]
        return f"{BESIDE}{' and '.join(parts)}" if parts else ""


class Result(BaseModel):
    """The content of a run's result file, all that the table reads of it."""

    version: Int = Field(ge=VERSION, le=VERSION)
    status: Literal[STATUSES]
    note: str = ""
    cell: dict[str, Any]
    expected: list[ExpectedMetric]
    metrics: list[ResultMetric]
    losses: dict[str, list[float | None]] = {}
    provenance: Provenance


def row(metric: str, value: float | None, window: str, cell: dict, *, status: str = "ok", **more: object) -> dict:
    """A number of a run with the unit and the direction of its metric, or why there is none. cell: the columns in
    which it differs from what is common to the result file."""
    unit, direction, _ = METRICS[metric]
    return {"metric": metric, "value": None if value is None else float(value), "unit": unit, "direction": direction,
            "window": window, "status": status, "cell": cell, **more}  # fmt: skip


def result_of_rows(rows: list[dict], cell: dict, provenance: dict) -> dict:
    """The content of the result file of a process that measured many cells. cell: what they have in common."""
    return {"version": VERSION, "status": "ok", "cell": cell, "expected": [], "metrics": rows,
            "provenance": provenance}  # fmt: skip


def result_of(
    outcome: Outcome, workload: Workload, plan: Plan | None, cell: dict, provenance: dict, schedule: str | None = None
) -> dict:
    """The content of the result file. A run that did not train the whole workload, or whose clocks cannot be believed,
    has status `nan` or `crash` and no metrics. schedule: of the simulator, if it is not that of the plan."""
    status, note, report = outcome.status, outcome.note, outcome.report
    if status == "ok":
        try:
            require_whole(report, workload, plan)
        except FaultyRunError as fault:
            status, note = fault.status, str(fault)
    cost = report.get("cost", {})
    if status == "ok" and "unknown" in cost:
        note = "; ".join(filter(None, [note, f"the cost is unknown: {cost['unknown']}"]))
    note = "; ".join(filter(None, [note, outcome.without_graphs]))
    stages = stages_of(report, plan, schedule) if status == "ok" else []
    return {key: report[key] for key in ("graphs", "start_up") if key in report} | {
        "version": VERSION,
        "status": status,
        "note": note,
        "cell": cell,
        "expected": [{"metric": metric, "window": window} for metric, window in EXPECTED],
        "metrics": metrics(report, workload, plan, stages) if status == "ok" else [],
        "losses": {name: [_loss(value) for value in values] for name, values in report.get("losses", {}).items()},
        "steps": report.get("steps", {}),
        "cost": cost,
        "clocks": [dict(zip(("device", "host"), seconds, strict=True)) for seconds in report.get("clocks", [])],
        "stages": stages,
        "times": _kept_times(report.get("times", [])),
        "provenance": provenance,
    }


def _kept_times(times: list[dict[str, list[int]]]) -> list[dict[str, list[int]]]:
    """Of each process, as in `Record.times`; none where a plan is so long that its results would be large."""
    most = max((len(spans) // 3 for process in times for spans in process.values()), default=0)
    return times if most <= MOST_SPANS else []


def _loss(value: float | None) -> float | None:
    """A loss as JSON has it."""
    return value if value is not None and math.isfinite(value) else None


def require_whole(report: dict, workload: Workload, plan: Plan) -> None:
    """Raise `FaultyRunError` unless a report (`timed.report_of`) is of a run that trained all of its workload: every
    loss is there and finite, every adapter made every step, the plan's tokens are the workload's, and the times are
    those of a run."""
    losses = report["losses"]
    for job in workload.jobs:
        if any(value is not None and not math.isfinite(value) for value in losses.get(job.name, [])):
            raise FaultyRunError("nan", f"the loss of {job.name} is not finite")
    require_steps(report, {job.name: len(job.batches) - job.start for job in workload.jobs})
    for job in workload.jobs:
        values = losses.get(job.name, [])
        missing = [batch for batch in range(len(job.batches)) if batch >= len(values) or values[batch] is None]
        if missing:
            raise FaultyRunError("crash", f"the loss of global batch {missing[0]} of {job.name} is missing or in part")
    tokens = statistics_of(plan.microbatches, plan.capacity).tokens
    if tokens != workload.tokens:
        raise FaultyRunError("crash", f"the plan has {tokens} tokens, its workload {workload.tokens}")
    require_clocks(report["clocks"], plan.stages * plan.data_parallel)
    _require_marks(report["seconds"], plan, report["clocks"][0][0])
    if report["peak_memory"] <= 0:
        raise FaultyRunError("crash", f"the peak of memory is {report['peak_memory']} bytes")


def require_steps(report: dict, expected: dict[str, int]) -> None:
    """Raise `FaultyRunError` unless each adapter made as many optimizer steps as expected, and none was stopped."""
    for name, steps in expected.items():
        count = report["steps"].get(name, 0)
        statement = f"{name} made {count} of {steps} steps"
        if name in report["stopped"]:
            raise FaultyRunError("nan", f"{statement}: it was stopped by a gradient that is not finite")
        if count != steps:
            raise FaultyRunError("crash", statement)
    unknown = sorted(set(report["steps"]) - set(expected))
    if unknown or not expected:
        raise FaultyRunError("crash", f"the run had another adapter, {unknown[0]}" if unknown else "no adapter trained")


def require_clocks(clocks: list[list[float]], processes: int) -> None:
    """Raise `FaultyRunError` unless the device's seconds and the host's, of each process, are the same."""
    if len(clocks) != processes:
        raise FaultyRunError("crash", f"the report has the times of {len(clocks)} processes, the run had {processes}")
    for rank, (device, host) in enumerate(clocks):
        statement = f"process {rank} ran {device:.6g} s by its device's clock and {host:.6g} s by the host's"
        if not (0 < device < math.inf and 0 < host < math.inf):
            raise FaultyRunError("crash", statement)
        if abs(device - host) > CLOCKS_AGREE * host:
            raise FaultyRunError("crash", f"{statement}, more than {CLOCKS_AGREE:.0%} apart")


def _require_marks(marks: list[list[float]], plan: Plan, end: float) -> None:
    """Raise unless the first stage was done with every slot, or, as a schedule that flushes notes it, with each that
    steps; one after the other, between the start of its clock and the end."""
    stepping = [slot for slot, parts in enumerate(plan.slots()) if any(part.step_after for part in parts)]
    if [slot for slot, _ in marks] not in ([*range(len(plan.slots()))], stepping):
        raise FaultyRunError("crash", f"the times of microbatches {', '.join(str(slot) for slot, _ in marks[:5])}, ... "
                                      f"are not those of the plan's {len(plan.slots())} in their order")  # fmt: skip
    times = [0.0, *(time for _, time in marks), end]
    for (before, after), slot in zip(pairwise(times), [*(slot for slot, _ in marks), "the end"], strict=True):
        if not before <= after:
            raise FaultyRunError("crash", f"the clock ran backwards: {after:.6g} s at {slot}, after {before:.6g} s")


def whole_seconds(report: dict) -> float:
    """From the start of the clock to when the last process's device had done its work."""
    return max(device for device, _ in report["clocks"])


def metrics(report: dict, workload: Workload, plan: Plan, stages: Sequence[dict] = ()) -> list[dict]:
    """The numbers of a run that ended well. stages: as `stages_of` has them."""
    whole = whole_seconds(report)
    steady, window = steady_throughput({slot: time for slot, time in report["seconds"]}, plan)
    padded = sum(microbatch.length for microbatch in plan.microbatches)
    rows = [
        _number("throughput", workload.tokens / whole),
        _number("throughput", steady, "steady", note=window),
        _number("throughput_padded", padded / whole),
        _number("time", whole),
        _number("peak_memory", report["peak_memory"], note="largest over the processes"),
        _number("fill", statistics_of(plan.microbatches, plan.capacity).fill),
    ]
    rows += [_number("time", time, "steady", implementation=name) for name, time in report["canary"].items()]
    for cause, name in CAUSES.items() if stages else ():
        shares = [stage[cause] for stage in stages]
        note = f"mean of {len(shares)}, the largest {max(shares):.3f}" if len(shares) > 1 else ""
        rows.append(_number(name, sum(shares) / len(shares), note=note))
    if "throughput" in (frozen := report.get("frozen", {})):
        rows.append(_number("frozen_throughput", frozen["throughput"], note=frozen["part"]))
    idle = sum(stage[cause] for stage in stages for cause in CAUSES) / len(stages) if stages else None
    return rows + cost_metrics(report.get("cost", {}), idle)


def _number(
    metric: str, value: float, window: str = "whole", implementation: str | None = None, note: str = ""
) -> dict:
    """A row of a run that measures one cell."""
    return row(metric, value, window, {}, implementation=implementation, note=note)


def cost_metrics(cost: dict, idle: float | None) -> list[dict]:
    """What a run costs besides time (`cost.cost_of`), where that is known. idle: the share of the whole run in which
    the devices did nothing, if anything tells it."""
    if "counts" not in cost:
        return []
    counts, scale = cost["counts"], 1000 / cost["tokens"]
    numbers = {name: scale * counts[name] for name in ("operators", "kernels", "launches") if name in counts}
    if "busy_ms" in counts:
        numbers |= {"device_busy": scale * counts["busy_ms"]} | ({} if idle is None else {"busy": 1 - idle})
    return [_number(name, value, note=cost["part"]) for name, value in numbers.items()]


def steady_throughput(seconds: dict[int, float], plan: Plan) -> tuple[float, str]:
    """Tokens per second between two backwards of the first stage, fill and drain left out, and which two.

    seconds: when the first stage was done with a slot (for a flushing schedule, with the last of a global
    batch). The window begins at the first such time that has at least 2 S microbatches before it and ends at the
    last that has S - 1 after it; where a plan is too short for that, it is from the first time to the last.
    """
    slots, stages = plan.slots(), plan.stages
    count = len(slots)
    marks = sorted(seconds)
    inside = [index for index in marks if 2 * stages <= index <= count - stages]
    if len(marks) == 1:
        tokens = statistics_of(plan.microbatches, plan.capacity).tokens
        return tokens / seconds[marks[0]], "the whole run, which has only one step"
    begin, end = (inside[0], inside[-1]) if len(inside) > 1 else (marks[0], marks[-1])
    tokens = sum(microbatch.tokens for slot in slots[begin + 1 : end + 1] for microbatch in slot)
    return tokens / (seconds[end] - seconds[begin]), f"microbatches {begin + 1} to {end} of {count}"


def write_result(path: str | Path, content: dict) -> None:
    """Write the file with its seal, whole or not at all; lists of numbers have a line each."""
    write(Path(path), re.sub(r"\n +(?=[-\d])", " ", json.dumps(sealed(content), indent=1)) + "\n")
