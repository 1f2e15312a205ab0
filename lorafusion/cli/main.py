"""Train many LoRA adapters of one frozen base model together, plan such trainings, and measure them."""

from __future__ import annotations

import logging
import sys
from importlib.metadata import version as version_of
from pathlib import Path
from typing import Annotated

import typer

from lorafusion.cli.check import check_app
from lorafusion.cli.common import CommandLine, Log, Out, Written
from lorafusion.cli.figure import figure, page_app
from lorafusion.cli.patch import patch_app
from lorafusion.cli.plan import plan_app
from lorafusion.cli.steps import training_app
from lorafusion.cli.train import train_app
from lorafusion.cli.workload import workload_app
from lorafusion.core.files import write
from lorafusion.core.log import start_logging
from lorafusion.core.schema import (
    MOST_PROCESSES,
    MOST_REPEATS,
    UserError,
)
from lorafusion.core.seals import seal_path

app = CommandLine(help=__doc__, add_completion=True)
for group in (train_app, patch_app, workload_app):
    app.add_typer(group)
app.add_typer(plan_app, name="plan")
app.add_typer(training_app, name="training")
app.add_typer(check_app, name="check")
app.command("figure")(figure)
app.add_typer(page_app, name="page")
kernels_app = CommandLine(help="Measure LoRA linears and decoder layers; suites: configs/kernels.yaml.")
app.add_typer(kernels_app, name="kernels")
scheduler_app = CommandLine(help="Judge the scheduler's strategies; suites: configs/planner.yaml.")
app.add_typer(scheduler_app, name="scheduler")

SuiteFile = Annotated[Path, typer.Option("--suite", help="a file of configs/suites")]
Tuning = Annotated[Path | None, typer.Option(help="the file of `lorafusion tune`, for a cell that is tuned")]


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"lorafusion {version_of('lorafusion')}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="print the version")
    ] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="say more of what is done")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="say only what is wrong")] = False,
) -> None:
    """Train many LoRA adapters of one frozen base model together, plan such trainings, and measure them."""
    if verbose and quiet:
        raise UserError("--verbose, --quiet: expected one of them at most, found both")
    start_logging(logging.DEBUG if verbose else logging.WARNING if quiet else None)


def main() -> None:
    """Entry point: a user's mistake is one line and status 2."""
    try:
        sys.exit(app(prog_name="lorafusion", standalone_mode=False))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
    except typer.TyperException as error:  # of a command that is called wrongly
        print(_usage_error(error), file=sys.stderr)
    sys.exit(2)


def _usage_error(error: typer.TyperException) -> str:
    """One line; or the help, where a group was called without a command."""
    message, context = error.format_message(), getattr(error, "ctx", None)
    if message.startswith("Usage: "):
        return message
    more = f" (see {context.command_path} --help)" if context else ""
    return f"error: {UserError(message.rstrip('.') + more)}"


@app.command()
def run(
    suite: SuiteFile,
    cell: Annotated[str, typer.Option(help="the cell's name, as in the table's column `cell`")],
    workload: Annotated[Path, typer.Option(help="the cell's workload file")],
    out: Out,
    plan: Annotated[Path | None, typer.Option(help="the cell's plan file")] = None,
    tuned: Tuning = None,
    repeat: Annotated[int, typer.Option(min=1, max=MOST_REPEATS, help="which fresh process this is")] = 1,
    nodes: Annotated[int, typer.Option(min=1, max=MOST_PROCESSES, help="machines the processes are spread over")] = 1,
    log: Log = None,
) -> None:
    """Run one cell of a suite once and write its result file, also where it fails."""
    from lorafusion.lab.experiments.end_to_end import run_cell

    status = run_cell(suite, cell, workload, plan, out, repeat, nodes, log, tuned)
    print(f"{out}: {status}")


@app.command()
def tune(
    suite: SuiteFile,
    cell: Annotated[str, typer.Option(help="the cell's name, as in the table's column `cell`")],
    workload: Annotated[Path, typer.Option(help="the cell's workload file")],
    out: Out,
) -> None:
    """Find the capacity at which a cell is fastest, from the largest that fits in memory down."""
    from lorafusion.lab.tuning import tune_cell

    tuned = tune_cell(suite, cell, workload, out)
    print(*tuned.trials, sep="\n")
    print(f"{out}: capacity {tuned.capacity}")


