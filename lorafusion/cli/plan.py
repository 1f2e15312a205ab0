"""`lorafusion plan`: make a plan, look at one, and choose how to run a workload."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from typer.core import TyperGroup

from lorafusion.cli.common import CommandLine, Out, Written
from lorafusion.core.files import write
from lorafusion.core.schema import MOST_PROCESSES, MOST_TOKENS, UserError, one_of

MAKE = "make"
MOST_GIBIBYTES = 2**20  # of a GPU


class _MakesByDefault(TyperGroup):
    """`lorafusion plan workload.json` is `lorafusion plan make workload.json`."""

    def parse_args(self, ctx, args):
        if args and args[0] not in self.commands and args[0] != "--help":
            args = [MAKE, *args]
        return super().parse_args(ctx, args)


plan_app = CommandLine(
    cls=_MakesByDefault,
    help="Plan a workload (`plan WORKLOAD.json`), or look at a plan (`plan show PLAN.json`).",
)


@plan_app.command(MAKE)
def make(
    workload: Annotated[Path, typer.Argument(help="a workload file")],
    out: Out,
    system: Annotated[str | None, typer.Option(help="a name of configs/systems.yaml; by default lorafusion")] = None,
    strategy: Annotated[str | None, typer.Option(help="a strategy of the scheduler instead: fast, paper, …")] = None,
    stages: Annotated[int, typer.Option(min=1, max=MOST_PROCESSES, help="pipeline stages")] = 1,
    capacity: Annotated[int, typer.Option(min=1, max=MOST_TOKENS, help="tokens a microbatch may hold")] = 8192,
    tuned: Annotated[Path | None, typer.Option(help="take the capacity that `lorafusion tune` wrote there")] = None,
    data_parallel: Annotated[int, typer.Option(min=1, max=MOST_PROCESSES, help="replicas of the pipeline")] = 1,
    model: Annotated[str | None, typer.Option(help="a name of configs/models, whose costs fast plans by")] = None,
    costs: Annotated[Path | None, typer.Option(help="a cost model (YAML) instead; by default stages are equal")] = None,
) -> None:
    """Plan a workload for a system, and check the plan."""
    from lorafusion.core.config import read_systems
    from lorafusion.core.workload import Workload
    from lorafusion.planning import STRATEGIES, plan_system, plan_workload
    from lorafusion.planning.simulator import chosen_costs

    read, options = Workload.read(workload), {}
    if model or costs:
        options["costs"] = chosen_costs(stages, model, costs)
    if tuned is not None:
        from lorafusion.lab.tuning import Tuned

        found = Tuned.read(tuned)
        found.require(tuned, read, system or "lorafusion", stages, data_parallel)
        capacity = found.capacity
    sizes = {"stages": stages, "capacity": capacity, "data_parallel": data_parallel}
    if strategy is not None:
        if system is not None:
            raise UserError(f"either --system or --strategy, found {system} and {strategy}")
        one_of("strategy", strategy, set(STRATEGIES), "plan")
        name, planner = strategy, STRATEGIES[strategy]
    else:
        systems, name = read_systems(), system or "lorafusion"
        one_of("system", name, set(systems), "--system")
        planner = systems[name].planner
    if options and planner != STRATEGIES["fast"]:
        raise UserError(f"--model, --costs: {name} does not plan by costs; fast does")
    if strategy is not None:
        made = plan_workload(read, strategy, **sizes, **options)
    else:
        made = plan_system(read, name, **sizes, **options)
    write(out, made.to_json())
    s = made.statistics
    print(f"{out}: {s.microbatches} microbatches ({s.noops} no-ops, at least {s.lower_bound}), fill {s.fill:.3f}")


@plan_app.command("show")
def show(
    plan: Annotated[Path, typer.Argument(help="a plan file")],
    workload: Annotated[Path | None, typer.Option(help="its workload, for sample lengths and names")] = None,
    model: Annotated[str | None, typer.Option(help="a name of configs/models, whose costs are simulated")] = None,
    costs: Annotated[Path | None, typer.Option(help="a cost model (YAML) instead")] = None,
    schedule: Annotated[str | None, typer.Option(help="stream, flush, gpipe, greedy, sharded")] = None,
    first: Annotated[int, typer.Option(min=0, help="first microbatch of the chart")] = 0,
    count: Annotated[int, typer.Option(min=1, help="microbatches of the chart")] = 24,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="write the chart: .png, .svg, .pdf or .html"), Written()
    ] = None,
    trace: Annotated[Path | None, typer.Option(help="write a Chrome trace for ui.perfetto.dev"), Written()] = None,
) -> None:
    """Statistics and a Gantt chart of a plan, simulated."""
    from lorafusion.core.plan import Plan, check
    from lorafusion.core.workload import Workload
    from lorafusion.lab.report import gantt
    from lorafusion.planning.simulator import simulate_plan
    from lorafusion.planning.simulator.trace import write_trace

    made = Plan.read(plan)
    jobs = Workload.read(workload) if workload else None
    if jobs is not None:
        check(made, jobs, plan)
    timeline, unit = simulate_plan(made, jobs, model, costs, schedule)
    window = gantt.window_of(timeline, first, count)
    gantt.print_plan(made, timeline, unit, window, [job.name for job in jobs.jobs] if jobs else None)
    if trace:
        write_trace(timeline, made, trace)
        print(f"{trace}: open it in https://ui.perfetto.dev")
    if out:
        gantt.save(made, timeline, unit, window, out)
        print(out)


@plan_app.command("propose")
def propose(
    workload: Annotated[Path, typer.Argument(help="a workload file")],
    model: Annotated[str, typer.Option(help="a name of configs/models")],
    gpus: Annotated[int, typer.Option(min=1, max=MOST_PROCESSES, help="GPUs to use, all of them")],
    memory: Annotated[float, typer.Option(min=1, help="GiB of a GPU")] = 80.0,
    checkpointing: Annotated[bool, typer.Option(help="recompute activations in the backward pass")] = False,
) -> None:
    """Propose stages, replicas and capacity, with the throughput that the simulator predicts for each choice."""
    if not 1 <= memory <= MOST_GIBIBYTES:
        raise UserError(f"--memory: expected 1 to {MOST_GIBIBYTES} GiB, found {memory}")
    from rich.console import Console
    from rich.table import Table

    from lorafusion.core.config import read_model
    from lorafusion.core.workload import Workload
    from lorafusion.planning.propose import propose

    choices = propose(Workload.read(workload), read_model(model), gpus, int(memory * 2**30), checkpointing)
    table = Table(box=None)
    for name in ("stages", "replicas", "capacity", "of at most", "tokens/s", "bubble", "GiB", ""):
        table.add_column(name, justify="left" if not name else "right")
    for choice in choices:
        numbers = ["", "", "", ""]
        if not choice.reason:
            numbers = [f"{choice.capacity}", f"{choice.throughput:,.0f}", f"{choice.bubble:.1%}",
                       f"{choice.memory / 2**30:.1f}"]  # fmt: skip
        table.add_row(f"{choice.stages}", f"{choice.data_parallel}", numbers[0], f"{choice.largest_capacity}",
                      *numbers[1:], choice.reason)  # fmt: skip
    Console(highlight=False).print(table)
