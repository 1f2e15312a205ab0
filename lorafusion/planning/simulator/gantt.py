"""Gantt charts of a timeline: in the terminal, and, where matplotlib is installed, as a picture and as a page."""

from __future__ import annotations

import io
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lorafusion.core.files import whole, write
from lorafusion.core.plan import Plan
from lorafusion.core.plugins import import_extra
from lorafusion.core.schema import one_of
from lorafusion.core.workload import Workload
from lorafusion.planning.simulator.timeline import BACKWARD, FORWARD, STEP, Timeline

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Window = tuple[float, float]
# Okabe and Ito's, without black; adapters beyond them begin anew.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442")
SUFFIXES = (".html", ".pdf", ".png", ".svg")
MOST_ROWS = 20  # jobs that the terminal lists
MOST_NAMES = 14  # adapters that the legend names
WIDTH, DPI = 7.0, 200  # inches of a picture, and pixels of an inch
PARAMETERS = {"font.size": 8, "legend.frameon": False, "axes.spines.top": False, "axes.spines.right": False,
              "svg.hashsalt": "lorafusion"}  # fmt: skip
PAGE = """<!doctype html><html lang='en'><head><meta charset='utf-8'><title>Plan</title>
<meta name='viewport' content='width=device-width, initial-scale=1'>
<style>body {{ font: 14px/1.4 system-ui, sans-serif; margin: 1rem; }}
th, td {{ padding: .25rem .6rem; text-align: left; }} svg {{ max-width: 100%; }}</style></head>
<body><h1>Plan</h1><table>{rows}</table>
{chart}
<h2>When jobs end</h2><table>{jobs}</table>
</body></html>
"""


def window_of(timeline: Timeline, first: int, count: int) -> Window:
    """From when the first of some microbatches begins on any stage to when the last of them has ended on all."""
    times = [
        (start, end)
        for processor in range(timeline.processors)
        for _, index, start, end in timeline.of(processor)
        if first <= index < first + count and end > start
    ]
    return (min(start for start, _ in times), max(end for _, end in times)) if times else (0.0, timeline.makespan)


class JobEnd(NamedTuple):
    """When a job's last step is done, and what it states of that, where the workload is there."""

    name: str
    end: float
    priority: int | None = None
    weight: float | None = None


def job_ends(plan: Plan, timeline: Timeline, workload: Workload | None = None) -> list[JobEnd]:
    """The ends of all jobs of a plan, the first to end first."""
    times = timeline.job_ends(plan.stepping())
    jobs = workload.jobs if workload else None
    ends = [
        JobEnd(jobs[adapter].name, end, jobs[adapter].priority, jobs[adapter].weight)
        if jobs
        else JobEnd(f"adapter {adapter}", end)
        for adapter, end in sorted(times.items())
    ]
    return sorted(ends, key=lambda job: job.end)


def statistics(plan: Plan, timeline: Timeline, unit: str, ends: list[JobEnd]) -> dict[str, str]:
    """What a plan's page and its terminal output say of it."""
    s, bubble = plan.statistics, timeline.bubble("steady")
    peaks = timeline.peak_in_flight()
    times, weights = ([job.end for job in ends], [job.weight for job in ends if job.weight is not None])
    mean = f"after {np.mean(times) / timeline.makespan:.1%} of it on average"
    if weights:
        mean += f", {np.average(times, weights=weights) / timeline.makespan:.1%} by their weights"
    return {
        "system": plan.system,
        "stages × replicas": f"{plan.stages} × {plan.data_parallel}",
        "microbatches": f"{s.microbatches}, of them {s.noops} no-ops; the tokens need {s.lower_bound}",
        "fill": f"{s.fill:.3f} of {plan.capacity} tokens; the fullest has {max(m.tokens for m in plan.microbatches)}",
        **_buckets(plan),
        "adapters of a microbatch": f"{_adapters(plan):.2f} on average",
        "makespan": f"{timeline.makespan:,.4g} {unit}",
        "jobs end": mean,
        "throughput": f"{timeline.throughput('whole'):,.4g} tokens/{unit} whole, "
        f"{timeline.throughput('steady'):,.4g} steady",
        "bubble, steady": f"{bubble.mean():.1%} (stages: {', '.join(f'{share:.1%}' for share in bubble)})",
        "bubble, whole": f"{timeline.bubble('whole').mean():.1%}",
        "in flight at most": ", ".join(f"{count} ({tokens:,} tokens)" for count, tokens in peaks),
    }