@app.command()
def profile(
    suite: SuiteFile,
    cell: Annotated[str, typer.Option(help="the cell's name, as in the table's column `cell`")],
    workload: Annotated[Path, typer.Option(help="the cell's workload file")],
    plan: Annotated[Path, typer.Option(help="the cell's plan file")],
    out: Out,
    tuned: Tuning = None,
) -> None:
    """Say what a GPU does in the first global batches of a cell: milliseconds for 1000 tokens by class of kernel."""
    from lorafusion.lab.tuning import profile_cell

    print(profile_cell(suite, cell, workload, plan, out, tuned).to_string(index=False))


@app.command()
def sweep(
    suite: SuiteFile,
    folder: Annotated[Path, typer.Option(help="where the workflow would have the suite's results: results/NAME")],
    share: Annotated[
        str, typer.Option(help="I/N: part I of N that share the work, each with a GPU of its own")
    ] = "0/1",
    seconds: Annotated[float, typer.Option(help="begin nothing after so long")] = float("inf"),
) -> None:
    """Tune, plan and run a suite's cells without Snakemake, in forked processes; run again, it goes on."""
    from lorafusion.lab.forked import launch
    from lorafusion.lab.sweep import Share, sweep

    left = sweep(suite, folder, Share.read(share), launch, seconds)
    print(f"{folder}: {left} left" if left else f"{folder}: all done")
    raise typer.Exit(1 if left else 0)


@app.command("cells")
def list_cells(suite: SuiteFile) -> None:
    """List the cells of a suite, or say what is wrong with it."""
    from lorafusion.lab.suite import cells, read_suite

    for cell in cells(read_suite(suite), suite):
        print(cell.name)


def _benches(experiment: str, suite: str) -> list[str]:
    from lorafusion.lab.experiments import EXPERIMENTS

    EXPERIMENTS[experiment].entry_of(suite)
    return [point.name for point in EXPERIMENTS[experiment].points(suite)]


def _measure(experiment: str, suite: str, bench: str, repeat: int, out: Path, log: Path | None) -> None:
    from lorafusion.lab.experiments import EXPERIMENTS

    EXPERIMENTS[experiment].entry_of(suite)
    point = EXPERIMENTS[experiment].point(suite, bench)
    print(f"{out}: {EXPERIMENTS[experiment].run(point, repeat, out, log)}")


@kernels_app.command("benches")
def kernel_benches(
    suite: Annotated[str, typer.Option(help="an entry of configs/kernels.yaml")],
    missing: Annotated[
        Path | None, typer.Option(help="only those without an up-to-date BENCH/repeat~1.json in this folder")
    ] = None,
) -> None:
    """List the benches of a kernel suite: each is one process."""
    from lorafusion.lab.keys import is_current

    for name in _benches("kernels", suite):
        if missing is None or not is_current(missing / name / "repeat~1.json", ("suite", suite, name)):
            print(name)


@kernels_app.command("measure")
def kernels_measure(
    suite: Annotated[str, typer.Option(help="an entry of configs/kernels.yaml")],
    bench: Annotated[str, typer.Option(help="a bench of the suite")],
    out: Out,
    repeat: Annotated[int, typer.Option(min=1, max=MOST_REPEATS, help="which fresh process this is")] = 1,
    log: Log = None,
) -> None:
    """Measure one bench in all its implementations and write its result file."""
    _measure("kernels", suite, bench, repeat, out, log)


@kernels_app.command("traffic")
def kernels_traffic(
    suite: Annotated[str, typer.Option(help="an entry of configs/kernels.yaml")],
    out: Out,
    log: Log = None,
) -> None:
    """Read the GPU's memory counters with ncu and write one result file."""
    _measure("kernels", suite, "traffic", 1, out, log)


@scheduler_app.command("benches")
def scheduler_benches(suite: Annotated[str, typer.Option(help="an entry of configs/planner.yaml")]) -> None:
    """List the benches of a scheduler suite: each is one process."""
    print(*_benches("planner", suite), sep="\n")


