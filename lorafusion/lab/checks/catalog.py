"""The checks of a suite, in one table: what each is called, which figures need it, what it takes.

The command line, the workflow and the reports read it. It imports nothing heavy: a check's code is loaded when it runs.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from lorafusion.core.config import read_systems
from lorafusion.core.plugins import load
from lorafusion.core.schema import one_of
from lorafusion.lab.checks.verdicts import CheckOutcome, origin_of
from lorafusion.lab.suite import Arrangement, Suite, read_suite


def _processes(suite: Suite) -> int:
    arrangements = map(Arrangement.read, suite.checks.lossless)
    return max(arrangement.stages * arrangement.replicas for arrangement in arrangements)


def _arrangements(suite: Suite) -> list:
    return [suite.checks.model_dump(mode="json")]


def _arrangements_and_systems(suite: Suite) -> list:
    systems, names = read_systems(), sorted({system for grid in suite.cells for system in grid.systems})
    return _arrangements(suite) + [systems[name].model_dump(mode="json") for name in names]


def _kernel_settings(suite: Suite) -> list:
    return [_measured(suite, "kernels").model_dump(mode="json", include={"device", "dtype", "seed", "verify"})]


def _measured(suite: Suite, check: str):
    """What a check is about, with its device and dtype: the suite, or the entry of its name in configs/kernels.yaml."""
    from lorafusion.lab.experiments import EXPERIMENTS

    return EXPERIMENTS["kernels"].entry_of(suite.name) if check == "kernels" else suite


@dataclass(frozen=True)
class Check:
    """A check of a suite. Its code is the function `check_suite` of the module of its name, which returns a verdict and
    curves of losses.

    tables: the kinds of measurements whose figures need it. by_system: its figures name each system that was compared.
    curves: it has losses to draw. minutes: Slurm's limit; seven checks took two in all on an H200
    (results/reference/nvidia-h200/planted_errors.log). processes: the most that run at once. depends_on: the settings
    that its verdict depends on.
    """

    help: str
    tables: tuple[Literal["runs", "steps", "kernels"], ...]
    by_system: bool = False
    curves: bool = False
    minutes: int = 10
    processes: Callable[[Suite], int] = lambda suite: 1
    depends_on: Callable[[Suite], list] = lambda suite: []


CHECKS = {
    "lossless": Check(
        "Adapters trained together equal each alone, and that plain PEFT.",
        tables=("runs",),
        curves=True,
        processes=_processes,
        depends_on=_arrangements,
    ),
    "systems": Check(
        "Each system trains what plain PEFT trains.",
        tables=("runs",),
        by_system=True,
        processes=_processes,
        depends_on=_arrangements_and_systems,
    ),
    "gradients": Check(
        "One step's gradients of each system against float64.",
        tables=("runs", "steps"),
        by_system=True,
        processes=_processes,
        depends_on=_arrangements_and_systems,
    ),
    "learning": Check("Weights change and the loss falls.", tables=("runs", "steps")),
    "kernels": Check("LoRA linears against float64.", tables=("kernels",), depends_on=_kernel_settings),
}


def needed_by(table: str) -> tuple[str, ...]:
    """The checks that figures of a kind of measurements need: `runs`, `steps` or `kernels`."""
    return tuple(name for name, check in CHECKS.items() if table in check.tables)


def files_of(name: str) -> tuple[str, ...]:
    """What a check writes to the folder of checks."""
    curves = (f"{name}.csv", f"{name}.csv.sha256") if CHECKS[name].curves else ()
    return (f"{name}.json", *curves)


class SuiteName(NamedTuple):
    """In place of a suite that has an entry in configs/kernels.yaml and no file of configs/suites."""

    name: str


def run_check(name: str, suite_path: Path) -> CheckOutcome:
    """Make a check of a suite here and now; raises `UserError` where the suite's device is missing."""
    from lorafusion.lab.experiments.experiment import require_device

    one_of("check", name, set(CHECKS), "check")
    suite = read_suite(suite_path) if Path(suite_path).exists() else SuiteName(str(suite_path))
    settings = _measured(suite, name)
    require_device(settings, suite_path)
    verdict, curves = load(f"lorafusion.lab.checks.{name}:check_suite", "check")(suite)
    return CheckOutcome(verdict, origin_of(suite.name, settings.device, settings.dtype), curves)
