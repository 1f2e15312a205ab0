"""One command for everything on this machine: the workflow, its report, and a short table at the end."""

import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from lorafusion.core.config import CONFIGS
from lorafusion.core.plugins import import_extra
from lorafusion.core.schema import UserError
from lorafusion.core.source_tree import IS_CHECKOUT
from lorafusion.lab.dag import Dag, Step
from lorafusion.lab.driver import driving
from lorafusion.lab.failures import failures, forget, statement
from lorafusion.launch.launch import end_with_parent

ROOT = CONFIGS.parent
SNAKEMAKE = [sys.executable, "-m", "snakemake"]
SNAKEFILE = ROOT / "Snakefile"


def reproduce(suite: str | None, folder: Path | None = None, again: bool = False) -> int:
    """Run the workflow where anything is to be done, show the summary; returns the exit status. again: make the runs
    that crashed or ran out of time anew."""
    require_workflow()
    from lorafusion.lab.steps import dag_of  # which needs pandas

    dag = dag_of(suite, folder)
    workflow = [*SNAKEMAKE, "--snakefile", str(SNAKEFILE), "--profile", str(ROOT / "workflow" / "profiles" / "local"),
                *_config(dag)]  # fmt: skip
    with driving(dag.folder, f"workflow of suite {dag.name}"):
        if again:
            forget(dag.runs)
        if _up_to_date(workflow):
            print(f"Nothing to do: the results of suite {dag.name} are up to date.")
        elif _run(workflow):
            message = f"the workflow of suite {dag.name} did not finish; run the same command again to resume"
            print(f"error: {message}", file=sys.stderr)
            return 1
        if not _report_is_current(dag) and not write_report(dag, SNAKEFILE):
            raise UserError(f"{dag.folder}: the report could not be made")
    show_summary(dag)
    failed = statement(failures_of(dag), again_command(dag))
    if failed:
        print(f"error: {UserError(failed)}", file=sys.stderr)
    return int(bool(failed))


def failures_of(dag: Dag) -> dict[Step, str]:
    """The runs of a suite that failed, and as what."""
    return failures(step for step in dag.of_target("all") if step in dag.runs)


def again_command(dag: Dag, slurm: bool = False) -> str:
    """What to type to try again the runs that another try may mend."""
    folder = [] if dag.folder == Path("results") / dag.name else [str(dag.folder)]
    if slurm:
        words = ["snakemake", "--cores", "all", "--profile", "slurm", "--config", f"suite={dag.suite}",
                 *[f"folder={path}" for path in folder], "again=true"]  # fmt: skip
    else:
        words = ["lorafusion", "lab", "run", dag.suite, *[f"--folder={path}" for path in folder], "--again"]
    return shlex.join(words)


def require_workflow() -> None:
    """Raise `UserError` where the workflow or what runs it is missing."""
    if not IS_CHECKOUT:
        raise UserError("the workflow: needs a checkout of the repository, which has its Snakefile")
    import_extra("snakemake", "lab", "the workflow")


def make_report(suite: str | None, folder: Path | None) -> None:
    """Write the report of a suite whose workflow has run, and print its summary."""
    require_workflow()
    from lorafusion.lab.steps import dag_of

    dag = dag_of(suite, folder)
    missing = [path for path in _shown(dag) if not path.exists()]
    if missing:
        raise UserError(f"{missing[0]}: the report needs it; run `lorafusion lab run {dag.suite}` first")
    with driving(dag.folder, f"report of suite {dag.name}"):
        if not write_report(dag, SNAKEFILE):
            raise UserError(f"{dag.folder}: the report could not be made")
    print(dag.folder / "report.html")
    show_summary(dag)


def write_report(dag: Dag, snakefile: str | Path) -> bool:
    """Have Snakemake write the report to the folder of a suite's results, whole or not at all."""
    draft = dag.folder / "report.part.html"  # Snakemake asks for the suffix
    # It takes files for incomplete that a killed Snakemake has marked; with that option it shows them all the same.
    command = [*SNAKEMAKE, "--snakefile", str(snakefile), "--cores", "1", "--nolock", "--rerun-incomplete",
               "--quiet", "all", *_config(dag), "--report", str(draft),
               "--report-stylesheet", str(Path(snakefile).parent / "workflow" / "report" / "phone.css")]  # fmt: skip
    if _run(command):
        return False
    draft.replace(dag.folder / "report.html")
    return True


def _report_is_current(dag: Dag) -> bool:
    """Is the report there, and newer than all that it shows?"""
    report = dag.folder / "report.html"
    return report.exists() and report.stat().st_mtime_ns >= max(path.stat().st_mtime_ns for path in _shown(dag))


def _shown(dag: Dag) -> list[Path]:
    return [path for step in dag.of_target("all") for path in step.outputs]


def _config(dag: Dag) -> list[str]:
    return ["--config", f"suite={dag.suite}", f"folder={dag.folder}"]


def show_summary(dag: Dag) -> None:
    """Print a suite's results; raises `UserError` where there are none yet."""
    from lorafusion.lab.report.summary import print_summary
    from lorafusion.lab.table.table import read

    table = dag.folder / "measurements.csv"
    if not table.exists():
        raise UserError(f"{table}: no results yet; run `make reproduce`")
    print_summary(read(table), dag.folder / "report.html")


def _up_to_date(workflow: Sequence[str]) -> bool:
    """Would the workflow have nothing to do?"""
    dry = subprocess.run([*workflow, "--dry-run"], capture_output=True, text=True, check=False)
    return dry.returncode == 0 and "Nothing to be done" in dry.stdout + dry.stderr


def _run(command: Sequence[str]) -> int:
    """The exit status of a command that ends with this process."""
    return subprocess.run(command, check=False, preexec_fn=partial(end_with_parent, parent=os.getpid())).returncode
