"""`lorafusion lab`: each command makes, or looks at, some of the steps of a suite (`lorafusion lab list`)."""

import math
import sys
from pathlib import Path
from typing import Annotated

import typer

from lorafusion.cli.common import ChecksFolder, CommandLine, Written, figure_files
from lorafusion.core.plugins import import_extra
from lorafusion.core.schema import MOST_MINUTES, UserError, one_of

lab_app = CommandLine(help="The laboratory: measure a suite of configs/suites, check it, draw its figures.")

reproduce_app = CommandLine()


@lab_app.callback()
def require_extra() -> None:
    """All commands below need it."""
    import_extra("pandas", "lab", "lorafusion lab")


Suite = Annotated[
    str, typer.Argument(metavar="SUITE", help="a name, as smoke, or the path of a file of configs/suites")
]
Again = Annotated[bool, typer.Option("--again", help="make the runs anew that crashed or ran out of time")]
Folder = Annotated[Path | None, typer.Option(help="of the suite's results; by default results/NAME", file_okay=False)]
Files = Annotated[list[Path] | None, typer.Argument(help="files elsewhere, in place of the suite's own")]


@lab_app.command("list", example="lorafusion lab list smoke run")
def list_steps(
    suite: Suite,
    pattern: Annotated[str, typer.Argument(help="a kind of steps, or a part of their paths, with * and ?")] = "*",
    folder: Folder = None,
) -> None:
    """List a suite's steps with their states: up to date, missing, or why they are out of date."""
    from lorafusion.lab.commands import step_states

    print(*step_states(suite, pattern, folder), sep="\n")


@lab_app.command(example="lorafusion lab run h200 --here --share 0/4 --seconds 3000")
def run(
    suite: Suite,
    step: Annotated[Path | None, typer.Option(help="make this file anew and nothing else"), Written()] = None,
    here: Annotated[bool, typer.Option("--here", help="in this process and its forks, without Snakemake")] = False,
    share: Annotated[
        str, typer.Option(help="I/N: part I, from 0, of N that share the work, each with its GPU")
    ] = "0/1",
    seconds: Annotated[
        float | None, typer.Option(min=0.0, max=60 * MOST_MINUTES, help="begin nothing after so long")
    ] = None,
    only: Annotated[list[str] | None, typer.Option(help="a kind of steps, or a part of their paths")] = None,
    folder: Folder = None,
    again: Again = False,
) -> None:
    """Run a suite: all of it under Snakemake, its measurements in this process (--here), or one step (--step).

    Ends with status 1 where runs failed.
    """
    if not here and (share != "0/1" or seconds is not None or only):
        raise UserError("--share, --seconds, --only: expected --here with them")
    if step is not None and (here or again or folder):
        raise UserError("--here, --again, --folder: expected no --step, which makes a file anew where it says")
    if step is not None:
        _run_step(suite, step)
        return
    if not here:
        from lorafusion.lab.reproduce import reproduce

        raise typer.Exit(reproduce(suite, folder, again))
    from lorafusion.lab.commands import run_here

    _finish(*run_here(suite, share, math.inf if seconds is None else seconds, only or [], folder, again))


def _run_step(suite: str, step: Path) -> None:
    from lorafusion.lab.checks.verdicts import CheckError
    from lorafusion.lab.commands import run_step

    try:
        done, failed = run_step(suite, step)
    except CheckError as error:
        print(error)
        raise typer.Exit(1) from None
    print(done)
    _fail(failed)


def _finish(folder: Path, left: int, failed: str = "") -> None:
    print(f"{folder}: {left} left" if left else f"{folder}: all done")
    _fail(failed)
    if left:
        raise typer.Exit(1)


def _fail(reason: str) -> None:
    if reason:
        print(f"error: {UserError(reason)}", file=sys.stderr)
        raise typer.Exit(1)


def _table_files(folder: Path) -> list[Path]:
    from lorafusion.lab.gather import TABLE_SUFFIXES

    return [folder / f"measurements{suffix}" for suffix in TABLE_SUFFIXES]


@lab_app.command(example="lorafusion lab measure smoke end_to_end")
def measure(
    suite: Suite,
    table: Annotated[
        str | None, typer.Argument(help="one table: end_to_end, kernels, grid, steps, planner or costs")
    ] = None,
    files: Files = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="the folder for the table of FILES"), Written(_table_files)
    ] = None,
    incomplete: Annotated[bool, typer.Option("--incomplete", help="also where runs are missing")] = False,
    any_suite: Annotated[bool, typer.Option("--any-suite", help="FILES may be of other cells and settings")] = False,
    folder: Folder = None,
) -> None:
    """Gather a suite's results in measurement tables, validated and sealed.

    With FILES: of result files, or stores of them (.results.jsonl.gz), from anywhere.
    """
    from lorafusion.lab.commands import gather_files, gather_incomplete, make_steps
    from lorafusion.lab.experiments import EXPERIMENTS

    if table:
        one_of("table", table, set(EXPERIMENTS), "lab measure")
    if files or out:
        if not (files and out):
            raise UserError("lab measure: FILES and --out: expected both or neither")
        print(gather_files(suite if table == "end_to_end" and not any_suite else "", files, out, incomplete))
        return
    if incomplete:
        gather_incomplete(suite, folder, table or "")
        return
    names = {f"{EXPERIMENTS[name].folder}_measurements".lstrip("_") for name in ([table] if table else EXPERIMENTS)}
    _finish(*make_steps(suite, folder, lambda step: step.kind.name in names, table or ""))


