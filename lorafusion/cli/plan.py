"""`lorafusion plan`: make a plan, look at one, and choose how to run a workload."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from lorafusion.cli.common import CommandLine, Out, Written
from lorafusion.core.files import write
from lorafusion.core.schema import MOST_PROCESSES, MOST_STAGES, MOST_STEPS, MOST_TOKENS, UserError, one_of

if TYPE_CHECKING:
    from lorafusion.core.workload import Workload
    from lorafusion.planning.simulator import Question

SYSTEM = "lorafusion"
CAPACITY = 8192  # tokens
MAKE = "make"
MOST_GIBIBYTES = 2**20  # of a GPU
LEAST_GIGABYTES, MOST_GIGABYTES = 1e-3, 1e6  # a second, of a link


class _MakesByDefault(TyperGroup):
    """`lorafusion plan workload.json` is `lorafusion plan make workload.json`."""

    def parse_args(self, ctx, args):
        if args and args[0] not in self.commands and args[0] != "--help":
            args = [MAKE, *args]
        return super().parse_args(ctx, args)


plan_app = CommandLine(
    cls=_MakesByDefault,
    help="Plan a workload or a jobs file (`plan FILE`), look at a plan (`plan show PLAN`), or choose how to run one.",
)


@plan_app.command(MAKE, example="lorafusion plan workload.json --stages 2 --out plan.json")
def make(
    workload: Annotated[Path, typer.Argument(help="a workload file (JSON), or a jobs file (YAML)")],
    out: Out,
    system: Annotated[str | None, typer.Option(help="a name of configs/systems.yaml; by default lorafusion")] = None,
    strategy: Annotated[str | None, typer.Option(help="a strategy of the planner instead: fast, paper, ...")] = None,
    stages: Annotated[
        int | None, typer.Option(min=1, max=MOST_STAGES, help="pipeline stages; by default the jobs file's, or 1")
    ] = None,
    capacity: Annotated[
        int | None,
        typer.Option(min=1, max=MOST_TOKENS, help="tokens of a microbatch; by default the jobs file's, or 8192"),
    ] = None,
    data_parallel: Annotated[
        int | None,
        typer.Option(min=1, max=MOST_PROCESSES, help="replicas of the pipeline; by default the jobs file's, or 1"),
    ] = None,
    model: Annotated[str | None, typer.Option(help="a name of configs/models, whose costs fast plans by")] = None,
    costs: Annotated[
        Path | None, typer.Option(help="a cost model, or a profile of the model (YAML); by default stages are equal")
    ] = None,
    aim: Annotated[
        str | None,
        typer.Option(
            help="throughput, or completion: jobs end early, in up to 2.5 % more time; by default completion for a "
            "jobs file and where a job states a priority or a weight"
        ),
    ] = None,
    graphs: Annotated[
        bool | None,
        typer.Option(help="for stages that replay CUDA graphs; by default as the jobs file says, or not"),
    ] = None,
) -> None:
    """Plan a workload for a system, and check the plan."""
    from lorafusion.planning import COMPLETION, plan_system, plan_workload
    from lorafusion.planning.simulator import chosen_costs, costs_for

    jobs, sizes, question, stated_graphs = _jobs_of(workload)
    given = {"stages": stages, "capacity": capacity, "data_parallel": data_parallel}
    sizes |= {name: size for name, size in given.items() if size is not None}
    name, is_fast = _planner(system, strategy, graphs)
    options: dict[str, Any] = {}
    if graphs or (graphs is None and stated_graphs and name == SYSTEM):
        options["graphs"] = True
    if aim and not is_fast:
        raise UserError(f"--aim: {name} has none; fast does")
    if aim or (question and is_fast):
        options["aim"] = aim or COMPLETION
    if (model or costs) and not is_fast:
        raise UserError(f"--model, --costs: {name} does not plan by costs; fast does")
    pipeline, replicas = sizes["stages"], sizes["data_parallel"]
    if question and is_fast and not model:
        options["costs"] = costs_for(
            replace(question, stages=pipeline, data_parallel=replicas, jobs=jobs.jobs, file=costs)
        )
    elif model or costs:
        options["costs"] = chosen_costs(pipeline, model, costs, replicas, jobs.jobs)
    plan = (plan_workload if strategy else plan_system)(jobs, name, **options | sizes)
    write(out, plan.to_json())
    s = plan.statistics
    print(f"{out}: {s.microbatches} microbatches ({s.noops} no-ops, at least {s.lower_bound}), fill {s.fill:.3f}")


def _jobs_of(path: Path) -> tuple[Workload, dict[str, int], Question | None, bool]:
    """A workload with the sizes that it is planned for by default; of a jobs file those it states, what its costs
    depend on, and whether its stages replay graphs."""
    from lorafusion.core.workload import Workload
    from lorafusion.planning.simulator import Question

    sizes = {"stages": 1, "capacity": CAPACITY, "data_parallel": 1}
    if path.suffix not in (".yaml", ".yml"):
        return Workload.read(path), sizes, None, False
    from lorafusion.train.config import read_train_config

    config = read_train_config(path)  # before torch is imported, which takes seconds
    from lorafusion.train.prepare import base_model, prepare

    sizes |= {"stages": config.stages, "data_parallel": config.data_parallel}
    if config.capacity:
        sizes["capacity"] = config.capacity
    with tempfile.TemporaryDirectory(prefix="lorafusion-") as scratch:
        model = base_model(config)
        share = config.recomputed_share or 0.0
        question = Question(config.stages, model, device=config.device, checkpointing=share > 0)
        return prepare(config, model, Path(scratch)), sizes, question, config.plans_graphs(model)


def _planner(system: str | None, strategy: str | None, graphs: bool | None) -> tuple[str, bool]:
    """The name of the system or strategy to plan by, and whether it is planned by `fast`. graphs: asked for."""
    from lorafusion.core.config import read_systems
    from lorafusion.planning import STRATEGIES

    if strategy is not None:
        if system is not None:
            raise UserError(f"either --system or --strategy, found {system} and {strategy}")
        if graphs:
            raise UserError(f"--graphs: expected a system, found the strategy {strategy}")
        one_of("strategy", strategy, set(STRATEGIES), "plan")
        return strategy, strategy == "fast"
    systems, name = read_systems(), system or SYSTEM
    one_of("system", name, set(systems), "--system")
    return name, systems[name].planner == STRATEGIES["fast"]


@plan_app.command("show", example="lorafusion plan show plan.json --workload workload.json --out plan.html")
def show(
    path: Annotated[Path, typer.Argument(metavar="PLAN", help="a plan file")],
    workload: Annotated[Path | None, typer.Option(help="its workload, for sample lengths and names")] = None,
    model: Annotated[str | None, typer.Option(help="a name of configs/models, whose costs are simulated")] = None,
    costs: Annotated[Path | None, typer.Option(help="a cost model instead, or a profile of the model (YAML)")] = None,
    schedule: Annotated[str | None, typer.Option(help="stream, flush, gpipe, greedy, sharded")] = None,
    first: Annotated[int, typer.Option(min=0, max=MOST_STEPS, help="first microbatch of the chart")] = 0,
    count: Annotated[int, typer.Option(min=1, max=MOST_STEPS, help="microbatches of the chart")] = 24,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="write the chart: .png, .svg, .pdf or .html"), Written()
    ] = None,
    trace: Annotated[Path | None, typer.Option(help="write a Chrome trace for ui.perfetto.dev"), Written()] = None,
) -> None:
    """Statistics, the ends of jobs and a Gantt chart of a plan, simulated."""
    from lorafusion.core.plan import Plan, check
    from lorafusion.core.workload import Workload
    from lorafusion.planning.simulator import gantt, simulate_plan
    from lorafusion.planning.simulator.trace import write_trace

    plan = Plan.read(path)
    jobs = Workload.read(workload) if workload else None
    if jobs is not None:
        check(plan, jobs, path)
    if first and first >= len(plan.microbatches):
        raise UserError(
            f"--first: expected one of {path}'s {len(plan.microbatches)} microbatches, from 0; found {first}"
        )
    timeline, unit = simulate_plan(plan, jobs, model, costs, schedule)
    window = gantt.window_of(timeline, first, count)
    gantt.print_plan(plan, timeline, unit, window, jobs)
    if trace:
        write_trace(timeline, plan, trace)
        print(f"{trace}: open it in https://ui.perfetto.dev")
    if out:
        gantt.save(plan, timeline, unit, window, out, jobs)
        print(out)


@plan_app.command("propose", example="lorafusion plan propose workload.json --model llama-3.1-8b --gpus 4")
def propose(
    workload: Annotated[Path, typer.Argument(help="a workload file (JSON), or a jobs file (YAML)")],
    gpus: Annotated[int, typer.Option(min=1, max=MOST_PROCESSES, help="GPUs to use")],
    model: Annotated[str | None, typer.Option(help="a name of configs/models; by default the jobs file's")] = None,
    memory: Annotated[float, typer.Option(min=1, max=MOST_GIBIBYTES, help="GiB of a GPU")] = 80.0,
    checkpointing: Annotated[bool, typer.Option(help="recompute activations in the backward pass")] = False,
    gpus_per_node: Annotated[int, typer.Option(min=1, max=MOST_PROCESSES, help="GPUs of a node")] = 8,
    network: Annotated[
        float, typer.Option(min=LEAST_GIGABYTES, max=MOST_GIGABYTES, help="GB/s of a GPU to other nodes")
    ] = 40.0,
    costs: Annotated[
        Path | None, typer.Option(help="a cost model or a profile (YAML) instead of the model's FLOP")
    ] = None,
    prefer: Annotated[str, typer.Option(help="throughput, or gpu-hours: the cheapest, on fewer GPUs")] = "throughput",
    out: Annotated[Path | None, typer.Option("--out", "-o", help="write all choices (JSON)"), Written()] = None,
    trace: Annotated[
        Path | None, typer.Option(help="write the best one's timeline, for ui.perfetto.dev"), Written()
    ] = None,
    groups: Annotated[
        Path | None, typer.Option("--write", help="a new folder for a file of each of the best one's groups")
    ] = None,
) -> None:
    """Propose groups, stages, replicas and capacity, with the throughput that the simulator predicts."""
    from lorafusion.cli import proposal
    from lorafusion.planning.propose import Cluster, Search

    if groups is not None:
        proposal.require_new(groups)
    source = proposal.read_source(workload, model)
    checkpointing = checkpointing or source.recomputes
    cluster = Cluster(gpus, int(memory * 2**30), gpus_per_node, network=network * 1e9)
    by_stages = proposal.costs_by_stages(source, costs, checkpointing)
    search = Search(source.workload, source.model, cluster, by_stages, checkpointing, source.capacity, prefer)
    choices = search.choices()
    proposal.print_choices(choices)
    if out:
        write(out, proposal.to_json(source, cluster, choices))
    if trace:
        proposal.write_timeline(search, choices, trace)
    if groups:
        proposal.write_groups(source, choices, checkpointing, groups)
    proposal.print_next(source, cluster, choices, checkpointing, groups)
