"""The commands of `lorafusion check`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lorafusion.cli_common import CommandLine, Out, Written

check_app = CommandLine(help="Prove that results are right; exit 1 where they are not.")


@check_app.command("plans")
def check_plans(
    plans: Annotated[list[Path], typer.Argument(help="plan files")],
    workloads: Annotated[list[Path], typer.Option("--workload", help="the workload files they were made for")],
    out: Out,
) -> None:
    """Every plan against its workload."""
    from lorafusion.checks import plans as check

    _report(check(plans, workloads), out)


@check_app.command("lossless")
def check_lossless(
    out: Out,
    arrangement: Annotated[list[str], typer.Option(help="stages x replicas, as 2x1 or 2x1+recompute")] = ("1x1",),
    curves: Annotated[Path | None, typer.Option(help="write all losses there, as CSV"), Written()] = None,
) -> None:
    """Adapters trained together equal each alone, and that plain PEFT."""
    from lorafusion.checks import lossless, write_curves
    from lorafusion.config import Arrangement

    verdict, found = lossless([Arrangement.read(one) for one in arrangement])
    if curves:
        write_curves(found, curves)
    _report(verdict, out)


@check_app.command("systems")
def check_systems(
    out: Out,
    system: Annotated[list[str], typer.Option(help="a name of configs/systems.yaml")],
    arrangement: Annotated[str, typer.Option(help="stages x replicas, or as many processes as a system can")] = "2x1",
) -> None:
    """Each system trains what plain PEFT trains."""
    from lorafusion.checks import systems
    from lorafusion.config import Arrangement

    _report(systems(system, Arrangement.read(arrangement)), out)


@check_app.command("kernels")
def check_kernels(out: Out, suite: Annotated[str, typer.Option(help="an entry of configs/kernels.yaml")]) -> None:
    """LoRA linears against float64."""
    from lorafusion.benchmarks.suite import read_kernel_suite
    from lorafusion.benchmarks.verify import verify

    _report(verify(read_kernel_suite(suite), suite), out)


@check_app.command("learning")
def check_learning(out: Out) -> None:
    """Weights change and the loss falls."""
    from lorafusion.checks import learning

    _report(learning(), out)


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


def _report(verdict, out: Path) -> None:
    from lorafusion.checks import write_verdict

    print(f"{'passed' if verdict.passed else 'FAILED'}: {verdict.statement}")
    for name, value in verdict.figures.items():
        print(f"  {name}: {value:.3g}")
    if not verdict.passed:
        # Beside the file, which is there for what holds alone.
        write_verdict(verdict, out.with_name(f"{out.name}.failed"))
        raise typer.Exit(1)
    write_verdict(verdict, out)
