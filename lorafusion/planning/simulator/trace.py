"""A timeline as a Chrome trace, which Perfetto (ui.perfetto.dev) and chrome://tracing open."""

import json
from pathlib import Path

from lorafusion.core.files import write
from lorafusion.core.plan import Plan
from lorafusion.planning.simulator.timeline import KINDS, STEP, Timeline

COLOURS = ("good", "thread_state_running", "bad")  # names that the viewers know


def write_trace(timeline: Timeline, plan: Plan, path: str | Path) -> None:
    """Write the operations that take time: a process for each replica, a thread for each stage, microseconds."""
    events: list[dict] = []
    for processor in range(timeline.processors):
        replica, stage = divmod(processor, timeline.stages)
        where = {"pid": replica, "tid": stage}
        events.append({"ph": "M", "name": "process_name", **where, "args": {"name": f"replica {replica}"}})
        events.append({"ph": "M", "name": "thread_name", **where, "args": {"name": f"stage {stage}"}})
        events.append({"ph": "M", "name": "thread_sort_index", **where, "args": {"sort_index": stage}})
        for kind, index, start, end in timeline.of(processor):
            if end > start:
                microbatch = plan.microbatches[index]
                adapters = microbatch.step_after if kind == STEP else [part.adapter for part in microbatch.segments]
                events.append(
                    {
                        "ph": "X",
                        "name": f"{KINDS[kind]} {index}",
                        "cat": KINDS[kind],
                        "cname": COLOURS[kind],
                        **where,
                        "ts": start * 1e6,
                        "dur": (end - start) * 1e6,
                        "args": {"microbatch": index, "tokens": microbatch.tokens, "adapters": list(adapters)},
                    }
                )
    write(Path(path), json.dumps({"displayTimeUnit": "ms", "traceEvents": events}) + "\n")
