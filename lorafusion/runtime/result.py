"""The result file of a run: one JSON object, written whatever happened.

Its form is what `lorafusion.measure.table` reads: the cell's identity and parameters, the metrics that it should
have, those that it has, the losses, and where all that comes from.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

from lorafusion.files import write
from lorafusion.plan import Plan
from lorafusion.runtime.launch import Outcome

VERSION = 1
EXPECTED = (
    ("throughput", "whole"),
    ("throughput", "steady"),
    ("throughput_padded", "whole"),
    ("time", "whole"),
    ("peak_memory", "whole"),
    ("fill", "whole"),
)


@dataclass(frozen=True)
class Metric:
    """One number of a run, in the table's vocabulary."""

    metric: str
    value: float
    unit: str
    direction: str
    window: str
    implementation: str | None = None
    note: str = ""


def result_of(outcome: Outcome, plan: Plan | None, cell: dict, provenance: dict) -> dict:
    """The content of the result file. A run with a loss that is no number has status `nan` and no metrics."""
    status, note = outcome.status, outcome.note
    losses = outcome.report.get("losses", {})
    broken = [name for name, values in losses.items() if not all(map(math.isfinite, values))]
    if broken:
        status, note = "nan", f"the loss of {broken[0]} is not finite"
    return {
        "version": VERSION,
        "status": status,
        "note": note,
        "cell": cell,
        "expected": [{"metric": metric, "window": window} for metric, window in EXPECTED],
        "metrics": [asdict(metric) for metric in metrics(outcome.report, plan)] if status == "ok" else [],
        "losses": {
            name: [value if math.isfinite(value) else None for value in values] for name, values in losses.items()
        },
        "provenance": provenance,
    }


def metrics(report: dict, plan: Plan) -> list[Metric]:
    """The numbers of a run that ended well."""
    seconds = {index: time for index, time in report["seconds"]}
    whole = max(seconds.values())
    steady, window = steady_throughput(seconds, plan)
    padded = sum(microbatch.length for microbatch in plan.microbatches)
    peak_note = "largest over the processes"
    out = [
        Metric("throughput", plan.statistics.tokens / whole, "tok/s", "higher", "whole"),
        Metric("throughput", steady, "tok/s", "higher", "steady", note=window),
        Metric("throughput_padded", padded / whole, "tok/s", "higher", "whole"),
        Metric("time", whole, "s", "lower", "whole"),
        Metric("peak_memory", report["peak_memory"], "B", "lower", "whole", note=peak_note),
        Metric("fill", plan.statistics.fill, "1", "higher", "whole"),
    ]
    for name, time in report["canary"].items():
        out.append(Metric("time", time, "s", "lower", "steady", implementation=name))
    return out


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
        return plan.statistics.tokens / seconds[marks[0]], "the whole run, which has only one step"
    begin, end = (inside[0], inside[-1]) if len(inside) > 1 else (marks[0], marks[-1])
    tokens = sum(microbatch.tokens for slot in slots[begin + 1 : end + 1] for microbatch in slot)
    return tokens / (seconds[end] - seconds[begin]), f"microbatches {begin + 1} to {end} of {count}"


def write_result(path: str | Path, content: dict) -> None:
    """Write the file whole or not at all."""
    write(Path(path), json.dumps(content, indent=1) + "\n")
