"""The commands of `lorafusion figure` and `lorafusion page`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lorafusion.cli.common import ChecksFolder, CommandLine, Out, Stem
from lorafusion.core.files import write

figure_app = CommandLine(help="Draw a figure from the measurement table.")
page_app = CommandLine(help="Make a page of the report.")


def _model_figure(module: str, name: str, function: str, text: str) -> None:
    """Add a command that draws a figure of one model, by a function of a module of `lorafusion.lab.report`."""

    @figure_app.command(name, help=text)
    def _draw(
        table: Annotated[Path, typer.Argument(help="the measurement table")],
        model: Annotated[str, typer.Option(help="a model of the table")],
        out: Stem,
        checks: ChecksFolder = None,
    ) -> None:
        from lorafusion.lab.checks.records import checked_table
        from lorafusion.lab.checks.verdicts import OF_RUNS

        _drawn(module, function, out, checked_table(table, checks, OF_RUNS), model)


def _suite_figure(module: str, name: str, text: str) -> None:
    """Add a command that draws a figure of a module of `lorafusion.lab.report`."""

    @figure_app.command(name, help=text)
    def _draw(table: Annotated[Path, typer.Argument(help="the measurement table")], out: Stem) -> None:
        from lorafusion.lab.table.table import read

        _drawn(module, name, out, read(table))


def _kernel_figure(name: str, text: str) -> None:
    """Add a command that draws a figure of kernels, which `check kernels` has proved right."""

    @figure_app.command(name, help=text)
    def _draw(
        table: Annotated[Path, typer.Argument(help="the measurement table")], out: Stem, checks: ChecksFolder = None
    ) -> None:
        from lorafusion.lab.checks.records import checked_table
        from lorafusion.lab.checks.verdicts import OF_KERNELS

        _drawn("kernel_figures", name, out, checked_table(table, checks, OF_KERNELS))


def _drawn(module: str, function: str, out: Path, *data: object) -> None:
    from importlib import import_module

    getattr(import_module(f"lorafusion.lab.report.{module}"), function)(*data, out)
    print(f"{out}.png, .pdf, .csv")


_model_figure(
    "figures", "end_to_end", "end_to_end", "Throughput of the systems on one model, by workload and number of GPUs."
)
_model_figure(
    "contributions_figure",
    "contributions",
    "contributions_figure",
    "The speedup over the best baseline, and what schedule, packing and kernels add to it.",
)
_kernel_figure("kernel_speed", "Time of LoRA linears over the frozen one's, by tokens.")
_kernel_figure("layer_speed", "Time and memory of decoder layers, by model and tokens.")
_kernel_figure("dram_traffic", "GiB that LoRA linears move, beside the published values.")
_kernel_figure("roofline", "LoRA linears under the measured ceilings of the GPU.")
_suite_figure("scheduler_figures", "scheduler_bubble", "Simulated bubble of every strategy, by workload and batch.")
_suite_figure("scheduler_figures", "scheduler_fill", "Microbatches of every strategy over their lower bound.")
_suite_figure("scheduler_figures", "scheduler_time", "Time that a plan takes, by its samples.")


@figure_app.command("lossless")
def figure_lossless(
    curves: Annotated[Path, typer.Argument(help="the losses that `lorafusion check lossless --curves` wrote")],
    out: Stem,
) -> None:
    """Losses of adapters trained together, alone and with plain PEFT."""
    _drawn("lossless_figure", "lossless", out, curves)


@figure_app.command("system_profile")
def figure_system_profile(
    profiles: Annotated[list[Path], typer.Argument(help="CSVs that `lorafusion profile` wrote")], out: Stem
) -> None:
    """What a GPU does with each system: milliseconds for 1000 tokens by class of kernel."""
    _drawn("system_profile", "system_profile", out, profiles)


@figure_app.command("tunings")
def figure_tunings(
    tuned: Annotated[list[Path], typer.Argument(help="files that `lorafusion tune` wrote")],
    model: Annotated[str, typer.Option(help="a model of theirs")],
    out: Stem,
) -> None:
    """The capacities that were tried for each system, how fast they were, and which was taken."""
    _drawn("tunings_figure", "tunings", out, tuned, model)


@page_app.command("checks")
def page_checks(
    verdicts: Annotated[list[Path], typer.Argument(help="files that `lorafusion check` wrote")], out: Out
) -> None:
    """The checks with their figures."""
    from lorafusion.lab.report.pages import checks_page

    write(out, checks_page(verdicts))