def _buckets(plan: Plan) -> dict[str, str]:
    """Of a plan that has any."""
    padding = sum(microbatch.padding for microbatch in plan.microbatches)
    sizes = ", ".join(str(bucket.tokens) for bucket in plan.buckets)
    return {"buckets": f"{sizes} tokens; {padding / plan.statistics.tokens:.1%} of padding"} if sizes else {}


def _adapters(plan: Plan) -> float:
    real = [len(microbatch.segments) for microbatch in plan.microbatches if not microbatch.noop]
    return sum(real) / len(real)


def _job_rows(ends: list[JobEnd], timeline: Timeline, unit: str) -> list[tuple[str, ...]]:
    """A table of when each job ends, its heading first."""
    rows: list[tuple[str, ...]] = [("job", "ends after", "of the makespan", "priority", "weight")]
    for job in ends:
        stated = () if job.weight is None else (f"{job.priority}", f"{job.weight:g}")
        rows.append((job.name, f"{job.end:,.4g} {unit}", f"{job.end / timeline.makespan:.1%}", *stated))
    return [row[: len(rows[-1])] for row in rows]


def print_plan(plan: Plan, timeline: Timeline, unit: str, window: Window, workload: Workload | None = None) -> None:
    """Statistics, when jobs end, and a chart as wide as the terminal."""
    console, ends = Console(highlight=False), job_ends(plan, timeline, workload)
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for name, value in statistics(plan, timeline, unit, ends).items():
        table.add_row(name, value)
    console.print(table)
    table = Table(box=None, padding=(0, 2, 0, 0))
    (first, *others), *rows = _job_rows(ends, timeline, unit)
    table.add_column(first)
    for name in others:
        table.add_column(name, justify="right")
    for row in rows[:MOST_ROWS]:
        table.add_row(*row)
    console.print()
    console.print(table)
    if len(rows) > MOST_ROWS:
        console.print(f"and {len(rows) - MOST_ROWS} more, which a page has (--out plan.html)")
    begin, end = window
    console.print(f"\n{begin:,.4g} to {end:,.4g} {unit}; f forward, B backward, · idle")
    for processor in range(timeline.processors):
        label = f"{_label(plan, timeline, processor):18}"
        console.print(_row(plan, timeline, processor, window, max(20, console.width - 20), label))
    console.print(_legend(plan, [job.name for job in workload.jobs] if workload else None))


def _row(plan: Plan, timeline: Timeline, processor: int, window: Window, width: int, label: str) -> Text:
    """A line of a processor, each character what it does most of that time."""
    begin, end = window
    shares = np.zeros((width, 2, _count(plan)))
    edges = np.linspace(begin, end, width + 1)
    for kind, index, start, stop in timeline.of(processor):
        segments = plan.microbatches[index].segments
        if stop <= begin or start >= end or not segments or kind == STEP:
            continue
        overlap = np.clip(np.minimum(stop, edges[1:]) - np.maximum(start, edges[:-1]), 0, None)
        for segment in segments:
            shares[:, kind, segment.adapter] += overlap * segment.tokens / plan.microbatches[index].tokens
    text = Text(label)
    for column in shares:
        if column.sum() < (end - begin) / width / 2:
            text.append("·", "dim")
            continue
        kind = int(column[BACKWARD].sum() > column[FORWARD].sum())
        colour = _colour(int(column.sum(axis=0).argmax()))
        text.append("fB"[kind], f"black on {colour}" if kind else colour)
    return text


def _colour(adapter: int) -> str:
    return COLOURS[adapter % len(COLOURS)]


def _count(plan: Plan) -> int:
    return 1 + max(segment.adapter for microbatch in plan.microbatches for segment in microbatch.segments)