@lab_app.command(example="lorafusion lab figure smoke end_to_end --model tiny")
def figure(
    suite: Suite,
    name: Annotated[str | None, typer.Argument(help="one figure, as end_to_end")] = None,
    files: Files = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="a path without suffix, to draw that of FILES; .png, .pdf and .csv follow"),
        Written(figure_files),
    ] = None,
    model: Annotated[str | None, typer.Option(help="only of this model")] = None,
    checks: ChecksFolder = None,
    folder: Folder = None,
) -> None:
    """Draw a suite's figures.

    With FILES: from another measurement table, or from the curves, profiles or tunings that the figure is made from.
    Of a table of several suites the rows of SUITE are drawn.
    """
    from lorafusion.lab.commands import make_steps
    from lorafusion.lab.report.registry import FIGURES, draw

    if name:
        one_of("figure", name, set(FIGURES), "lab figure")
    if files or out:
        if not (name and files and out):
            raise UserError("lab figure: FILES and --out: expected both or neither")
        draw(name, files, out, model, checks, suite)
        print(f"{out}.png, .pdf, .csv")
        return
    if checks:
        raise UserError("lab figure: --checks: expected FILES and --out with it")
    names = {name} if name else set(FIGURES)
    _finish(*make_steps(suite, folder, lambda step: step.kind.name in names and model in (None, step.name), name or ""))


@lab_app.command("profile-costs", example="lorafusion lab profile-costs h200 --seconds 540")
def profile_costs(
    suite: Suite,
    files: Files = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="the profile of FILES (YAML)"), Written()] = None,
    seconds: Annotated[
        float | None, typer.Option(min=0.0, max=60 * MOST_MINUTES, help="begin nothing after so long")
    ] = None,
    folder: Folder = None,
    again: Again = False,
) -> None:
    """Measure what microbatches cost on this machine, as far as it is not done yet, and fit a profile to plan by.

    With FILES: fit measurement tables, of stages and of links, from anywhere.
    """
    if files or out:
        if not (files and out):
            raise UserError("lab profile-costs: FILES and --out: expected both or neither")
        from lorafusion.lab.cost_profile import fit_tables

        print(fit_tables(files, out))
        return
    from lorafusion.lab.commands import run_here

    limit = math.inf if seconds is None else seconds
    _finish(*run_here(suite, "0/1", limit, ["costs_measurements", "cost_profile", "cost_fit"], folder, again))


@lab_app.command(example="lorafusion lab validate h200 TABLE.parquet PLANS.plans.jsonl.gz --out validation")
def validate(
    suite: Suite,
    table: Annotated[Path, typer.Argument(help="a measurement table of the suite's runs")],
    plans: Annotated[Path, typer.Argument(help="the plans that were run: a file or a folder")],
    out: Annotated[
        Path,
        typer.Option("--out", "-o", help="a path without suffix; .png, .pdf and .csv follow"),
        Written(figure_files),
    ],
    costs: Annotated[Path | None, typer.Option(help="a profile to predict by, of this machine")] = None,
) -> None:
    """Predict the runs of a table and draw how good that is.

    Without --costs each run is predicted by the costs that fit those of other workloads.
    """
    from lorafusion.lab.commands import validate as validate_table

    print(validate_table(suite, table, plans, out, costs))


@lab_app.command(example="lorafusion lab check smoke systems --system peft --system lorafusion --out systems.json")
def check(
    suite: Suite,
    name: Annotated[
        str | None, typer.Argument(help="one check: lossless, systems, gradients, learning, kernels, plans")
    ] = None,
    system: Annotated[list[str] | None, typer.Option(help="check these systems, in place of the suite's")] = None,
    arrangement: Annotated[list[str] | None, typer.Option(help="stages x replicas, as 2x1 or 2x1+recompute")] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="write one check's verdict there"), Written()] = None,
    curves: Annotated[Path | None, typer.Option(help="all losses of `lossless`, as CSV"), Written()] = None,
    folder: Folder = None,
) -> None:
    """Check that a suite's results are right; exit 1 where one check does not hold.

    With --out: one check, of the suite or, with --system or --arrangement, of a choice of one's own on this CPU.
    """
    from lorafusion.lab.checks.catalog import CHECKS
    from lorafusion.lab.commands import chosen_check, make_steps

    if name:
        one_of("check", name, {*CHECKS, "plans"}, "lab check")
    if out:
        if name not in CHECKS:
            raise UserError(f"lab check --out: expected one check of {', '.join(CHECKS)}; found {name or 'none'}")
        _write_outcome(chosen_check(suite, name, system or [], arrangement or []), out, curves)
        return
    if system or arrangement or curves:
        raise UserError("--system, --arrangement, --curves: expected NAME and --out with them")
    names = {f"check_{name}"} if name else {f"check_{name}" for name in (*CHECKS, "plans")}
    _finish(*make_steps(suite, folder, lambda step: step.kind.name in names, name or ""))


