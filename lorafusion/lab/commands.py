"""What the commands of `lorafusion lab` do: each chooses some of a suite's steps and has them made."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from lorafusion.core.config import read_systems
from lorafusion.core.files import read_json
from lorafusion.core.schema import UserError, one_of
from lorafusion.lab.checks.catalog import run_check
from lorafusion.lab.checks.verdicts import CheckOutcome, origin_of
from lorafusion.lab.cluster.preflight import check_nodes
from lorafusion.lab.dag import Step, make_step, state
from lorafusion.lab.driver import driving, is_driven
from lorafusion.lab.failures import failures, forget, statement
from lorafusion.lab.gather import gather
from lorafusion.lab.keys import suite_files
from lorafusion.lab.runner import Share, dealt, measured, run_steps
from lorafusion.lab.steps import SuiteSteps, dag_of, step_at
from lorafusion.lab.suite import Arrangement, suite_path
from lorafusion.launch.launch import launch


def step_states(suite: str, pattern: str, folder: Path | None) -> Iterator[str]:
    """A line for each step that fits a pattern: up to date (and whether it failed), missing, or why it is out of
    date."""
    dag, seen = dag_of(suite, folder), {}
    for step in dag.select([pattern]):
        reason = state(step, seen) or "up to date"
        failed = failures({step} & dag.runs) if reason == "up to date" else {}
        plain = reason in ("missing", "up to date") or reason.startswith("after ")
        reason += "".join(f", failed ({status})" for status in failed.values())
        yield f"{step.kind.name}: {step.relative}: {reason if plain else f'out of date: {reason}'}"


def run_step(suite: str, path: Path) -> tuple[str, str]:
    """Make the step that writes a file; returns a line about it, and what to say if it failed. For who drives this step
    a run that failed is a result as others are."""
    dag, step = step_at(suite, path)
    with driving(dag.folder, f"step of suite {dag.name}"):
        done = f"{path}: {make_step(step, launch)}"
    return done, statement({} if is_driven() else failures({step} & dag.runs), step.command)


def run_here(
    suite: str, share: str, seconds: float, only: Sequence[str], folder: Path | None, again: bool
) -> tuple[Path, int, str]:
    """Make a share of what needs the machine, or of the steps that fit a pattern and what those need; returns the
    suite's folder, how many steps are left, and what to say of runs that failed. again: make those anew."""
    from lorafusion.lab.forked import launch

    dag, part = dag_of(suite, folder), Share.read(share)
    chosen = dag.select(only) if only else []
    wanted = {*chosen, *measured(chosen if only else dag.of_target("all"))}
    mine = sorted(dealt([step for step in dag.steps if step in wanted], part), key=lambda step: -step.tier)
    runs = [step for step in mine if step in dag.runs]
    with driving(dag.folder, f"run of suite {dag.name}", part):
        if again:
            forget(runs)
        left = run_steps(mine, launch, seconds, part.count)
    return dag.folder, left, statement(failures(runs), f"lorafusion lab run {suite} --here --again")


def preflight(suite: str, folder: Path | None) -> str:
    """Find out whether the nodes can run a suite; returns what to say of it."""
    dag = dag_of(suite, folder)
    return check_nodes(dag.folder, [step.resources for step in dag.of_target("all")])


def make_steps(suite: str, folder: Path | None, choose: Callable[[Step], bool], what: str) -> tuple[Path, int]:
    """Make the steps that `choose` takes, once what they need is measured; returns the suite's folder and how many are
    left."""
    dag = dag_of(suite, folder)
    steps = [step for step in dag.steps if choose(step)]
    if not steps:
        raise UserError(f"{suite}: {what}: the suite has none of that name")
    with driving(dag.folder, f"command on suite {dag.name}"):
        left = run_steps(steps, launch)
    seen: dict[Step, str] = {}
    for step in steps:
        reason = state(step, seen)
        if reason:
            print(f"{step.relative}: {reason}; `lorafusion lab run {suite}` makes all that it needs")
    return dag.folder, left


def gather_incomplete(suite: str, folder: Path | None, table: str) -> None:
    """Write a table, or all, of those results that are there and up to date."""
    steps = SuiteSteps(suite, folder)
    results = {name: [run.path for run in step.inputs if not state(run)] for name, step in steps.tables.items()}
    chosen = {name: paths for name, paths in results.items() if table in ("", name) and paths}
    if not chosen:
        raise UserError(f"{steps.folder}: no result of {table or 'any experiment'} is up to date")
    for name, paths in chosen.items():
        folder = steps.tables[name].path.parent
        print(gather(folder, paths, suite_path(suite) if name == "end_to_end" else None, True))


def gather_files(suite: str, files: Sequence[Path], out: Path, incomplete: bool) -> str:
    """Write the table of result files to a folder. suite: refuses those of other cells or settings; may be empty."""
    return gather(out, files, suite_path(suite) if suite else None, incomplete)


def chosen_check(suite: str, name: str, systems: Sequence[str], arrangements: Sequence[str]) -> CheckOutcome:
    """A check of some systems or arrangements on this CPU, whatever suites say; without them, one of a suite."""
    if not (systems or arrangements):
        return run_check(name, suite_path(suite))
    one_of("check", name, {"lossless", "systems", "gradients"}, "--system, --arrangement")
    chosen, losses = [Arrangement.read(text) for text in arrangements or ["1x1"]], []
    if (name == "lossless") == bool(systems):
        raise UserError(f"--system: expected {'none with lossless' if systems else f'the systems to check {name} of'}")
    for system in systems:
        one_of("system", system, set(read_systems()), "--system")
    from lorafusion.lab.checks.gradients import gradient_setups_of, gradients
    from lorafusion.lab.checks.lossless import lossless
    from lorafusion.lab.checks.systems import systems as check_systems

    if name == "lossless":
        verdict, losses = lossless(chosen)
    elif name == "systems":
        verdict = check_systems(list(systems), Arrangement.read((arrangements or ["2x1"])[0]))
    else:
        verdict = gradients(list(systems), chosen, gradient_setups_of(None))
    return CheckOutcome(verdict, origin_of(None, "cpu", "float64"), losses)


def changed_contracts(record: Path, device: str, write: bool) -> str:
    """How what systems cost differs from what a file records, which is looked at before torch is imported; write: write
    it there."""
    if record.exists() or not write:
        read_json(record, "record of what systems cost")
    from lorafusion.lab.checks.contract import check_contracts

    return check_contracts(record, device, write)


def validate(suite: str, table: Path, plans: Path, stem: Path, profile: Path | None) -> str:
    """Draw the figure of a table's runs and of what is predicted of them; returns a line about it."""
    from lorafusion.lab.validation import validate_table

    return validate_table(suite_files(suite_path(suite)), table, plans, stem, profile)