def _legend(plan: Plan, names: list[str] | None) -> Text:
    text = Text(" " * 18)
    for adapter in range(min(_count(plan), MOST_NAMES)):
        name = names[adapter] if names else f"adapter {adapter}"
        text.append(f"{name}  ", _colour(adapter))
    return text


def draw(plan: Plan, timeline: Timeline, unit: str, window: Window) -> Figure:
    """A row for each processor; a microbatch is divided by the tokens of its adapters, a backward is darker."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    with matplotlib.rc_context(PARAMETERS):
        rows = timeline.processors
        figure = Figure(figsize=(WIDTH, 0.9 + 0.34 * rows), layout="constrained")
        ax = figure.subplots()
        for processor in range(rows):
            _draw_row(ax, plan, timeline, processor, window)
        ax.set_xlim(window)
        ax.set_ylim(rows - 0.5, -0.5)
        ax.set_yticks(range(rows), [_label(plan, timeline, processor) for processor in range(rows)])
        ax.set_xlabel(f"time in {unit}")
        handles = [
            Patch(facecolor=_colour(adapter), label=f"adapter {adapter}")
            for adapter in range(min(_count(plan), MOST_NAMES))
        ]
        handles.append(Patch(facecolor="white", edgecolor="0.3", hatch="////", label="backward"))
        figure.legend(handles=handles, loc="outside upper center", ncols=min(8, len(handles)))
    return figure


def _label(plan: Plan, timeline: Timeline, processor: int) -> str:
    replica, stage = divmod(processor, timeline.stages)
    return f"stage {stage}" if plan.data_parallel == 1 else f"replica {replica} stage {stage}"


def _draw_row(ax: Axes, plan: Plan, timeline: Timeline, processor: int, window: Window) -> None:
    height = 0.8
    for kind, index, start, stop in timeline.of(processor):
        if stop <= start or stop < window[0] or start > window[1]:
            continue
        microbatch, bottom = plan.microbatches[index], processor - height / 2
        if kind == STEP:
            ax.bar(start, height, stop - start, bottom, align="edge", color="black", linewidth=0)
            continue
        for segment in microbatch.segments:
            part = height * segment.tokens / microbatch.tokens
            colour = _colour(segment.adapter)
            hatch = {"hatch": "////", "edgecolor": "white", "linewidth": 0} if kind == BACKWARD else {"linewidth": 0}
            ax.bar(start, part, stop - start, bottom, align="edge", facecolor=colour, **hatch)
            bottom += part
        ax.bar(start, height, stop - start, processor - height / 2, align="edge", fill=False, edgecolor="white",
               linewidth=0.5)  # fmt: skip


def save(
    plan: Plan, timeline: Timeline, unit: str, window: Window, path: str | Path, workload: Workload | None = None
) -> None:
    """Write the chart by its suffix; a page has the statistics and the ends of all jobs as well."""
    out = Path(path)
    one_of("form of chart", out.suffix, set(SUFFIXES), out)
    matplotlib = import_extra("matplotlib", "lab", str(out))
    figure = draw(plan, timeline, unit, window)
    out.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(PARAMETERS):
        if out.suffix != ".html":
            empty = {".png": {"Software": None}, ".pdf": {"CreationDate": None}, ".svg": {"Date": None}}[out.suffix]
            with whole(out) as partial:
                figure.savefig(partial, format=out.suffix[1:], dpi=DPI, metadata=empty)
            return
        drawn = io.StringIO()
        figure.savefig(drawn, format="svg", metadata={"Date": None})
    svg = drawn.getvalue()
    ends = job_ends(plan, timeline, workload)
    rows = "".join(
        f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>"
        for name, value in statistics(plan, timeline, unit, ends).items()
    )
    heading, *jobs = _job_rows(ends, timeline, unit)
    table = _html_row(heading, "th") + "".join(_html_row(row, "td") for row in jobs)
    write(out, PAGE.format(rows=rows, chart=svg[svg.index("<svg") :], jobs=table))


def _html_row(values: tuple[str, ...], tag: str) -> str:
    return f"<tr>{''.join(f'<{tag}>{escape(value)}</{tag}>' for value in values)}</tr>"
