"""The commands of `lorafusion check`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lorafusion.cli_common import CommandLine, Out, Written

check_app = CommandLine(help="Prove that results are right; exit 1 where they are not.")

Suite = Annotated[Path | None, typer.Option(help="a file of configs/suites: checked on its device, too, and for it")]
Arrangements = Annotated[
    list[str] | None, typer.Option(help="stages x replicas, as 2x1 or 2x1+recompute; by default the suite's")
]


@check_app.command("plans")
def check_plans(
    plans: Annotated[list[Path], typer.Argument(help="plan files")],
    workloads: Annotated[list[Path], typer.Option("--workload", help="the workload files they were made for")],
    out: Out,
    suite: Suite = None,
) -> None:
    """Every plan against its workload."""
    from lorafusion.checks import plans as check

    _report(check(plans, workloads), out, suite)


@check_app.command("lossless")
def check_lossless(
    out: Out,
    arrangement: Arrangements = None,
    curves: Annotated[Path | None, typer.Option(help="write all losses there, as CSV"), Written()] = None,
    suite: Suite = None,
) -> None:
    """Adapters trained together equal each alone, and that plain PEFT."""
    from lorafusion.checks import grounds_of, lossless, write_curves

    verdict, found = lossless(_arrangements(arrangement, suite), grounds=grounds_of(_read(suite)))
    if curves:
        write_curves(found, curves)
    _report(verdict, out, suite)


@check_app.command("systems")
def check_systems(
    out: Out,
    system: Annotated[list[str], typer.Option(help="a name of configs/systems.yaml")],
    arrangement: Annotated[str, typer.Option(help="stages x replicas, or as many processes as a system can")] = "2x1",
    suite: Suite = None,
) -> None:
    """Each system trains what plain PEFT trains."""
    from lorafusion.checks import grounds_of, systems
    from lorafusion.config import Arrangement

    # On the large models it is the gradients that are compared.
    grounds = [one for one in grounds_of(_read(suite)) if not one.layers]
    _report(systems(system, Arrangement.read(arrangement), grounds), out, suite)


@check_app.command("gradients")
def check_gradients(
    out: Out,
    system: Annotated[list[str], typer.Option(help="a name of configs/systems.yaml")],
    merged: Annotated[list[str], typer.Option(help="a system that is checked with q, k and v merged, too")] = (),
    arrangement: Arrangements = None,
    suite: Suite = None,
) -> None:
    """One step's gradients of each system against float64."""
    from lorafusion.gradients import gradients, grounds_of

    read = _read(suite)
    _report(gradients(system, _arrangements(arrangement, suite), grounds_of(read), merged), out, suite)


@check_app.command("kernels")
def check_kernels(out: Out, suite: Annotated[str, typer.Option(help="an entry of configs/kernels.yaml")]) -> None:
    """LoRA linears against float64."""
    from lorafusion.benchmarks.suite import read_kernel_suite
    from lorafusion.benchmarks.verify import verify
    from lorafusion.verdicts import origin_of

    read = read_kernel_suite(suite)
    _write(verify(read, suite), out, origin_of(suite, read.device, read.dtype))


@check_app.command("learning")
def check_learning(out: Out, suite: Suite = None) -> None:
    """Weights change and the loss falls."""
    from lorafusion.checks import grounds_of, learning

    _report(learning(grounds=grounds_of(_read(suite))), out, suite)


@check_app.command("contract")
def check_contract(
    record: Annotated[Path, typer.Argument(help="file of what each system costs")],
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    write: Annotated[bool, typer.Option("--write", help="write what is found to the file")] = False,
) -> None:
    """Each system costs what is recorded: operators or kernels, bytes, dtypes, plans."""
    from lorafusion.contract import SETTINGS, check_contracts
    from lorafusion.errors import one_of

    one_of("device", device, set(SETTINGS), "check contract")
    changed = check_contracts(record, device, write)
    if changed:
        print(changed)
    if changed and not write:
        print(f"FAILED: what systems cost has changed; if it is meant to: lorafusion check contract {record} --write")
        raise typer.Exit(1)


def _read(suite: Path | None):
    """The suite, if this machine has what it runs on."""
    from lorafusion.cells import require_device
    from lorafusion.config import read_suite

    if suite is None:
        return None
    read = read_suite(suite)
    require_device(read, suite)
    return read


def _arrangements(given: list[str] | None, suite: Path | None) -> list:
    from lorafusion.config import Arrangement, read_suite

    default = read_suite(suite).checks.lossless if suite else ["1x1"]
    return [Arrangement.read(one) for one in given or default]


def _report(verdict, out: Path, suite: Path | None) -> None:
    from lorafusion.config import read_suite
    from lorafusion.verdicts import origin_of

    read = read_suite(suite) if suite else None
    _write(verdict, out, origin_of(read.name, read.device, read.dtype) if read else origin_of(None, "cpu", "float64"))


def _write(verdict, out: Path, origin) -> None:
    from lorafusion.verdicts import write_verdict

    print(f"{'passed' if verdict.passed else 'FAILED'}: {verdict.statement}")
    for name, value in verdict.figures.items():
        print(f"  {name}: {value:.3g}")
    if not verdict.passed:
        # Beside the file, which is there for what holds alone.
        write_verdict(verdict, origin, out.with_name(f"{out.name}.failed"))
        raise typer.Exit(1)
    write_verdict(verdict, origin, out)
