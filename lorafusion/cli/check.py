"""The commands of `lorafusion check`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lorafusion.cli.common import CommandLine, Out, Written
from lorafusion.core.schema import UserError
from lorafusion.lab.checks.catalog import needed_by
from lorafusion.lab.checks.verdicts import CheckError

check_app = CommandLine(help="Prove that results are right; exit 1 where they are not.")

NO_SUITE = (None, "cpu", "float64")
Suite = Annotated[Path | None, typer.Option(help="a file of configs/suites: checked on its device, too, and for it")]
Arrangements = Annotated[list[str] | None, typer.Option(help="stages x replicas, as 2x1 or 2x1+recompute")]
Systems = Annotated[list[str] | None, typer.Option(help="a name of configs/systems.yaml; by default the suite's")]


@check_app.command("all")
def check_all(
    folder: Annotated[
        Path,
        typer.Argument(help="folder to write the verdicts to: `checks` beside the table, for figures to find them"),
        Written(lambda folder: [folder / f"{name}.json" for name in needed_by("runs")]),
    ],
    suite: Annotated[Path, typer.Option(help="a file of configs/suites")],
) -> None:
    """All that the figures of a suite's runs need; ends at the first that does not hold."""
    from lorafusion.lab.checks.catalog import run_check

    for name in needed_by("runs"):
        outcome = run_check(name, suite)
        outcome.write_to(folder)
        print(f"passed: {name}: {outcome.verdict.statement}", flush=True)


@check_app.command("plans")
def check_plans(
    plans: Annotated[list[Path], typer.Argument(help="plan files")],
    workloads: Annotated[list[Path], typer.Option("--workload", help="the workload files they were made for")],
    out: Out,
    suite: Suite = None,
) -> None:
    """Every plan against its workload."""
    from lorafusion.lab.checks.plans import check_plans as check
    from lorafusion.lab.suite import read_suite

    config = read_suite(suite) if suite else None
    _report(check(plans, workloads), out, (config.name, config.device, config.dtype) if config else NO_SUITE)


@check_app.command("lossless")
def check_lossless(
    out: Out,
    arrangement: Arrangements = None,
    curves: Annotated[Path | None, typer.Option(help="write all losses there, as CSV"), Written()] = None,
    suite: Suite = None,
) -> None:
    """Adapters trained together equal each alone, and that plain PEFT."""
    from lorafusion.lab.checks.lossless import lossless

    _either("--arrangement", arrangement, suite)
    _run("lossless", suite, out, lambda: lossless(_arrangements(arrangement)), curves)


@check_app.command("systems")
def check_systems(
    out: Out,
    system: Systems = None,
    arrangement: Annotated[str, typer.Option(help="stages x replicas, or as many processes as a system can")] = "2x1",
    suite: Suite = None,
) -> None:
    """Each system trains what plain PEFT trains."""
    from lorafusion.lab.checks.systems import systems

    _either("--system", system, suite, needed=True)
    _run("systems", suite, out, lambda: (systems(system, *_arrangements([arrangement])), []))


@check_app.command("gradients")
def check_gradients(
    out: Out,
    system: Systems = None,
    arrangement: Arrangements = None,
    suite: Suite = None,
) -> None:
    """One step's gradients of each system against float64."""
    from lorafusion.lab.checks.gradients import gradient_setups_of, gradients

    _either("--system", system, suite, needed=True)
    setups = gradient_setups_of(None)
    _run("gradients", suite, out, lambda: (gradients(system, _arrangements(arrangement), setups), []))


@check_app.command("kernels")
def check_kernels(out: Out, suite: Annotated[str, typer.Option(help="an entry of configs/kernels.yaml")]) -> None:
    """LoRA linears against float64."""
    from lorafusion.lab.checks.kernels import verify
    from lorafusion.lab.experiments import EXPERIMENTS

    entry = EXPERIMENTS["kernels"].entry_of(suite)
    _report(verify(entry, suite), out, (suite, entry.device, entry.dtype))


@check_app.command("learning")
def check_learning(out: Out, suite: Suite = None) -> None:
    """Weights change and the loss falls."""
    from lorafusion.lab.checks.learning import learning

    _run("learning", suite, out, lambda: (learning(), []))


@check_app.command("contract")
def check_contract(
    record: Annotated[Path, typer.Argument(help="file of what each system costs")],
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    write: Annotated[bool, typer.Option("--write", help="write what is found to the file")] = False,
) -> None:
    """Each system costs what is recorded: operators or kernels, bytes, dtypes, plans."""
    from lorafusion.core.schema import one_of
    from lorafusion.lab.checks.contract import SETTINGS, check_contracts

    one_of("device", device, set(SETTINGS), "check contract")
    changed = check_contracts(record, device, write)
    if changed:
        print(changed)
    if changed and not write:
        print(f"FAILED: what systems cost has changed; if it is meant to: lorafusion check contract {record} --write")
        raise typer.Exit(1)


def _either(option: str, given: list[str] | None, suite: Path | None, needed: bool = False) -> None:
    """A suite says itself what is checked."""
    if given and suite:
        raise UserError(f"{option}: either it or --suite, which says what is checked; found {', '.join(given)}")
    if needed and not given and suite is None:
        raise UserError(f"{option} or --suite: expected one of them, found neither")


def _arrangements(given: list[str] | None) -> list:
    from lorafusion.lab.suite import Arrangement

    return [Arrangement.read(text) for text in given or ["1x1"]]


def _run(name: str, suite: Path | None, out: Path, check, curves: Path | None = None) -> None:
    """The check of a suite, or where there is none what `check` makes."""
    from lorafusion.lab.checks.catalog import run_check

    if suite:
        _write(run_check(name, suite), out, curves)
    else:
        verdict, losses = check()
        _report(verdict, out, NO_SUITE, losses, curves)


def _report(verdict, out: Path, origin: tuple, losses=(), curves: Path | None = None) -> None:
    from lorafusion.lab.checks.verdicts import Outcome, origin_of

    _write(Outcome(verdict, origin_of(*origin), losses), out, curves)


def _write(outcome, out: Path, curves: Path | None = None) -> None:
    print(*outcome.lines(), sep="\n")
    try:
        outcome.write(out, curves)
    except CheckError as error:
        print(error)
        raise typer.Exit(1) from None