@scheduler_app.command("measure")
def scheduler_measure(
    suite: Annotated[str, typer.Option(help="an entry of configs/planner.yaml")],
    bench: Annotated[str, typer.Option(help="a bench of the suite")],
    out: Out,
    repeat: Annotated[int, typer.Option(min=1, max=MOST_REPEATS, help="which fresh process this is")] = 1,
    log: Log = None,
) -> None:
    """Plan and simulate all points of a bench and write its result file."""
    _measure("planner", suite, bench, repeat, out, log)


def _measurement_files(folder: Path) -> list[Path]:
    """The table in its two forms, its schema and page, the seals of the two, and its store of results."""
    files = [folder / f"measurements.{suffix}" for suffix in ("csv", "parquet", "schema.json", "html")]
    return [*files, *map(seal_path, files[:2]), folder / "measurements.results.jsonl.gz"]


@app.command()
def measurements(
    folder: Annotated[
        Path,
        typer.Argument(help="folder to write measurements.{csv,parquet,schema.json,html} to"),
        Written(_measurement_files),
    ],
    results: Annotated[list[Path], typer.Argument(help="result files of runs, or a store of them (.results.jsonl.gz)")],
    suite: Annotated[
        Path | None, typer.Option(help="a file of configs/suites: refuse results of other cells or settings than its")
    ] = None,
    incomplete: Annotated[
        bool, typer.Option("--incomplete", help="also where runs are missing; the table's seal then says so")
    ] = False,
) -> None:
    """Gather result files in the measurement table, validate and seal it."""
    from lorafusion.lab.keys import require_results
    from lorafusion.lab.report.pages import measurements_page
    from lorafusion.lab.suite import runs_of
    from lorafusion.lab.table import table
    from lorafusion.lab.table.store import write_store

    contents = table.read_contents(results)
    require_results(contents, suite)
    frame = table.summarise(table.table_of(contents))
    table.validate(frame)
    expected = runs_of(suite) if suite else {}
    missing = table.gaps(frame, expected)
    if missing and not incomplete:
        raise UserError(f"{folder}: {missing}; give their result files too, or --incomplete")
    csv, parquet, schema, page, *_ = _measurement_files(folder)
    table.write(frame, csv, parquet, expected)
    write_store(csv, contents)
    table.write_json_schema(schema)
    write(page, measurements_page(frame))
    print(f"{csv}: {len(frame)} rows from {len(contents)} runs")


@app.command()
def publish(
    table: Annotated[Path, typer.Argument(help="the measurement table")],
    results: Annotated[list[Path], typer.Argument(help="result files of runs")],
    figure: Annotated[list[Path], typer.Option(help="a figure to show beside the tables")],
    directory: Annotated[
        Path, typer.Option(help="folder for all that wandb writes: new, empty, or of an earlier publication")
    ],
    mode: Annotated[str, typer.Option(help="offline, or online to send it to your wandb server")] = "offline",
    project: Annotated[str, typer.Option()] = "lorafusion",
    entity: Annotated[str | None, typer.Option()] = None,
) -> None:
    """Hand the measurements to wandb: a run for each cell and one with the tables. Offline unless told otherwise."""
    from lorafusion.lab.report.wandb_publisher import publish
    from lorafusion.lab.table.table import read, read_result

    contents = [read_result(path) for path in results]
    runs = publish(read(table), contents, figure, directory, mode=mode, project=project, entity=entity)
    print(f"{directory}: {len(runs)} runs, {mode}")


@app.command()
def summary(
    suite: Annotated[
        str | None, typer.Option(help="name of the suite; the one that fits this machine if absent")
    ] = None,
) -> None:
    """Print a suite's results as a short table."""
    from lorafusion.lab.reproduce import show_summary

    show_summary(suite)


@app.command()
def reproduce(
    suite: Annotated[
        str | None, typer.Option(help="name of the suite; the one that fits this machine if absent")
    ] = None,
) -> None:
    """Run the whole workflow of a suite on this machine, make its report, and show the results."""
    from lorafusion.lab.reproduce import reproduce

    raise typer.Exit(reproduce(suite))


@app.command("tree-hash")
def show_tree_hash(
    commit: Annotated[str | None, typer.Argument(help="a commit of this repository; else this tree")] = None,
) -> None:
    """Print the hash of the project's source files, as it stands in the table's column `tree_hash`."""
    from lorafusion.core.source_tree import commit_tree_hash, tree_hash

    print(commit_tree_hash(commit) if commit else tree_hash())


if __name__ == "__main__":
    main()