def _write_outcome(outcome, out: Path, curves: Path | None) -> None:
    from lorafusion.lab.checks.verdicts import CheckError

    print(*outcome.lines(), sep="\n")
    try:
        outcome.write(out, curves)
    except CheckError as error:
        print(error)
        raise typer.Exit(1) from None


@lab_app.command(example="lorafusion lab contract tests/contracts/cpu.json")
def contract(
    record: Annotated[Path, typer.Argument(help="file of what each system costs")],
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    write: Annotated[bool, typer.Option("--write", help="write what is found to the file")] = False,
) -> None:
    """Check that each system costs what is recorded: operators or kernels, bytes, dtypes, plans."""
    one_of("device", device, {"cpu", "cuda"}, "lab contract")
    from lorafusion.lab.commands import changed_contracts

    changed = changed_contracts(record, device, write)
    if changed:
        print(changed)
    if changed and not write:
        print(f"FAILED: what systems cost has changed; if it is meant to: lorafusion lab contract {record} --write")
        raise typer.Exit(1)


@lab_app.command(example="lorafusion lab preflight paper-grid")
def preflight(suite: Suite, folder: Folder = None) -> None:
    """Find out with a small Slurm job whether the nodes can run a suite: Python, GPUs, shared folder, network, clock.

    Call it on the login node. The workflow does so itself before it submits the jobs of a suite for GPUs or for several
    nodes. docs/guide/slurm.md says what to do where something does not hold.
    """
    from lorafusion.lab import commands

    print(commands.preflight(suite, folder))


@lab_app.command(example="lorafusion lab report smoke")
def report(suite: Suite, folder: Folder = None) -> None:
    """Write report.html from a finished workflow, and print the results as a short table."""
    from lorafusion.lab.reproduce import make_report

    make_report(suite, folder)


@lab_app.command(example="lorafusion lab publish smoke --mode online --project lorafusion")
def publish(
    suite: Suite,
    files: Annotated[list[Path] | None, typer.Argument(help="another table and its result files")] = None,
    figure: Annotated[list[Path] | None, typer.Option(help="a figure to show beside the table of FILES")] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="the folder for what wandb writes of FILES: new, or of wandb"),
        Written(lambda folder: []),  # the publisher looks at it
    ] = None,
    mode: Annotated[str, typer.Option(help="offline, or online to send it to your wandb server")] = "offline",
    project: Annotated[str, typer.Option(help="of wandb")] = "lorafusion",
    entity: Annotated[str | None, typer.Option(help="of wandb")] = None,
    folder: Folder = None,
) -> None:
    """Hand a suite's measurements to wandb: a run for each cell and one with the tables."""
    from lorafusion.lab.steps import SuiteSteps, publish_files, published_files

    options = {"mode": mode, "project": project, "entity": entity}
    if files or figure or out:
        if not (files and out):
            raise UserError("lab publish: FILES and --out: expected both or neither")
        print(publish_files(files[0], files[1:], figure or [], out, **options))
        return
    for step in SuiteSteps(suite, folder).published:
        for source in step.inputs:
            source.require_current()
        print(publish_files(*published_files(step), step.path, **options))


@lab_app.command("tree-hash", example="lorafusion lab tree-hash HEAD")
def show_tree_hash(
    commit: Annotated[str | None, typer.Argument(help="a commit of this repository; else this tree")] = None,
) -> None:
    """Print the hash of the project's source files, as it stands in the table's column `tree_hash`."""
    from lorafusion.core.source_tree import commit_tree_hash, tree_hash

    print(commit_tree_hash(commit) if commit else tree_hash())


@reproduce_app.command(example="lorafusion reproduce smoke")
def reproduce(
    suite: Annotated[str | None, typer.Argument(metavar="SUITE", help="by default the one for this machine")] = None,
    folder: Folder = None,
    again: Again = False,
) -> None:
    """Run the whole workflow of a suite on this machine, make its report, and show the results.

    Ends with status 1 where runs failed.
    """
    from lorafusion.lab.reproduce import reproduce

    raise typer.Exit(reproduce(suite, folder, again))
